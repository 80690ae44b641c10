"""Intruder dimensions: directions that a change put among a weight's strongest, and that the weight had nowhere itself.

Shuttleworth et al. 2024, arXiv:2410.21228, algorithm 1; they go with forgetting. Scaling them down in W + ΔW (section 5
there, and PEFT's `reduce_intruder_dimension`) is itself a change of low rank, so the base's weight stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from evolution.nested import Factors, NestedLoRA, NestedLoRALinear

TOP = 10
COSINE = 0.5


@dataclass(frozen=True, kw_only=True, eq=False)
class Intruders:
    """Those of the singular triples of W + ΔW: their places, the strongest is 0; u (d_out, n), s (n,), vt (n, d_in)."""

    at: tuple[int, ...]
    u: Tensor
    s: Tensor
    vt: Tensor


def intruder_dimensions(weight: Tensor, change: Tensor, *, top: int = TOP, cosine: float = COSINE) -> Intruders:
    """Those of the `top` left singular vectors of W + ΔW whose |cosine| with all of W's is below `cosine`.

    W and ΔW are (d_out, d_in); both are decomposed whole, in float64, so it takes time.
    """
    before = torch.linalg.svd(weight.double(), full_matrices=False).U
    u, s, vt = torch.linalg.svd(weight.double() + change.double(), full_matrices=False)
    nearest = (before.T @ u[:, :top]).abs().amax(dim=0)
    at = (nearest < cosine).nonzero().flatten()
    return Intruders(at=tuple(at.tolist()), u=u[:, at], s=s[at], vt=vt[at])


@torch.no_grad()
def intruders(nested: NestedLoRA, *, top: int = TOP, cosine: float = COSINE) -> dict[str, tuple[int, ...]]:
    """The intruder dimensions of the slow pair at every layer."""
    pairs = {path: (layer, layer.slow.factors()) for path, layer in nested.layers.items()}
    return {path: _of(*pair, top=top, cosine=cosine).at for path, pair in pairs.items()}


@torch.no_grad()
def soften(layer: NestedLoRALinear, pair: Factors, left: float) -> tuple[Factors, int]:
    """`pair` with its intruders at `left` of their strength, and how many they are.

    B A - (1 - left) Σ u σ vᵀ / scaling, which is one rank more for each.
    """
    found, (a, b) = _of(layer, pair), pair
    away = (left - 1) / layer.scaling * found.u * found.s
    softened = torch.cat([a, found.vt.to(a.dtype)]), torch.cat([b, away.to(b.dtype)], dim=1)
    return softened, len(found.at)


def _of(layer: NestedLoRALinear, pair: Factors, *, top: int = TOP, cosine: float = COSINE) -> Intruders:
    a, b = pair
    return intruder_dimensions(layer.base.weight, layer.scaling * b.double() @ a.double(), top=top, cosine=cosine)


__all__ = ["Intruders", "intruder_dimensions", "intruders", "soften"]
