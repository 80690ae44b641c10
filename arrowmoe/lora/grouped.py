"""The grouped layout: units that chose the same adapters share tiles, and adapters are read where they are.

What a batch's gates say (`Groups`) is shared by all modules whose adapters have the same ranks; a module adds only the
addresses of its own adapters (`Pieces`). All tables are made on the host when a plan is first used, so a forward pass
waits for nothing. It is computed by our own kernels, on CUDA devices only (`arrowmoe.lora.triton_kernels`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from itertools import accumulate
from types import ModuleType

import torch
from torch import Tensor

from evolution.gated import LowRank
from registry.logs import get_logger

log = get_logger(__name__)

RANKS = 16  # of an adapter in one piece: the least that a tensor core multiplies
TILE = 16  # positions that units are put together for


@dataclass(frozen=True, kw_only=True, eq=False)
class Groups:
    """Who chose what: units (rows or tokens) sorted by choice, cut into tiles of at most `together` units.

    `order` (places,) are the units that chose anything. `tiles` (tiles, 4): first place, places, first entry, entries.
    `entries` are numbers of pieces. `factors` (places, most pieces of a unit), fp32: gate · scaling by piece.
    """

    order: Tensor
    tiles: Tensor
    entries: Tensor
    factors: Tensor
    together: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Grouped:
    """The groups of a batch, and one module's `pieces` (pieces, 4): addresses of A and B, the rank, the ranks left."""

    groups: Groups
    pieces: Tensor


class Pieces:
    """The table of one module's adapters, kept while they are the same; it keeps what it points to alive."""

    def __init__(self) -> None:
        self._adapters: list[LowRank] = []
        self._pointed_to: list[tuple[Tensor, Tensor]] = []
        self._table: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the table and of adapters that had to be copied."""
        if self._table is None:
            return 0
        return self._table.nbytes + sum(map(_copied, self._pointed_to, self._adapters))

    def of(self, adapters: Sequence[LowRank]) -> Tensor:
        """The table of `adapters`."""
        if self._table is None or self._adapters != list(adapters):
            self._adapters = list(adapters)
            self._pointed_to = [(_aligned(one.a), _aligned(one.b.T)) for one in adapters]
            rows = [row for a, b in self._pointed_to for row in _pieces(a, b)]
            self._table = torch.tensor(rows, dtype=torch.int64, device=adapters[0].a.device)
        return self._table


def together(tokens: int) -> int:
    """How many units of `tokens` each share a tile, if they chose the same."""
    return max(1, TILE // tokens)


def form_groups(
    values: Tensor, ranks: Sequence[int], scalings: Sequence[float], *, together: int, device: torch.device
) -> Groups:
    """The groups for gates `values` (units, adapters), which are on the host and not all zero."""
    pieces = [-(-rank // RANKS) for rank in ranks]
    ends = list(accumulate(pieces))
    order: list[Tensor] = []
    factors: list[Tensor] = []
    tiles: list[tuple[int, int, int, int]] = []
    entries: list[int] = []
    place = 0
    for units, chosen in _choices(values):
        own = [piece for k in chosen for piece in range(ends[k] - pieces[k], ends[k])]
        scaled = values[units][:, chosen] * values.new_tensor([scalings[k] for k in chosen])
        factors.append(scaled.repeat_interleave(torch.tensor([pieces[k] for k in chosen]), dim=1))
        for at in range(0, len(units), together):
            tiles.append((place + at, min(together, len(units) - at), len(entries), len(own)))
        order.append(units)
        entries += own
        place += len(units)
    return Groups(
        order=torch.cat(order).to(device, torch.int32),
        tiles=torch.tensor(tiles, dtype=torch.int32, device=device),
        entries=torch.tensor(entries, dtype=torch.int32, device=device),
        factors=_stacked(factors).to(device, torch.float32),
        together=together,
    )


def usable(device: torch.device) -> bool:
    """Whether `device` can compute this layout: CUDA from compute capability 8.0 on, and Triton imports."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0) and _kernels() is not None


