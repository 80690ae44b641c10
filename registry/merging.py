"""Several cards as one: a weighted sum of their adapters, exact or approximated, its parents and its error recorded.

What is not linear in the adapter alone (DoRA, biases, whole parameters) is refused by name: to merge it right takes the
base model's weights. A module that only some of the cards adapt counts as zero in the others. Statistics for the router
are not merged. The result is a plain LoRA with scaling 1 in float32, whatever scaling rules its parents have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite, sqrt
from typing import Any, Literal, get_args

import numpy as np

from registry import merge_rules
from registry.card import LoRACard
from registry.errors import MergeError
from registry.logs import get_logger
from registry.low_rank import Approximation, Cut, Term, concatenate, reduce
from registry.manifest import AdapterSpec
from registry.tensor import Role, Tensor

Method = Literal["concat", "svd", "ties", "dare", "linear"]
Shares = Sequence[tuple[LoRACard, float]]
"""Cards, each with its weight."""

MAX_DENSE_ELEMENTS = 1 << 26
"""Of one module's matrix, which TIES and DARE multiply out once per card and decompose: 256 MiB each."""

_CUT_METHODS = ("svd", "ties", "dare")
_DENSE_METHODS = ("ties", "dare")
_NOT_LINEAR = {
    Role.MAGNITUDE: "DoRA's magnitude rescales the base model's weight",
    Role.BIAS: "its biases replace the base model's",
    Role.FULL: "it replaces whole parameters of the base model",
}

_log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Merge:
    """How cards are merged. Raises `MergeError` for settings that do not go together.

    `svd`, `ties` and `dare` need a `rank` or an `energy` (the share of the squared singular values that is kept);
    `ties` and `dare` a `density` (the share of elements that stays: 1 - drop rate in DARE). `dare` draws by `seed`.
    """

    method: Method = "concat"
    rank: int | None = None
    energy: float | None = None
    density: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise MergeError(f"expected a method of {', '.join(get_args(Method))}, got {self.method!r}")
        limits = (self.rank is not None) + (self.energy is not None)
        if limits != (self.method in _CUT_METHODS):
            wanted = "a rank or an energy" if self.method in _CUT_METHODS else "neither rank nor energy"
            raise MergeError(f"expected {wanted} for {self.method}, got rank {self.rank} and energy {self.energy}")
        if (self.density is not None) != (self.method in _DENSE_METHODS):
            wanted = "a density" if self.method in _DENSE_METHODS else "no density"
            raise MergeError(f"expected {wanted} for {self.method}, got {self.density}")
        if self.seed < 0:
            raise MergeError(f"expected a seed of at least 0, got {self.seed}")
        if self.density is not None and not 0 < self.density <= 1:
            raise MergeError(f"expected density above 0 and at most 1, got {self.density}")
        try:
            self.cut()
        except ValueError as error:
            raise MergeError(str(error)) from error

    def cut(self) -> Cut:
        """Where the sum is cut off."""
        return Cut(rank=self.rank, energy=self.energy)


def merge(shares: Shares, how: Merge, *, name: str, **about: Any) -> LoRACard:
    """One unsigned card for Σ weight · adapter; `about` are fields of its manifest, in place of what the parents say.

    `training["merge"]` says how it was made: `error` is relative, ‖wanted − merged‖ / ‖wanted‖ (Frobenius), over all
    modules, where `ties` and `dare` want what they computed and all others the weighted sum. Raises `MergeError`.
    """
    check_mergeable(shares)
    modules = {module: _merged(shares, how, module, place) for place, module in enumerate(_modules_of(shares))}
    cards = [card for card, _ in shares]
    silent = [card.name for card in cards if card.statistics]
    if silent:
        _log.info("merge.statistics_left_out", cards=silent)
    return LoRACard.build(
        name=name,
        adapter=_adapter(cards, {module: merged.term.rank for module, merged in modules.items()}),
        tensors=_tensors(modules),
        base_name=_the_one(card.base_name for card in cards),
        base_architecture=_the_one(card.manifest.base.architecture for card in cards),
        **_described(cards) | about,
        parents=[card.digest for card in cards],
        training={"merge": _provenance(shares, how, modules.values())},
    )


def check_mergeable(shares: Shares) -> None:
    """Raise `MergeError` naming what keeps the cards from being one adapter of one base model."""
    if not shares:
        raise MergeError("expected at least one card to merge, got none")
    cards = [card for card, _ in shares]
    for card, weight in shares:
        if not isfinite(weight) or weight == 0:
            raise MergeError(f"card {card.name!r}: expected a weight that is finite and not zero, got {weight}")
        _check_linear(card)
    twice = [card.name for card, count in Counter(cards).items() if count > 1]
    if twice:
        raise MergeError(f"card {twice[0]!r} stands twice among those to merge", hint="add up its weights")
    for what, values in (
        ("base model", [card.base_name for card in cards]),
        ("architecture", [card.manifest.base.architecture for card in cards]),
    ):
        if len(set(values) - {None}) > 1:
            raise MergeError(f"expected cards of one {what}, got {', '.join(map(str, values))}")
    _check_modules(cards)
    _check_paths(cards)


def _check_linear(card: LoRACard) -> None:
    for tensor in card.tensors:
        if tensor.role in _NOT_LINEAR:
            raise MergeError(
                f"card {card.name!r} cannot be merged: {_NOT_LINEAR[tensor.role]} ({tensor.name!r}), so a sum of "
                "adapters is not what the cards do",
                hint="train it without DoRA, biases and modules_to_save, and save it with save_embedding_layers=False",
            )


