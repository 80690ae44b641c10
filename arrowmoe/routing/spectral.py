"""Scores of cards by their weights alone, for cards without statistics: how much would each move this text?

The bare base computes a text once, and the input x of every linear module that cards target is measured in passing.
With B = Q R, Q orthonormal, ‖s B A x‖ = ‖s R A x‖: a card becomes one matrix (r, d_in) per module when it is added, and
nothing of size d_out is ever made.

Embeddings, biases, and modules that reading a text does not run (the language-model head) take no part. Of a DoRA
adapter the low-rank term counts, the change of magnitude does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from arrowmoe.base_model import BaseModel
from arrowmoe.errors import RoutingError
from arrowmoe.features import Vectors
from arrowmoe.lora.fitting import make_slot, match_modules
from arrowmoe.lora.layer import Slotted
from evolution.gated import LowRank
from registry.card import LoRACard

BATCH_ROWS = 32
ROUNDING = 1e-5
"""Norms that differ by less, relatively, do not differ."""

Matrices = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Entry:
    """A card's matrices, and the mean and deviation of its norms on the probe texts."""

    matrices: Matrices
    mean: float
    deviation: float


class SpectralScorer:
    """How unusually far each card would move a text: the z-score of its mean ‖s B A x‖ (SpectR, arXiv:2504.03454).

    SpectR compares the norms at every token and layer; here they are averaged, and as a large adapter moves every text
    far, each card is compared with itself: mean and deviation over `probe_texts`, the same for all cards. A base that
    an engine runs is scored inside the engine's `computing()`, without gates.
    """

    def __init__(self, base: BaseModel, cards: Sequence[LoRACard], probe_texts: Sequence[str]) -> None:
        """Raises as `add`."""
        if len(set(probe_texts)) < 2:
            raise RoutingError(
                f"expected at least 2 different probe texts, got {len(set(probe_texts))}, so nothing is unusual",
                hint="give some dozens of texts of many kinds",
            )
        self._base = base
        self._probe_texts = tuple(probe_texts)
        self._entries: dict[str, _Entry] = {}
        self.add(*cards)

    @property
    def digests(self) -> tuple[str, ...]:
        """The cards, one for each column of the scores."""
        return tuple(self._entries)

    def add(self, *cards: LoRACard) -> None:
        """Score `cards` too, all or none of them; the base computes the probe texts once.

        Raises `RoutingError` for a card that moves all of them alike, `AdapterMismatchError` for one that does not fit.
        """
        names: dict[str, str] = {card.digest: card.name for card in cards}
        matrices = {card.digest: matrices_of(self._base, card, low_rank_core) for card in cards}
        norms = mean_norms(self._base, list(matrices.values()), self._probe_texts)
        entries: dict[str, _Entry] = {
            digest: _Entry(matrices=own, mean=float(column.mean()), deviation=float(column.std()))
            for (digest, own), column in zip(matrices.items(), norms.unbind(dim=1), strict=True)
        }
        for digest, entry in entries.items():
            if entry.deviation <= ROUNDING * entry.mean:
                raise RoutingError(
                    f"card {names[digest]!r} moves all probe texts alike, so its weights do not say what it is for",
                    hint="describe the card or give it examples; only linear modules that were trained can be read",
                )
        self._entries |= entries

    def remove(self, digest: str) -> bool:
        """Forget a card; whether it was scored."""
        return self._entries.pop(digest, None) is not None

    def scores(self, texts: Sequence[str]) -> Vectors:
        """(rows, cards) float32, in the order of `digests`; 0 is what is usual for a card."""
        entries = self._entries.values()
        norms = mean_norms(self._base, [entry.matrices for entry in entries], texts)
        means = norms.new_tensor([entry.mean for entry in entries])
        deviations = norms.new_tensor([entry.deviation for entry in entries])
        scores: Vectors = ((norms - means) / deviations).numpy()
        return scores


def low_rank_core(adapter: LowRank) -> Tensor:
    """s R A (r, d_in) float32, where B = Q R: what s B A does to an input, but for a rotation of the outcome."""
    upper = torch.linalg.qr(adapter.b.T.float(), mode="r").R
    core: Tensor = adapter.scaling * (upper @ adapter.a.float())
    return core


