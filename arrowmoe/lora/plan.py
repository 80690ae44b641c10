"""A plan: the gates of one batch, and the adapters laid out for it, module by module, when they are first needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from arrowmoe.errors import GateError
from arrowmoe.lora import kernels
from arrowmoe.lora.kernels import ByRow, Concatenated, LowRank
from arrowmoe.lora.slots import Slot


@dataclass(frozen=True, kw_only=True)
class _Form:
    """What decides a layout's coefficients: which adapters are present at a module, their ranks and scalings."""

    present: tuple[int, ...]
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]


class Plan:
    """The gates of one batch: `adapters` are slot keys, `gates` (rows, adapters) is on the model's device.

    What it lays out is kept, so the steps of one generation share it. `gates` may require a gradient, which the
    concatenated layout passes on; the by-row layout, which multiplies gates in beforehand, is then not used.
    `layers` gives modules under a path prefix gates of their own (MoLE, arXiv:2404.13628); the longest prefix wins.
    """

    def __init__(self, adapters: tuple[str, ...], gates: Tensor, *, layers: Mapping[str, Tensor] | None = None) -> None:
        if gates.dim() != 2 or gates.shape[1] != len(adapters):
            raise GateError(f"expected gates (rows, {len(adapters)}), got {tuple(gates.shape)}")
        self.adapters = adapters
        self.gates = gates
        self.rows = gates.shape[0]
        values = gates.detach().float().cpu()
        self._chosen = [[(k, float(row[k])) for k in row.nonzero().flatten().tolist()] for row in values]
        self._uniform = bool((values == values[:1]).all()) and not gates.requires_grad
        self._shares: dict[str, Share | None] = {}
        self._coefficients: dict[_Form, Tensor | float] = {}
        self._layers = {layer: Plan(adapters, own) for layer, own in (layers or {}).items()}
        for layer, plan in self._layers.items():
            if plan.rows != self.rows:
                raise GateError(f"layer {layer!r}: expected gates for {self.rows} rows, got {plan.rows}")

    def at(self, path: str, slots: Mapping[str, Slot]) -> Share | None:
        """What the batch's adapters add at the module `path`, which has `slots`; None if none of them has one there."""
        return _kept(self._shares, path, lambda: self._plan_of(path)._share(path, slots))

    def coefficients(self, form: _Form) -> Tensor | float:
        """G · s with each adapter's column repeated rank times: (rows, Σr), or one number if that is all there is."""
        return _kept(self._coefficients, form, lambda: self._expand(form))

    def gated_sum(self, slots: Sequence[tuple[int, Slot]], of: Callable[[Slot], Tensor | None]) -> Tensor | None:
        """Σₖ gₖ vₖ over the vectors v (d,) that `of` finds in the slots: (rows, d), or None if there is none."""
        vectors = [(index, vector) for index, slot in slots if (vector := of(slot)) is not None]
        if not vectors:
            return None
        return self.gates[:, [index for index, _ in vectors]] @ torch.stack([vector for _, vector in vectors])

    def rows_of(self, present: Sequence[int]) -> list[list[tuple[int, float]]]:
        """For each row, (place in `present`, weight) of the adapters it uses."""
        place = {index: at for at, index in enumerate(present)}
        return [[(place[index], weight) for index, weight in row if index in place] for row in self._chosen]

    def _plan_of(self, path: str) -> Plan:
        over = [layer for layer in self._layers if f"{path}.".startswith(f"{layer}.")]
        return self._layers[max(over, key=len)] if over else self

    def _share(self, path: str, slots: Mapping[str, Slot]) -> Share | None:
        present = [(index, slots[key]) for index, key in enumerate(self.adapters) if key in slots]
        return Share(self, path, present) if present else None

    def _expand(self, form: _Form) -> Tensor | float:
        if self._uniform and len(form.present) == 1:
            return float(self.gates[0, form.present[0]]) * form.scalings[0]
        scaled = self.gates[:, list(form.present)] * self.gates.new_tensor(form.scalings)
        return scaled.repeat_interleave(torch.tensor(form.ranks, device=scaled.device), dim=1)