def _check_modules(cards: Iterable[LoRACard]) -> None:
    """Where two cards adapt one module, it is of one kind and of one shape."""
    known: dict[str, tuple[str, tuple[int, ...]]] = {}
    for card in cards:
        embeddings = set(card.manifest.adapter.embeddings)
        for module in card.manifest.adapter.target_modules:
            a, b = card.modules[module][Role.A], card.modules[module][Role.B]
            found = ("embedding" if module in embeddings else "linear", (a.shape[1], b.shape[0]))
            if known.setdefault(module, found) != found:
                raise MergeError(
                    f"module {module!r}: expected {_kind(known[module])} as in the cards before, got {_kind(found)} in "
                    f"card {card.name!r}, so they are of different base models"
                )


def _kind(found: tuple[str, tuple[int, ...]]) -> str:
    return f"{found[0]} {found[1][0]} → {found[1][1]}"


def _check_paths(cards: Sequence[LoRACard]) -> None:
    """No card says `layers.0.q` where another says `model.layers.0.q`: most likely that is one module, not two."""
    targets = [set(card.manifest.adapter.target_modules) for card in cards]
    every = set().union(*targets)
    for module in sorted(every):
        parts = module.split(".")
        for short in (".".join(parts[start:]) for start in range(1, len(parts))):
            if short in every and not any({module, short} <= own for own in targets):
                raise MergeError(
                    f"one card names a module {short!r}, another {module!r}, so it is unclear whether they are one",
                    hint="train both on the same class of model, or rename the keys of one adapter",
                )


def _modules_of(shares: Shares) -> list[str]:
    return sorted({module for card, _ in shares for module in card.manifest.adapter.target_modules})


def _merged(shares: Shares, how: Merge, module: str, place: int) -> Approximation:
    """One module of all cards that adapt it; `place` is its own among the modules."""
    try:
        with np.errstate(over="raise", invalid="raise"):
            return _combined(shares, how, module, place)
    except (FloatingPointError, np.linalg.LinAlgError) as error:
        raise MergeError(f"module {module!r}: its weights are too large to be added up ({error})") from error


def _combined(shares: Shares, how: Merge, module: str, place: int) -> Approximation:
    of_module = [(row, share) for row, share in enumerate(shares) if module in share[0].modules]
    terms = [_term(card, weight, module) for _, (card, weight) in of_module]
    density = how.density or 1.0
    if how.method in _DENSE_METHODS:
        _check_size(module, terms[0].shape, how.method)
    match how.method:
        case "concat":
            return concatenate(terms)
        case "linear":
            return merge_rules.add_factors(terms)
        case "svd":
            return reduce(terms, how.cut())
        case "ties":
            return merge_rules.ties(terms, density, how.cut())
        case "dare":
            generators = [np.random.default_rng([how.seed, place, row]) for row, _ in of_module]
            return merge_rules.dare(terms, density, how.cut(), generators)


def _term(card: LoRACard, weight: float, module: str) -> Term:
    tensors = card.modules[module]
    return Term(
        a=tensors[Role.A].float32(),
        b=tensors[Role.B].float32(),
        factor=weight * card.manifest.adapter.scaling_of(module),
    )


def _check_size(module: str, shape: tuple[int, int], method: str) -> None:
    if shape[0] * shape[1] > MAX_DENSE_ELEMENTS:
        raise MergeError(
            f"module {module!r}: expected at most {MAX_DENSE_ELEMENTS} elements for {method}, got {shape}",
            hint="concat, svd and linear never multiply the matrices out",
        )


def _adapter(cards: Iterable[LoRACard], ranks: Mapping[str, int]) -> AdapterSpec:
    """Every scaling is 1: weights and scalings lie in the tensors."""
    specs = [card.manifest.adapter for card in cards]
    return AdapterSpec.of_ranks(
        ranks,
        embeddings=tuple(sorted({module for spec in specs for module in spec.embeddings})),
        # PEFT sets it right for each module; it says how the base stores its weights, and changes no tensor of a card.
        fan_in_fan_out=any(spec.fan_in_fan_out for spec in specs),
    )


def _tensors(modules: Mapping[str, Approximation]) -> Iterator[Tensor]:
    for module, merged in modules.items():
        yield Tensor.from_numpy(module, Role.A, merged.term.a.astype(np.float32))
        yield Tensor.from_numpy(module, Role.B, merged.term.b.astype(np.float32))


def _described(cards: Sequence[LoRACard]) -> dict[str, Any]:
    """What the parents say together."""
    return {
        "description": "; ".join(dict.fromkeys(card.description for card in cards if card.description)),
        "domains": list(dict.fromkeys(domain for card in cards for domain in card.manifest.domains)),
        "examples": list(dict.fromkeys(example for card in cards for example in card.examples)),
        "licence": _licence(card.manifest.licence for card in cards),
    }


def _licence(stated: Iterable[str | None]) -> str | None:
    """An SPDX expression that asks for all of the licences."""
    distinct = [licence for licence in dict.fromkeys(stated) if licence]
    if len(distinct) < 2:
        return next(iter(distinct), None)
    return " AND ".join(f"({licence})" if " " in licence else licence for licence in distinct)


def _the_one(values: Iterable[str | None]) -> str | None:
    return next((value for value in values if value is not None), None)


def _provenance(shares: Shares, how: Merge, merged: Iterable[Approximation]) -> dict[str, Any]:
    """How it was made: settings that were used, weights in the order of the parents, and the error."""
    parts = list(merged)
    settings = {key: value for key, value in asdict(how).items() if value is not None}
    if how.method != "dare":
        del settings["seed"]
    wanted, missed = sum(part.wanted for part in parts), sum(part.missed for part in parts)
    return settings | {
        "weights": [weight for _, weight in shares],
        "error": sqrt(missed / wanted) if wanted else 0.0,
    }


__all__ = ["MAX_DENSE_ELEMENTS", "Merge", "Method", "Shares", "check_mergeable", "merge"]
