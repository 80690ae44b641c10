"""A plan: the gates of one batch, and the adapters laid out for it, module by module, when they are first needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from arrowmoe.errors import GateError
from arrowmoe.lora import kernels
from arrowmoe.lora.kernels import ByRow, Concatenated, LowRank
from arrowmoe.lora.layer import LoRABias, LoRALinear, Slot, Wrapper


class _Shape(NamedTuple):
    """What decides a layout's coefficients: each adapter's rank (0 = absent here) and scaling."""

    ranks: tuple[int, ...]
    scalings: tuple[float, ...]


class Plan:
    """Lays adapters out for one batch; `adapters` are slot keys, `gates` is (rows, adapters) on the model's device.

    Layouts are kept for the plan's lifetime, so the steps of one generation share them. `gates` may require a
    gradient: the concatenated layout passes it on, the by-row layout (which multiplies gates in beforehand) is then
    not used.
    """

    def __init__(self, adapters: tuple[str, ...], gates: Tensor) -> None:
        if gates.dim() != 2 or gates.shape[1] != len(adapters):
            raise GateError(f"expected gates (rows, {len(adapters)}), got {tuple(gates.shape)}")
        self.adapters = adapters
        self.gates = gates
        self.rows = gates.shape[0]
        values = gates.detach().float().cpu()
        self._chosen = [[(k, float(row[k])) for k in row.nonzero().flatten().tolist()] for row in values]
        self._uniform = bool((values == values[:1]).all()) and not gates.requires_grad
        self._shapes: dict[str, _Shape] = {}
        self._row_ranks: dict[tuple[int, ...], int] = {}
        self._coefficients: dict[_Shape, Tensor | float] = {}
        self._concatenated: dict[str, Concatenated] = {}
        self._by_row: dict[str, ByRow] = {}
        self._vectors: dict[str, tuple[Tensor | None, Tensor | None]] = {}

    def is_empty(self, module: Wrapper) -> bool:
        """Whether none of the batch's adapters has a slot at `module`."""
        return not any(key in module.slots for key in self.adapters)

    def check_rows(self, module: Wrapper, x: Tensor) -> None:
        """Raise `GateError` unless x's first dimension is the batch's rows, without which gates have no meaning."""
        if x.dim() < 2 or x.shape[0] != self.rows:
            raise GateError(
                f"module {module.path!r}: expected an input of {self.rows} rows, got shape {tuple(x.shape)}, "
                "so its rows cannot be told apart"
            )

    def has_low_rank(self, module: Wrapper) -> bool:
        """Whether any adapter of the batch has a B A at `module`."""
        return any(self._shape(module).ranks)

    def prefers_rows(self, module: Wrapper, x: Tensor) -> bool:
        """Whether the by-row layout is the cheaper one for an input x (rows, …, d_in)."""
        if self.gates.requires_grad:
            return False
        ranks = self._shape(module).ranks
        return kernels.prefer_rows(self.rows, x[0].numel() // x.shape[-1], sum(ranks), self._row_rank(ranks))

    def concatenated(self, module: Wrapper) -> Concatenated:
        """The concatenated layout at `module`."""
        return _kept(self._concatenated, module.path, lambda: self._concatenate(module))

    def by_row(self, module: Wrapper) -> ByRow:
        """The by-row layout at `module`."""
        return _kept(self._by_row, module.path, lambda: self._lay_by_row(module))

    def vectors(self, module: LoRALinear | LoRABias) -> tuple[Tensor | None, Tensor | None]:
        """Gated sums of the adapters' `rescale` and `bias` at `module`, each (rows, d_out) or None."""
        return _kept(
            self._vectors,
            module.path,
            lambda: (
                self._gated_sum(module, lambda slot: slot.rescale),
                self._gated_sum(module, lambda slot: slot.bias),
            ),
        )

    def _slots(self, module: Wrapper) -> list[tuple[int, LowRank]]:
        found = ((index, module.slots.get(key)) for index, key in enumerate(self.adapters))
        return [(index, slot.low_rank) for index, slot in found if slot is not None and slot.low_rank is not None]

    def _shape(self, module: Wrapper) -> _Shape:
        return _kept(self._shapes, module.path, lambda: self._shape_of(module))

    def _shape_of(self, module: Wrapper) -> _Shape:
        ranks, scalings = [0] * len(self.adapters), [0.0] * len(self.adapters)
        for index, low_rank in self._slots(module):
            ranks[index], scalings[index] = low_rank.rank, low_rank.scaling
        return _Shape(tuple(ranks), tuple(scalings))

    def _row_rank(self, ranks: tuple[int, ...]) -> int:
        return _kept(
            self._row_ranks, ranks, lambda: max((sum(ranks[k] for k, _ in row) for row in self._chosen), default=0)
        )

    def _concatenate(self, module: Wrapper) -> Concatenated:
        shape = self._shape(module)
        coefficients = _kept(self._coefficients, shape, lambda: self._expand(shape))
        return kernels.concatenate([low_rank for _, low_rank in self._slots(module)], coefficients)

    def _expand(self, shape: _Shape) -> Tensor | float:
        """G · s with each adapter's column repeated rank times: (rows, Σr), or one number if that is all there is."""
        present = [index for index, rank in enumerate(shape.ranks) if rank]
        if self._uniform and len(present) == 1:
            return float(self.gates[0, present[0]]) * shape.scalings[present[0]]
        scaled = self.gates[:, present] * self.gates.new_tensor([shape.scalings[index] for index in present])
        return scaled.repeat_interleave(torch.tensor([shape.ranks[i] for i in present], device=scaled.device), dim=1)

    def _lay_by_row(self, module: Wrapper) -> ByRow:
        slots = self._slots(module)
        position = {index: place for place, (index, _) in enumerate(slots)}
        gates = [[(position[k], weight) for k, weight in row if k in position] for row in self._chosen]
        rank = self._row_rank(self._shape(module).ranks)
        return kernels.lay_by_row([low_rank for _, low_rank in slots], gates, rank, slots[0][1].a)

    def _gated_sum(self, module: Wrapper, of: Callable[[Slot], Tensor | None]) -> Tensor | None:
        found = [(index, module.slots.get(key)) for index, key in enumerate(self.adapters)]
        vectors = [(index, of(slot)) for index, slot in found if slot is not None]
        present = [(index, vector) for index, vector in vectors if vector is not None]
        if not present:
            return None
        return self.gates[:, [index for index, _ in present]] @ torch.stack([vector for _, vector in present])


_K = TypeVar("_K")
_V = TypeVar("_V")


def _kept(store: dict[_K, _V], key: _K, make: Callable[[], _V]) -> _V:
    if key not in store:
        store[key] = make()
    return store[key]
