"""The gated low-rank sum, in three layouts that give the same numbers: what the engine infers with and training too.

    y += ((x · Aᵀ) ⊙ (G · s)) · B          G: (rows, adapters) gates, s: (adapters,) scaling

*Concatenated*: the adapters of the batch stand one after another, A (Σr, d_in) and B (Σr, d_out), each read once; every
row computes all of them and its gates zero out what it did not choose. Best for few adapters.

*By row*: each row's own adapters are laid out in row order, A (rows, r, d_in) and B (rows, r, d_out) with G · s already
multiplied in, and two batched products compute just what each row chose. Best for many adapters. `r` is the largest
sum of ranks that one row uses, so a weighted mixture of two adapters works as one adapter of twice the rank.

*Segmented*: each adapter is applied once, to the rows that chose it; nothing is laid out and nothing computed in vain.
Best for many tokens, and for adapters of very different ranks.

Gates may also be (rows, tokens, adapters): every token chooses. Which layout is cheapest the engine decides from sizes
alone; nothing here looks at gate values during a forward pass, so no device is ever waited for. Sums are in place, and
gradients go through the concatenated and the segmented layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class LowRank:
    """One adapter at one module: `a` (r, d_in), `b` (r, d_out), and the factor `scaling` before their product."""

    a: Tensor
    b: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        """Rows of `a` and `b`."""
        return self.a.shape[0]


@dataclass(frozen=True, kw_only=True, eq=False)
class Concatenated:
    """Adapters in a row: `a` (Σr, d_in), `b` (Σr, d_out); `coefficients` (rows[, tokens], Σr) or one number."""

    a: Tensor
    b: Tensor
    coefficients: Tensor | float


@dataclass(frozen=True, kw_only=True, eq=False)
class ByRow:
    """Each row's adapters: `a` (rows, d_in, r) and `b` (rows, r, d_out), gates and scaling multiplied into `b`."""

    a: Tensor
    b: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Segment:
    """One adapter's part of the batch: `units` are rows, or tokens counted through all rows where every token chooses.

    They are a slice, or indices (m,) on the device; `coefficients` G · s are (m,), or one number for all of them.
    """

    a: Tensor
    b: Tensor
    units: slice | Tensor
    coefficients: Tensor | float


def add_up(y: Tensor, hidden: Tensor, layout: Concatenated) -> Tensor:
    """Add to y (rows, …, d_out), in place, the up-projection of hidden (rows, …, Σr), gated by the coefficients."""
    alpha = 1.0
    if isinstance(layout.coefficients, float):
        alpha = layout.coefficients
    elif layout.coefficients.dim() == 3:
        hidden = hidden * layout.coefficients
    else:
        rows, rank = layout.coefficients.shape
        hidden = hidden * layout.coefficients.view(rows, *[1] * (hidden.dim() - 2), rank)
    y.view(-1, y.shape[-1]).addmm_(hidden.reshape(-1, hidden.shape[-1]), layout.b, alpha=alpha)
    return y


def add_joined(y: Tensor, x: Tensor, layout: Concatenated) -> Tensor:
    """Add to y (rows, …, d_out), in place, the gated sum of all adapters at x (rows, …, d_in)."""
    return add_up(y, torch.nn.functional.linear(x, layout.a), layout)


def add_by_row(y: Tensor, x: Tensor, layout: ByRow) -> Tensor:
    """Add to y (rows, …, d_out), in place, each row's own sum at x (rows, …, d_in)."""
    if x.dim() == 3:
        return y.baddbmm_(torch.bmm(x, layout.a), layout.b)
    rows = layout.a.shape[0]
    hidden = torch.bmm(x.reshape(rows, -1, x.shape[-1]), layout.a)
    y.view(rows, -1, y.shape[-1]).baddbmm_(hidden, layout.b)
    return y


def add_segments(y: Tensor, x: Tensor, segments: Sequence[Segment], units: int) -> Tensor:
    """Add to y (rows, …, d_out), in place, each adapter's sum at its own part of x (rows, …, d_in), cut in `units`."""
    x = x.reshape(units, -1, x.shape[-1])
    out = y.view(units, -1, y.shape[-1])
    for segment in segments:
        _add_segment(out, x, segment)
    return y


def _add_segment(out: Tensor, x: Tensor, segment: Segment) -> None:
    own = x[segment.units] if isinstance(segment.units, slice) else x.index_select(0, segment.units)
    hidden, alpha = torch.nn.functional.linear(own, segment.a), 1.0
    if isinstance(segment.coefficients, float):
        alpha = segment.coefficients
    else:
        hidden = hidden * segment.coefficients.view(-1, 1, 1)
    if isinstance(segment.units, slice):
        out[segment.units].view(-1, out.shape[-1]).addmm_(hidden.flatten(0, 1), segment.b, alpha=alpha)
    else:
        out.index_add_(0, segment.units, hidden @ segment.b, alpha=alpha)
