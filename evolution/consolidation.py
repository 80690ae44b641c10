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
from typing import Self

import torch
from torch import Tensor

from evolution.errors import TrainingError
from evolution.nested import Factors, NestedLoRA
from registry.logs import get_logger

log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Consolidation:
    """The factors of the three sums, and at most which rank, and which share of squared singular values, to keep.

    With neither `rank` nor `energy` nothing is cut. Raises `TrainingError`.
    """

    slow: float = 1.0
    fast: float = 1.0
    left: float = 0.0
    rank: int | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise TrainingError(f"expected a rank of at least 1 to keep, got {self.rank}")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise TrainingError(f"expected an energy in (0, 1] to keep, got {self.energy}")

    @classmethod
    def ema(cls, decay: float, *, rank: int | None = None, energy: float | None = None) -> Self:
        """ΔW₀ ← decay · ΔW₀ + (1 − decay) · ΔW_k, an exponential moving average over tasks."""
        if not 0 <= decay <= 1:
            raise TrainingError(f"expected a decay in [0, 1], got {decay}")
        return cls(slow=decay, fast=1 - decay, rank=rank, energy=energy)


@dataclass(frozen=True, kw_only=True)
class Cut:
    """What a consolidation made of one layer's slow pair: Frobenius norms of scaling · B A, and of what was cut."""

    rank_joined: int
    rank: int
    norm: float
    lost: float

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
    cuts: Mapping[str, Cut]
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
    kept = {path: truncate(*pair, rank=how.rank, energy=how.energy) for path, pair in joined.items()}
    for path, layer in nested.layers.items():
        layer.slow.become(kept[path].a, kept[path].b)
    nested.reset(task, left=how.left)
    scale = abs(nested.scaling)
    cuts = {
        path: Cut(rank_joined=len(joined[path][0]), rank=len(one.a), norm=scale * one.norm, lost=scale * one.lost)
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


def truncate(a: Tensor, b: Tensor, *, rank: int | None, energy: float | None) -> Truncated:
    """The best pair of at most `rank`, and no larger than `energy` needs; with neither the pair as it is.

    √S goes to either side. B A = Q_b (R_b R_aᵀ) Q_aᵀ, so only a (rank, rank) matrix is decomposed, in float64.
    """
    q_a, r_a = torch.linalg.qr(a.double().T)
    q_b, r_b = torch.linalg.qr(b.double())
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    energies = s.square()
    norm = float(energies.sum().sqrt())
    if rank is None and energy is None:
        return Truncated(a=a, b=b, norm=norm, lost=0.0)
    keep = _kept(s, rank, energy)
    if norm == 0:
        # √S would leave A zero as well, and a pair of two zeros never learns.
        return Truncated(a=a[:keep], b=torch.zeros_like(b[:, :keep]), norm=0.0, lost=0.0)
    root = s[:keep].sqrt()
    return Truncated(
        a=((root[:, None] * vh[:keep]) @ q_a.T).to(a.dtype),
        b=(q_b @ (u[:, :keep] * root)).to(b.dtype),
        norm=norm,
        lost=float(energies[keep:].sum().sqrt()),
    )


def intruder_dimensions(weight: Tensor, change: Tensor, *, top: int = 10, cosine: float = 0.5) -> tuple[int, ...]:
    """Which of the `top` left singular vectors of W + ΔW have |cosine| below `cosine` with all of W's.

    Shuttleworth et al. 2024, arXiv:2410.21228, algorithm 1; they go with forgetting. W and ΔW are (d_out, d_in).
    """
    before = torch.linalg.svd(weight.double(), full_matrices=False).U
    after = torch.linalg.svd(weight.double() + change.double(), full_matrices=False).U[:, :top]
    nearest = (before.T @ after).abs().amax(dim=0)
    return tuple((nearest < cosine).nonzero().flatten().tolist())


@torch.no_grad()
def intruders(nested: NestedLoRA, *, top: int = 10, cosine: float = 0.5) -> dict[str, tuple[int, ...]]:
    """The intruder dimensions of the slow pair at every layer; two decompositions of each weight, so it takes time."""
    return {
        path: intruder_dimensions(
            layer.base.weight, layer.scaling * layer.slow.b @ layer.slow.a, top=top, cosine=cosine
        )
        for path, layer in nested.layers.items()
    }


def _kept(s: Tensor, rank: int | None, energy: float | None) -> int:
    """How many singular values to keep: never one that is rounding, and at least one."""
    keep = int((s > s[0] * len(s) * torch.finfo(s.dtype).eps).sum())
    if energy is not None:
        reached = s.square().cumsum(0) / s.square().sum()
        keep = min(keep, int((reached < energy).sum()) + 1)
    return max(1, min(keep, rank or keep))


__all__ = [
    "Consolidated",
    "Consolidation",
    "Cut",
    "Truncated",
    "consolidate",
    "intruder_dimensions",
    "intruders",
    "join",
    "roll_back",
    "truncate",
]