def add_grouped(y: Tensor, x: Tensor, layout: Grouped, units: int) -> Tensor:
    """Add to y (rows, …, d_out), in place, the gated sum at x (rows, …, d_in), cut in `units`."""
    groups = layout.groups
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    torch.ops.arrowmoe.add_grouped(
        y.view(-1, y.shape[-1]),
        flat,
        layout.pieces,
        groups.order,
        groups.tiles,
        groups.entries,
        groups.factors,
        groups.together,
        flat.shape[0] // units,
    )
    return y


# One operation to torch, so that `torch.compile` traces it whole; on the CPU only Triton's interpreter computes it.
_LIBRARY = torch.library.Library("arrowmoe", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "add_grouped(Tensor(a!) y, Tensor x, Tensor pieces, Tensor order, Tensor tiles, Tensor entries, Tensor factors, "
    "int together, int tokens) -> ()"
)


@torch.library.impl(_LIBRARY, "add_grouped", "CUDA")
@torch.library.impl(_LIBRARY, "add_grouped", "CPU")
def _launch(
    y: Tensor,
    x: Tensor,
    pieces: Tensor,
    order: Tensor,
    tiles: Tensor,
    entries: Tensor,
    factors: Tensor,
    together: int,
    tokens: int,
) -> None:
    kernels = _kernels()
    assert kernels is not None, "expected Triton, which `usable` asks for"
    groups = Groups(order=order, tiles=tiles, entries=entries, factors=factors, together=together)
    kernels.launch(y, x, pieces, groups, tokens)


@torch.library.register_fake("arrowmoe::add_grouped", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _traced(y: Tensor, *_: object) -> None:
    """Nothing but y changes."""


@cache
def _kernels() -> ModuleType | None:
    """The kernels, imported at the first need: Triton comes with torch for CUDA alone, and takes long to import."""
    try:
        return import_module("arrowmoe.lora.triton_kernels")
    except ImportError as error:
        log.info("triton_unavailable", error=repr(error))
        return None


def _copied(pointed_to: tuple[Tensor, Tensor], adapter: LowRank) -> int:
    """Bytes of what does not lie where the adapter does."""
    pairs = zip(pointed_to, (adapter.a, adapter.b), strict=True)
    return sum(new.nbytes for new, old in pairs if new.data_ptr() != old.data_ptr())


def _choices(values: Tensor) -> Iterator[tuple[Tensor, list[int]]]:
    """The units with the same non-zero gates, and the adapters that they chose, which are some."""
    patterns, pattern_of, counts = torch.unique(values != 0, dim=0, return_inverse=True, return_counts=True)
    together = pattern_of.argsort(stable=True).split(counts.tolist())
    for units, pattern in zip(together, patterns, strict=True):
        if chosen := pattern.nonzero().flatten().tolist():
            yield units, chosen


def _stacked(factors: Sequence[Tensor]) -> Tensor:
    """Zeros on the right of all but the widest."""
    width = max(one.shape[1] for one in factors)
    return torch.cat([torch.nn.functional.pad(one, (0, width - one.shape[1])) for one in factors])


def _aligned(tensor: Tensor) -> Tensor:
    """`tensor` where the kernels can read it: contiguous, at a multiple of 16 bytes, as what was copied to CUDA is."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def _pieces(a: Tensor, b: Tensor) -> list[tuple[int, int, int, int]]:
    """At every 16th rank of A (rank, d_in) and B (d_out, rank): their addresses, the rank, and how many are left."""
    rank = a.shape[0]
    return [(a[start:].data_ptr(), b[:, start:].data_ptr(), rank, rank - start) for start in range(0, rank, RANKS)]


__all__ = ["RANKS", "TILE", "Grouped", "Groups", "Pieces", "add_grouped", "form_groups", "together", "usable"]