class Share:
    """What the adapters of one batch add at one module."""

    def __init__(self, plan: Plan, path: str, slots: Sequence[tuple[int, Slot]]) -> None:
        self._plan = plan
        self._path = path
        low_ranks = [(index, slot.low_rank) for index, slot in slots if slot.low_rank is not None]
        self._adapters: list[LowRank] = [low_rank for _, low_rank in low_ranks]
        self._form = _Form(
            present=tuple(index for index, _ in low_ranks),
            ranks=tuple(low_rank.rank for _, low_rank in low_ranks),
            scalings=tuple(low_rank.scaling for _, low_rank in low_ranks),
        )
        self._chosen = plan.rows_of(self._form.present)
        self._row_rank = max(sum(self._form.ranks[at] for at, _ in row) for row in self._chosen)
        self._total_rank = sum(self._form.ranks)
        self._rescale = plan.gated_sum(slots, lambda slot: slot.rescale)
        self._bias = plan.gated_sum(slots, lambda slot: slot.bias)
        self._concatenated: Concatenated | None = None
        self._by_row: ByRow | None = None

    def add(self, y: Tensor, x: Tensor, base_bias: Tensor | None) -> Tensor:
        """Add to the base's output y (rows, …, d_out) for its input x (rows, …, d_in); y is overwritten."""
        self.check_rows(x)
        change = self._vector_change(y, base_bias)
        if self._adapters:
            y = kernels.add_by_row(y, x, self._in_rows()) if self._prefers_rows(x) else self.add_low_rank(y, x)
        return y if change is None else y.add_(change)

    def add_low_rank(self, y: Tensor, x: Tensor) -> Tensor:
        """Add the low-rank sum alone, by the concatenated layout."""
        layout = self.concatenated()
        return kernels.add_up(y, torch.nn.functional.linear(x, layout.a), layout)

    def concatenated(self) -> Concatenated:
        """The concatenated layout."""
        if self._concatenated is None:
            self._concatenated = kernels.concatenate(self._adapters, self._plan.coefficients(self._form))
        return self._concatenated

    def check_rows(self, x: Tensor) -> None:
        """Raise `GateError` unless x's first dimension is the batch's rows, without which gates have no meaning."""
        if x.dim() < 2 or x.shape[0] != self._plan.rows:
            raise GateError(
                f"module {self._path!r}: expected an input of {self._plan.rows} rows, got shape {tuple(x.shape)}, "
                "so its rows cannot be told apart"
            )

    def _in_rows(self) -> ByRow:
        if self._by_row is None:
            self._by_row = kernels.lay_by_row(self._adapters, self._chosen, self._row_rank)
        return self._by_row

    def _prefers_rows(self, x: Tensor) -> bool:
        """Whether the by-row layout is the cheaper one for x (rows, …, d_in)."""
        if self._total_rank == self._row_rank or self._plan.gates.requires_grad:
            return False
        tokens = x.numel() // (x.shape[0] * x.shape[-1])
        return kernels.prefer_rows(self._plan.rows, tokens, self._total_rank, self._row_rank)

    def _vector_change(self, y: Tensor, base_bias: Tensor | None) -> Tensor | None:
        """DoRA's rescaling of the base output without its bias, plus the change of bias; None if there is neither."""
        if self._rescale is None and self._bias is None:
            return None
        change = torch.zeros_like(y) if self._bias is None else _spread(self._bias, y).expand_as(y)
        if self._rescale is None:
            return change
        return torch.addcmul(change, _spread(self._rescale, y), y if base_bias is None else y - base_bias)


def _spread(vectors: Tensor, like: Tensor) -> Tensor:
    """(rows, d) → (rows, 1 …, d) with as many dimensions as `like`."""
    return vectors.view(vectors.shape[0], *[1] * (like.dim() - 2), vectors.shape[1])


_K = TypeVar("_K")
_V = TypeVar("_V")


def _kept(store: dict[_K, _V], key: _K, make: Callable[[], _V]) -> _V:
    if key not in store:
        store[key] = make()
    return store[key]
