"""The gated low-rank sum, in two layouts that give the same numbers.

    y += ((x · Aᵀ) ⊙ (G · s)) · B          G: (rows, adapters) gates, s: (adapters,) scaling

*Concatenated*: the adapters of the batch stand one after another, A (Σr, d_in) and B (Σr, d_out), each read once; every
row computes all of them and its gates zero out what it did not choose. Best for few adapters.

*By row*: each row's own adapters are laid out in row order, A (rows, r, d_in) and B (rows, r, d_out) with G · s already
multiplied in, and two batched products compute just what each row chose. Best for many adapters. `r` is the largest
sum of ranks that one row uses, so a weighted mixture of two adapters works as one adapter of twice the rank.

Which is cheaper is decided from sizes alone (`prefer_rows`); nothing here looks at gate values during a forward pass,
so no device is ever waited for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Reading one element costs about as much as this many multiply-adds (measured on two cores in fp32).
_READ_COST = 10.0


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
    """Adapters in a row: `a` (Σr, d_in), `b` (Σr, d_out), `coefficients` (rows, Σr) or one number for all rows."""

    a: Tensor
    b: Tensor
    coefficients: Tensor | float


@dataclass(frozen=True, kw_only=True, eq=False)
class ByRow:
    """Each row's adapters: `a` (rows, d_in, r) and `b` (rows, r, d_out), gates and scaling multiplied into `b`."""

    a: Tensor
    b: Tensor


def prefer_rows(rows: int, tokens: int, total_rank: int, row_rank: int) -> bool:
    """Whether the by-row layout is cheaper for `tokens` per row; ranks are Σr of the batch and the largest of a row."""
    concatenated = total_rank * (_READ_COST + rows * tokens)
    by_row = rows * row_rank * (_READ_COST + tokens)
    return by_row < concatenated


def concatenate(adapters: Sequence[LowRank], coefficients: Tensor | float) -> Concatenated:
    """Lay adapters out one after another; a single one is not copied."""
    if len(adapters) == 1:
        return Concatenated(a=adapters[0].a, b=adapters[0].b, coefficients=coefficients)
    return Concatenated(
        a=torch.cat([adapter.a for adapter in adapters]),
        b=torch.cat([adapter.b for adapter in adapters]),
        coefficients=coefficients,
    )


def lay_by_row(adapters: Sequence[LowRank], gates: Sequence[Sequence[tuple[int, float]]], rank: int) -> ByRow:
    """Lay adapters out in row order; `gates` lists (adapter, weight) by row, `rank` bounds a row's sum of ranks."""
    rows, d_in, d_out = len(gates), adapters[0].a.shape[1], adapters[0].b.shape[1]
    a = adapters[0].a.new_zeros((rows, rank, d_in))
    b = adapters[0].b.new_zeros((rows, rank, d_out))
    for row, chosen in enumerate(gates):
        start = 0
        for index, weight in chosen:
            adapter = adapters[index]
            end = start + adapter.rank
            a[row, start:end] = adapter.a
            torch.mul(adapter.b, weight * adapter.scaling, out=b[row, start:end])
            start = end
    return ByRow(a=a.transpose(1, 2), b=b)


def add_up(y: Tensor, hidden: Tensor, layout: Concatenated) -> Tensor:
    """Add to y (rows, …, d_out), in place, the up-projection of hidden (rows, …, Σr), gated by the coefficients."""
    alpha = 1.0
    if isinstance(layout.coefficients, float):
        alpha = layout.coefficients
    else:
        rows, rank = layout.coefficients.shape
        hidden = hidden * layout.coefficients.view(rows, *[1] * (hidden.dim() - 2), rank)
    y.view(-1, y.shape[-1]).addmm_(hidden.reshape(-1, hidden.shape[-1]), layout.b, alpha=alpha)
    return y


def add_by_row(y: Tensor, x: Tensor, layout: ByRow) -> Tensor:
    """Add to y (rows, …, d_out), in place, each row's own sum at x (rows, …, d_in)."""
    rows = layout.a.shape[0]
    hidden = torch.bmm(x.reshape(rows, -1, x.shape[-1]), layout.a)
    y.view(rows, -1, y.shape[-1]).baddbmm_(hidden, layout.b)
    return y