def matrices_of(base: BaseModel, card: LoRACard, reduce: Callable[[LowRank], Tensor]) -> dict[str, Tensor]:
    """Module path of the base → `reduce` (k, d_in) of what `card` holds for that linear module.

    Raises `AdapterMismatchError` for a card that does not fit the base.
    """
    modules = {
        path: module.base if isinstance(module, Slotted) else module for path, module in base.model.named_modules()
    }
    slots = {path: make_slot(card, name, modules[path]) for name, path in match_modules(card, modules).items()}
    return {
        path: reduce(slot.low_rank)
        for path, slot in slots.items()
        if slot.low_rank is not None and not isinstance(modules[path], nn.Embedding)
    }


@torch.no_grad()
def mean_norms(base: BaseModel, cards: Sequence[Matrices], texts: Sequence[str]) -> Tensor:
    """(rows, cards) float32 on the CPU: ‖M x‖ averaged over tokens and modules; 0 where there is nothing to average.

    Texts that are longer than the model's own limit are cut. Raises `RoutingError` for a module that sees no rows.
    """
    norms = torch.zeros((len(texts), len(cards)))
    if not cards:
        return norms
    paths = dict.fromkeys(path for card in cards for path in card)
    stacks = {path: _stack([card.get(path) for card in cards]) for path in paths}
    by_length = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    for start in range(0, len(texts), BATCH_ROWS):
        rows = by_length[start : start + BATCH_ROWS]
        norms[rows] = _measure(base, [texts[row] for row in rows], stacks, len(cards)).cpu()
    return norms


def _measure(base: BaseModel, texts: Sequence[str], stacks: Mapping[str, _Stack], cards: int) -> Tensor:
    """(rows, cards) for one batch of texts."""
    batch = base.tokenizer(
        list(texts),
        padding=True,
        padding_side="right",
        truncation=base.max_positions is not None,
        max_length=base.max_positions,
        return_tensors="pt",
    ).to(base.device)
    meter = _InputMeter(stacks, cards, batch["attention_mask"])
    if batch["input_ids"].shape[1] > 0:  # else empty texts alone, and a tokenizer that frames them with nothing
        with meter.attached(base.model):
            base.model.base_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return meter.means()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Stack:
    """The matrices of all cards at one module: their rows (Σk, d_in), and the card that each row is of (Σk,)."""

    rows: Tensor
    owners: Tensor


def _stack(matrices: Sequence[Tensor | None]) -> _Stack:
    present = [(card, matrix) for card, matrix in enumerate(matrices) if matrix is not None]
    rows = torch.cat([matrix for _, matrix in present])
    owners = torch.tensor([card for card, matrix in present for _ in range(len(matrix))], device=rows.device)
    return _Stack(rows=rows, owners=owners)


class _InputMeter:
    """Collects the inputs of modules while a model runs one batch: as ‖M x‖ of each card, so that no input is kept."""

    def __init__(self, stacks: Mapping[str, _Stack], cards: int, mask: Tensor) -> None:
        self._stacks = stacks
        self._mask = mask
        self._sums = torch.zeros((len(mask), cards), device=mask.device)
        self._calls = torch.zeros(cards, device=mask.device)

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Measure what `model` computes inside."""
        with ExitStack() as hooks:
            for path in self._stacks:
                hook = partial(self._meet, path)
                hooks.enter_context(model.get_submodule(path).register_forward_pre_hook(hook))
            yield

    def means(self) -> Tensor:
        """(rows, cards): the mean over tokens and calls of each card's modules."""
        return self._sums / self._calls.clamp(min=1)

    def _meet(self, path: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Add the norms at a module whose input is (rows, tokens, d_in), or (rows, d_in) if it is pooled already."""
        stack, x = self._stacks[path], inputs[0]
        x, mask = (x.unsqueeze(1), torch.ones_like(self._mask[:, :1])) if x.dim() == 2 else (x, self._mask)
        if x.shape[:-1] != mask.shape:
            raise RoutingError(
                f"module {path!r}: expected an input of {tuple(self._mask.shape)} tokens, "
                f"got shape {tuple(inputs[0].shape)}, so its rows cannot be told apart",
                hint="leave out cards that target this module",
            )
        squares = (x.float() @ stack.rows.T) ** 2
        norms = squares.new_zeros((*mask.shape, len(self._calls))).index_add_(-1, stack.owners, squares).sqrt()
        self._sums += (norms * mask.unsqueeze(-1)).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)
        self._calls += torch.bincount(stack.owners, minlength=len(self._calls)) > 0
