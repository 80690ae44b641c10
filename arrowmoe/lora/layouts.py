"""What is laid out at one module for the batches that run: copies of adapters, kept while the same rows use them.

A batch whose rows come and go hands its layouts on (`Plan.followed_by`), and only what changed is written anew.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from arrowmoe.lora.grouped import Pieces
from evolution.gated import ByRow, LowRank

RowChoice = tuple[tuple[LowRank, float], ...]
"""The adapters of one row with their gates."""


class RowBuffer:
    """Room for the adapters of some rows; a row is written only if what it chose is not what stands there."""

    def __init__(self) -> None:
        self._a: Tensor | None = None
        self._b: Tensor | None = None
        self._held: list[RowChoice] = []

    @property
    def nbytes(self) -> int:
        """Bytes of the copies."""
        return sum(tensor.nbytes for tensor in (self._a, self._b) if tensor is not None)

    def lay(self, rows: Sequence[RowChoice]) -> ByRow:
        """The layout for `rows`; it lies in this buffer, so it holds until the next call."""
        rank = max(map(_rank, rows))
        a, b = self._room(len(rows), rank, next(adapter for row in rows for adapter, _ in row))
        del self._held[len(rows) :]
        for at, row in enumerate(rows):
            if at == len(self._held):
                self._held.append(row)
            elif self._held[at] == row:
                continue
            self._held[at] = row
            _write(a[at], b[at], row)
        return ByRow(a=a[: len(rows), :rank].transpose(1, 2), b=b[: len(rows), :rank])

    def _room(self, rows: int, rank: int, like: LowRank) -> tuple[Tensor, Tensor]:
        """Buffers of at least that many rows and ranks; growing by half again, so that joining rows rarely move all."""
        if self._a is not None and self._b is not None:
            had, had_rank = self._a.shape[:2]
            if had >= rows and had_rank >= rank:
                return self._a, self._b
            rows, rank = (max(rows, had + had // 2) if rows > had else had), max(rank, had_rank)
        self._held.clear()
        self._a = like.a.new_empty((rows, rank, like.a.shape[1]))
        self._b = like.b.new_empty((rows, rank, like.b.shape[1]))
        return self._a, self._b


class ModuleLayouts:
    """The layouts of one module."""

    def __init__(self) -> None:
        self._rows = RowBuffer()
        self._pieces = Pieces()
        self._adapters: list[LowRank] = []
        self._a: Tensor | None = None
        self._b: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the copies; a single adapter is not copied."""
        own = (self._a, self._b) if len(self._adapters) > 1 else ()
        return self._rows.nbytes + self._pieces.nbytes + sum(tensor.nbytes for tensor in own if tensor is not None)

    def by_row(self, rows: Sequence[RowChoice]) -> ByRow:
        """Each row's adapters, in row order."""
        return self._rows.lay(rows)

    def pieces(self, adapters: Sequence[LowRank]) -> Tensor:
        """Where the grouped layout finds `adapters`."""
        return self._pieces.of(adapters)

    def concatenated(self, adapters: Sequence[LowRank]) -> tuple[Tensor, Tensor]:
        """A (Σr, d_in) and B (Σr, d_out) of `adapters`, one after another."""
        if self._a is None or self._b is None or self._adapters != list(adapters):
            self._adapters = list(adapters)
            self._a = _joined([adapter.a for adapter in adapters])
            self._b = _joined([adapter.b for adapter in adapters])
        return self._a, self._b


def _write(a: Tensor, b: Tensor, row: RowChoice) -> None:
    start = 0
    for adapter, gate in row:
        end = start + adapter.rank
        a[start:end] = adapter.a
        torch.mul(adapter.b, gate * adapter.scaling, out=b[start:end])
        start = end
    a[start:] = 0
    b[start:] = 0


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _rank(row: RowChoice) -> int:
    return sum(adapter.rank for adapter, _ in row)
