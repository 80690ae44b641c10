"""Taking an adapter out of what others trained: a card out of the difference of two models' weights.

Each linear module whose weight changed gets the best B A of its difference (`registry.low_rank`), with a rank of its
own and scaling 1. Anything else that changed (embeddings, norms, biases, convolutions) has no low-rank form here: it is
refused by name, or kept whole as `full` tensors; it is never dropped. Weights come one at a time, so memory holds a few
modules and the card.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any, Final, Literal

import numpy as np
import torch

from evolution.errors import ExtractionError
from evolution.model_files import ModelLayout, Weights
from registry.card import LoRACard
from registry.digest import Digest, digest_of
from registry.logs import get_logger
from registry.low_rank import Approximation, Cut, decompose
from registry.manifest import AdapterSpec
from registry.tensor import DType, Role, Tensor

Others = Literal["refuse", "full"]
Progress = Callable[[str, float, float], None]
"""Text, done and total so far."""

_NAMED_AT_MOST: Final = 5
_DTYPES: Final = {torch.float32: DType.FLOAT32, torch.float16: DType.FLOAT16, torch.bfloat16: DType.BFLOAT16}

log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Change:
    """A parameter that changed and is no linear module's weight; `relative` is its Frobenius norm over the base's."""

    name: str
    kind: str
    relative: float


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What was kept of one module's difference; `error` is relative to the difference, in the Frobenius norm."""

    rank: int
    energy: float
    error: float


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """The card, what each module kept, and what changed besides the linear modules (all kept whole in the card)."""

    card: LoRACard
    kept: Mapping[str, Kept]
    others: Sequence[Change]

    @property
    def error(self) -> float:
        """Relative Frobenius error over all linear modules together."""
        return _error_of(self.kept.values())


@dataclass(frozen=True, kw_only=True)
class LoRAExtractor:
    """Makes cards of fine-tuned models; `others` says what becomes of changes that are not a linear module's."""

    cut: Cut
    others: Others = "refuse"
    on_progress: Progress = lambda text, done, total: None

    def extract(
        self,
        tuned: Weights,
        base: Weights | None,
        layout: ModelLayout,
        *,
        name: str,
        base_name: str | None,
        **about: Any,
    ) -> Extraction:
        """The card that turns `base` into `tuned`, within the bound; without a base, `tuned` is the difference itself.

        `about` are other fields of the manifest. Raises `ExtractionError` where nothing changed, the two models are
        not of one form, or something changed that may not be kept.
        """
        difference = _Difference(tuned, base)
        difference.check_names(layout)
        others = self._others(difference, layout)
        pairs = self._pairs(difference, layout)
        kept = {module: _kept(found) for module, found in pairs.items()}
        tensors = [tensor for module, found in pairs.items() for tensor in _tensors(module, found)]
        whole = _whole(others, pairs.keys(), layout)
        card = LoRACard.build(
            name=name,
            adapter=AdapterSpec.of_ranks(
                {module: one.rank for module, one in kept.items()},
                fan_in_fan_out=any(layout.linear[module] for module in kept),
            ),
            tensors=[*tensors, *_fulls(whole, tuned)],
            base_name=base_name,
            base_architecture=layout.architecture,
            training={"extraction": self._provenance(tuned, base, kept, sorted(whole))},
            **about,
        )
        return Extraction(card=card, kept=kept, others=others)

    def _others(self, difference: _Difference, layout: ModelLayout) -> list[Change]:
        linear = {f"{module}.weight" for module in layout.linear}
        found = [difference.change(name, layout) for name in sorted(difference.names - linear)]
        changes = [change for change in found if change is not None]
        for change in changes:
            log.info("changed_besides", name=change.name, kind=change.kind, relative=round(change.relative, 6))
        if changes and self.others == "refuse":
            raise ExtractionError(
                f"{len(changes)} parameters changed that no low-rank pair stands for, {_listed(changes)}, "
                "so a card without them would not be the tuned model",
                hint="keep them whole in the card with --others full; PEFT applies them, our engine does not",
            )
        unknown = [change for change in changes if change.kind == "unknown"]
        if unknown or (changes and difference.is_direct):
            why = "the model has no such parameter" if unknown else "a difference alone does not give their values"
            raise ExtractionError(f"expected to keep whole what changed, got {_listed(unknown or changes)}: {why}")
        return changes

    def _pairs(self, difference: _Difference, layout: ModelLayout) -> dict[str, Approximation]:
        found: dict[str, Approximation] = {}
        for done, (module, transposed) in enumerate(layout.linear.items()):
            self.on_progress(module, done, len(layout.linear))
            delta = difference.of(f"{module}.weight")
            if delta is None:
                continue
            if not bool(torch.isfinite(delta).all()):
                raise ExtractionError(f"expected finite weights, got NaN or infinite ones in {module}")
            found[module] = decompose((delta.T if transposed else delta).numpy(), self.cut)
        if not found:
            raise ExtractionError(
                "expected linear modules that differ from the base, got none, so there is no adapter to extract",
                hint="the two directories hold the same model; is --tuned the one you meant?",
            )
        return found

    def _provenance(
        self, tuned: Weights, base: Weights | None, kept: Mapping[str, Kept], whole: Sequence[str]
    ) -> dict[str, Any]:
        return {
            "method": "svd",
            "bound": self.cut.bounds,
            "error": _error_of(kept.values()),
            "tuned": weights_digest(tuned),
            "base": None if base is None else weights_digest(base),
            "whole": list(whole),
        }


