"""The end of a task: its fast pair goes into the slow one, which may then be cut to what matters.

    ΔW₀ ← slow · ΔW₀ + fast · ΔW_k        exactly, by concatenation: the ranks add
    ΔW₀ ← its best approximation at a rank or an energy (Eckart and Young, 1936), by an SVD of the small factors
    ΔW_k ← left · ΔW_k

With (1, 1, 0), which is the default, slow + sum of fast computes the same before and after, but for what was cut.
Everything is computed before anything changes, and what was there is returned, for `roll_back`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Self

import torch
from torch import Tensor

from evolution.errors import TrainingError
from evolution.intruders import soften
from evolution.nested import Factors, NestedLoRA
from registry import low_rank
from registry.logs import get_logger

log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Consolidation:
    """The factors of the three sums, and at most which rank, and which share of squared singular values, to keep.

    With neither `rank` nor `energy` nothing is cut. Intruder dimensions of W + slow are left at `intruders` of their
    strength before the cut; at 1 they are not looked for, which takes long. Raises `TrainingError`.
    """

    slow: float = 1.0
    fast: float = 1.0
    left: float = 0.0
    rank: int | None = None
    energy: float | None = None
    intruders: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.intruders <= 1:
            raise TrainingError(f"expected intruders left at 0 to 1 of their strength, got {self.intruders}")
        try:
            self.cut()
        except ValueError as error:
            raise TrainingError(str(error)) from error

    def cut(self) -> low_rank.Cut:
        """Where the joined pair is cut off."""
        return low_rank.Cut(rank=self.rank, energy=self.energy)

    @classmethod
    def ema(cls, decay: float, *, rank: int | None = None, energy: float | None = None) -> Self:
        """ΔW₀ ← decay · ΔW₀ + (1 − decay) · ΔW_k, an exponential moving average over tasks."""
        if not 0 <= decay <= 1:
            raise TrainingError(f"expected a decay in [0, 1], got {decay}")
        return cls(slow=decay, fast=1 - decay, rank=rank, energy=energy)


@dataclass(frozen=True, kw_only=True)
class LayerCut:
    """What a consolidation made of one layer's slow pair: Frobenius norms of scaling · B A, and of what was cut."""

    rank_joined: int
    rank: int
    norm: float
    lost: float
    intruders: int = 0
    """Directions that were left at a part of their strength, before the cut."""

    @property
    def lost_energy(self) -> float:
        """The share of squared singular values that was cut."""
        return (self.lost / self.norm) ** 2 if self.norm else 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Truncated:
    """A pair, the Frobenius norm of B A before the cut, and that of what was cut."""

    a: Tensor
    b: Tensor
    norm: float
    lost: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Consolidated:
    """What a consolidation did, by layer, and both pairs of before."""

    task: int
    cuts: Mapping[str, LayerCut]
    slow_before: Mapping[str, Factors]
    fast_before: Mapping[str, Factors]


@torch.no_grad()
def consolidate(nested: NestedLoRA, task: int, how: Consolidation | None = None) -> Consolidated:
    """Consolidate fast `task` into slow at every layer.

    Raises `TrainingError`, with nothing changed, for a task that is not there and for weights that are not finite.
    The slow pairs become new parameters: an optimiser that holds the old ones must be made anew.
    """
    nested.check(task)
    how = how or Consolidation()
    slow_before = {path: layer.slow.factors() for path, layer in nested.layers.items()}
    fast_before = {path: layer.fast[task].factors() for path, layer in nested.layers.items()}
    joined = {path: join([(slow_before[path], how.slow), (fast_before[path], how.fast)]) for path in nested.layers}
    odd = [path for path, pair in joined.items() if not all(factor.isfinite().all() for factor in pair)]
    if odd:
        raise TrainingError(f"expected finite weights, got NaN or infinite ones at {odd[0]!r}, so nothing was changed")
    softened = {path: _softened(nested, path, pair, how) for path, pair in joined.items()}
    kept = {path: truncate(*pair, how.cut()) for path, (pair, _) in softened.items()}
    for path, layer in nested.layers.items():
        layer.slow.become(kept[path].a, kept[path].b)
    nested.reset(task, left=how.left)
    scale = abs(nested.scaling)
    cuts = {
        path: LayerCut(
            rank_joined=len(joined[path][0]),
            rank=len(one.a),
            norm=scale * one.norm,
            lost=scale * one.lost,
            intruders=softened[path][1],
        )
        for path, one in kept.items()
    }
    lost_energy = max(one.lost_energy for one in cuts.values())
    log.info("consolidated", task=task, rank=max(one.rank for one in cuts.values()), lost_energy=round(lost_energy, 6))
    return Consolidated(task=task, cuts=cuts, slow_before=slow_before, fast_before=fast_before)


def roll_back(nested: NestedLoRA, done: Consolidated) -> None:
    """Put both pairs back, bit for bit, as they were before the consolidation."""
    nested.check(done.task)
    for path, layer in nested.layers.items():
        layer.slow.become(*done.slow_before[path])
        layer.fast[done.task].become(*done.fast_before[path])


def join(parts: list[tuple[Factors, float]]) -> Factors:
    """One pair that changes Σ weight · B A: ranks add, weights go into B; a weight of 0 leaves its part out.

    Where all are 0 the first part stays, at 0, for a pair has a rank.
    """
    used = [part for part in parts if part[1]] or parts[:1]
    return torch.cat([a for (a, _), _ in used]), torch.cat([weight * b for (_, b), weight in used], dim=1)


def _softened(nested: NestedLoRA, path: str, pair: Factors, how: Consolidation) -> tuple[Factors, int]:
    return soften(nested.layers[path], pair, how.intruders) if how.intruders < 1 else (pair, 0)


def truncate(a: Tensor, b: Tensor, cut: low_rank.Cut) -> Truncated:
    """The best pair for B A at the cut; with no bound the pair as it is. √S goes to either side."""
    whole = low_rank.Term(a=a.cpu().numpy(), b=b.cpu().numpy())
    if not cut.bounds:
        return Truncated(a=a, b=b, norm=sqrt(low_rank.squared_norm(whole)), lost=0.0)
    found = low_rank.reduce([whole], cut)
    if found.wanted == 0:
        # √S would leave A zero as well, and a pair of two zeros never learns.
        return Truncated(a=a[:1], b=torch.zeros_like(b[:, :1]), norm=0.0, lost=0.0)
    kept_a, kept_b = (torch.from_numpy(factor).to(a) for factor in (found.term.a, found.term.b))
    return Truncated(a=kept_a, b=kept_b, norm=sqrt(found.wanted), lost=sqrt(found.missed))


__all__ = [
    "Consolidated",
    "Consolidation",
    "LayerCut",
    "Truncated",
    "consolidate",
    "join",
    "roll_back",
    "truncate",
]
