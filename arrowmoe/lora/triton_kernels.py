"""The grouped layout as two Triton kernels: the only file that imports Triton, and it is imported where CUDA runs.

    hidden = ((x · Aᵀ) ⊙ (G · s))        `_shrink`, for each tile of positions and each piece of an adapter
    y += Σ over the tile's pieces of hidden · B        `_expand`, for each tile of positions and block of outputs

Adapters are read where they are, through their addresses; a piece is up to `RANKS` ranks of one, so unequal ranks cost
what they are. One program alone writes an output and adds its pieces in order: no atomic operations, so the same batch
gives the same bits. Sums are in fp32. Shapes and tables: `arrowmoe.lora.grouped`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from arrowmoe.lora.grouped import RANKS, Groups

BLOCK_K = 64


@triton.jit
def _positions(order, tiles, tokens, BLOCK_M: tl.constexpr):
    """The tile's positions: places in `order` × tokens, the rows of the flat x and y that they are, and which exist."""
    tile = tiles + 4 * tl.program_id(0)
    at = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    exist = at < tl.load(tile + 1) * tokens
    place = tl.load(tile) + at // tokens
    row = tl.load(order + place, mask=exist, other=0).to(tl.int64) * tokens + at % tokens
    return place, place.to(tl.int64) * tokens + at % tokens, row, exist


@triton.jit
def _shrink(
    hidden, x, pieces, order, tiles, entries, factors, tokens, width, d_in,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, RANKS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    nth = tl.program_id(2)
    tile = tiles + 4 * tl.program_id(0)
    if nth >= tl.load(tile + 3):
        return
    place, position, row, exist = _positions(order, tiles, tokens, BLOCK_M)
    piece = pieces + 4 * tl.load(entries + tl.load(tile + 2) + nth)
    a = tl.multiple_of(tl.load(piece).to(tl.pointer_type(x.dtype.element_ty)), 16)
    ranks = tl.arange(0, RANKS)
    has_rank = ranks < tl.load(piece + 3)
    total = tl.zeros((BLOCK_M, RANKS), dtype=tl.float32)
    for start in range(0, d_in, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = k < d_in
        own = tl.load(x + row[:, None] * d_in + k[None, :], mask=exist[:, None] & inside[None, :], other=0.0)
        down = tl.load(a + ranks[None, :] * d_in + k[:, None], mask=has_rank[None, :] & inside[:, None], other=0.0)
        if WIDEN:
            own, down = own.to(tl.float32), down.to(tl.float32)
        total = tl.dot(own, down, total, input_precision="ieee")
    total *= tl.load(factors + place * width + nth, mask=exist, other=0.0)[:, None]
    out = hidden + (position[:, None] * width + nth) * RANKS + ranks[None, :]
    tl.store(out, total.to(hidden.dtype.element_ty), mask=exist[:, None])


@triton.jit
def _expand(
    y, hidden, pieces, order, tiles, entries, tokens, width, d_out,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RANKS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    _, position, row, exist = _positions(order, tiles, tokens, BLOCK_M)
    tile = tiles + 4 * tl.program_id(0)
    entry = tl.load(tile + 2)
    n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < d_out
    ranks = tl.arange(0, RANKS)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for nth in range(tl.load(tile + 3)):
        piece = pieces + 4 * tl.load(entries + entry + nth)
        b = tl.load(piece + 1).to(tl.pointer_type(y.dtype.element_ty))
        rank = tl.load(piece + 2)
        has_rank = ranks < tl.load(piece + 3)
        low = tl.load(
            hidden + (position[:, None] * width + nth) * RANKS + ranks[None, :], mask=exist[:, None], other=0.0
        )
        up = tl.load(b + n[None, :] * rank + ranks[:, None], mask=has_rank[:, None] & inside[None, :], other=0.0)
        if WIDEN:
            low, up = low.to(tl.float32), up.to(tl.float32)
        total = tl.dot(low, up, total, input_precision="ieee")
    out = y + row[:, None] * d_out + n[None, :]
    mask = exist[:, None] & inside[None, :]
    total += tl.load(out, mask=mask, other=0.0).to(tl.float32)
    tl.store(out, total.to(y.dtype.element_ty), mask=mask)


# Triton's interpreter holds bf16 as integers and cannot multiply them; on a device, products of bf16 are exact in fp32.
WIDEN = not isinstance(_shrink, triton.runtime.JITFunction)


def launch(y: Tensor, x: Tensor, pieces: Tensor, groups: Groups, tokens: int) -> None:
    """Add to y (positions, d_out), in place, the grouped sum at x (positions, d_in), with `tokens` in each unit."""
    (tiles, _), (places, width) = groups.tiles.shape, groups.factors.shape
    d_in, d_out = x.shape[1], y.shape[1]
    hidden = torch.empty((places * tokens, width * RANKS), dtype=x.dtype, device=x.device)
    block = 64 if tokens >= 64 else 16
    blocks = triton.cdiv(groups.together * tokens, block)
    tables = (pieces, groups.order, groups.tiles, groups.entries)
    wide = 64 if block == 64 else 128
    # Triton launches on the current device, whatever its arguments are on.
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        _shrink[(tiles, blocks, width)](
            hidden, x, *tables, groups.factors, tokens, width, d_in,
            BLOCK_M=block, BLOCK_K=BLOCK_K, RANKS=RANKS, WIDEN=WIDEN,
        )  # fmt: skip
        _expand[(tiles, blocks, triton.cdiv(d_out, wide))](
            y, hidden, *tables, tokens, width, d_out,
            BLOCK_M=block, BLOCK_N=wide, RANKS=RANKS, WIDEN=WIDEN,
        )  # fmt: skip