class _Difference:
    """Tuned minus base, one tensor at a time; without a base the tuned weights are the difference."""

    def __init__(self, tuned: Weights, base: Weights | None) -> None:
        self._tuned, self._base = tuned, base
        self.is_direct = base is None
        self.names = frozenset(tuned.names)

    def check_names(self, layout: ModelLayout) -> None:
        """Raise `ExtractionError` where one model has parameters that the other lacks."""
        if self._base is None:
            return
        odd = sorted(self.names ^ frozenset(self._base.names))
        if odd:
            raise ExtractionError(
                f"expected two models of the same parameters, got {odd[0]!r} in one only ({len(odd)} such), "
                "so their difference is not defined",
                hint="both must be of one class: drop a new head, or save the base with that class too",
            )
        missing = sorted(layout.kinds.keys() - self.names)
        if missing:
            raise ExtractionError(
                f"expected a tensor for {missing[0]!r} in the files, got none ({len(missing)} such), so they are not "
                "whole, or hold the model in another form",
                hint="load the models with transformers and save them again; fused experts cannot be extracted",
            )

    def of(self, name: str) -> torch.Tensor | None:
        """The difference in fp32, None where there is none. Raises `ExtractionError` for shapes that differ."""
        if name not in self.names:
            return None
        tuned = self._tuned.tensor(name)
        if self._base is None:
            return _widened(name, tuned) if bool(tuned.any()) else None
        base = self._base.tensor(name)
        if tuned.shape != base.shape:
            raise ExtractionError(
                f"{name}: expected the base's shape {tuple(base.shape)}, got {tuple(tuned.shape)}, so neither a pair "
                "nor a whole tensor fits the base",
                hint="a vocabulary was resized: resize the base's embeddings in the same way and save it first",
            )
        if tuned.dtype == base.dtype and torch.equal(tuned, base):
            return None
        delta = _widened(name, tuned) - _widened(name, base)
        return delta if bool(delta.any()) else None

    def change(self, name: str, layout: ModelLayout) -> Change | None:
        """What changed of a parameter that is no linear module's weight."""
        delta = self.of(name)
        if delta is None:
            return None
        before = 0.0 if self._base is None else float(self._base.tensor(name).float().norm())
        relative = float(delta.norm()) / before if before else float("inf")
        return Change(name=name, kind=layout.kinds.get(name, "unknown"), relative=relative)


def weights_digest(weights: Weights) -> Digest:
    """What was extracted from: the digest of the sorted list of names and their tensors' digests, as compact JSON."""
    rows = [[name, digest_of(_bytes(weights.tensor(name)))] for name in sorted(weights.names)]
    return digest_of(json.dumps(rows, separators=(",", ":"), ensure_ascii=False).encode())


def _whole(others: Iterable[Change], targets: Iterable[str], layout: ModelLayout) -> dict[str, str]:
    """Parameter to keep whole → the name of its tensor: PEFT saves modules whole, and a tied one under each name."""
    targets, kept = frozenset(targets), dict[str, str]()
    for change in others:
        module = change.name.rpartition(".")[0]
        if module in targets:
            kept[change.name] = change.name
            continue
        inside = [name for name in layout.kinds if name.startswith(f"{module}.")]
        if not module or any(target.startswith(f"{module}.") for target in targets):
            raise ExtractionError(
                f"expected to keep {change.name} whole, but its module holds adapted ones, and PEFT saves whole modules"
            )
        kept |= {name: name for name in inside}
    return kept | {alias: source for alias, source in layout.tied.items() if source in kept}


def _kept(found: Approximation) -> Kept:
    return Kept(rank=found.term.rank, energy=found.wanted, error=sqrt(found.missed / found.wanted))


def _error_of(kept: Iterable[Kept]) -> float:
    kept = list(kept)
    return sqrt(sum(one.error**2 * one.energy for one in kept) / sum(one.energy for one in kept))


def _tensors(module: str, found: Approximation) -> tuple[Tensor, Tensor]:
    a, b = (factor.astype(np.float32, copy=False) for factor in (found.term.a, found.term.b))
    return Tensor.from_numpy(module, Role.A, a), Tensor.from_numpy(module, Role.B, b)


def _fulls(whole: Mapping[str, str], tuned: Weights) -> Iterator[Tensor]:
    """One tensor for each name; those of one source share its bytes."""
    made = {source: _full(source, tuned.tensor(source)) for source in dict.fromkeys(whole.values())}
    return (replace(made[source], name=name) for name, source in whole.items())


def _full(name: str, tensor: torch.Tensor) -> Tensor:
    # A copy, for the file that the tensor lies in belongs to somebody else.
    return Tensor.of(name, Role.FULL, _DTYPES[tensor.dtype], tuple(tensor.shape), _bytes(tensor.clone()))


def _widened(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype not in _DTYPES:
        raise ExtractionError(
            f"{name}: expected float32, float16 or bfloat16, got {tensor.dtype}, so there is nothing to subtract",
            hint="extract from weights that are not quantised",
        )
    return tensor.float()


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _listed(changes: Sequence[Change]) -> str:
    text = ", ".join(f"{change.name} ({change.kind})" for change in changes[:_NAMED_AT_MOST])
    return f"{text} and {len(changes) - _NAMED_AT_MOST} more" if len(changes) > _NAMED_AT_MOST else text


__all__ = ["Change", "Extraction", "Kept", "LoRAExtractor", "Others", "weights_digest"]
