"""A plan: the gates of one batch, and the adapters laid out for it, module by module, when they are first needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from arrowmoe.errors import GateError
from arrowmoe.lora.costs import CPU, Layout, Prices
from arrowmoe.lora.grouped import Grouped, add_grouped
from arrowmoe.lora.layouts import ModuleLayouts
from arrowmoe.lora.mixing import Form, Mixing
from arrowmoe.lora.slots import Slot
from evolution import gated
from evolution.gated import ByRow, Concatenated, LowRank, Segment

Way = Callable[[Tensor, Tensor], Tensor]
"""Adds to y (rows, …, d_out), in place, for an input x (rows, …, d_in)."""


class Plan:
    """The gates of one batch: `adapters` are slot keys, `gates` is on the model's device.

    `gates` are (rows, adapters), or (rows, tokens, adapters) where every token chooses, for forward passes over just
    as many tokens. `layers` gives modules under a path prefix gates of their own (MoLE, arXiv:2404.13628); the longest
    prefix wins. What no row chose is not computed.

    What a plan lays out is kept, so the steps of one generation share it, and a batch whose rows come and go hands it
    on (`followed_by`). `gates` may require a gradient, which the concatenated layout passes on; it alone is then used.
    """

    def __init__(
        self,
        adapters: tuple[str, ...],
        gates: Tensor,
        *,
        layers: Mapping[str, Tensor] | None = None,
        prices: Prices = CPU,
    ) -> None:
        if gates.dim() not in (2, 3) or gates.shape[-1] != len(adapters):
            raise GateError(f"expected gates (rows[, tokens], {len(adapters)}), got {tuple(gates.shape)}")
        self.adapters = adapters
        self.gates = gates
        self.rows = gates.shape[0]
        self.tokens = gates.shape[1] if gates.dim() == 3 else None
        self.prices = prices
        values = gates.detach().float().cpu()
        chosen = values.flatten(0, -2).any(dim=0) | gates.requires_grad
        self._used = {adapters[k]: k for k in chosen.nonzero().flatten().tolist()}
        self._values = values
        self._mixings: dict[Form, Mixing] = {}
        self._shares: dict[str, Share | None] = {}
        self._layouts: dict[str, ModuleLayouts] | None = None
        self._layers = {layer: Plan(adapters, own, prices=prices) for layer, own in (layers or {}).items()}
        for layer, plan in self._layers.items():
            if plan.rows != self.rows:
                raise GateError(f"layer {layer!r}: expected gates for {self.rows} rows, got {plan.rows}")
        self._take_over({})

    def followed_by(
        self, adapters: tuple[str, ...], gates: Tensor, *, layers: Mapping[str, Tensor] | None = None
    ) -> Plan:
        """The plan of the next steps, in which rows have come or gone: only rows that changed are laid out anew.

        A row that leaves is best replaced by the last one, for others then keep their places. This plan cannot run any
        more: its layouts are overwritten.
        """
        following = Plan(adapters, gates, layers=layers, prices=self.prices)
        following._take_over(self._handed_on())
        self._take_over(None)
        self._shares.clear()
        return following

    @property
    def nbytes(self) -> int:
        """Bytes of what is laid out."""
        return sum(layouts.nbytes for layouts in (self._layouts or {}).values())

    def at(self, path: str, slots: Mapping[str, Slot]) -> Share | None:
        """What the batch's adapters add at the module `path`, which has `slots`; None if none of them has one there."""
        if path not in self._shares:
            self._shares[path] = self._plan_of(path)._share(path, slots)
        return self._shares[path]

    def mixing(self, form: Form) -> Mixing:
        """How the gates mix adapters of that form."""
        return _kept(self._mixings, form, lambda: Mixing(self.gates, self._values, form))

    def gated_sum(self, slots: Sequence[tuple[int, Slot]], of: Callable[[Slot], Tensor | None]) -> Tensor | None:
        """Σₖ gₖ vₖ over the vectors v (d,) that `of` finds in the slots: (rows[, tokens], d), or None."""
        vectors = [(index, vector) for index, slot in slots if (vector := of(slot)) is not None]
        if not vectors:
            return None
        return self.gates[..., [index for index, _ in vectors]] @ torch.stack([vector for _, vector in vectors])

    def _plan_of(self, path: str) -> Plan:
        over = [layer for layer in self._layers if f"{path}.".startswith(f"{layer}.")]
        return self._layers[max(over, key=len)] if over else self

    def _share(self, path: str, slots: Mapping[str, Slot]) -> Share | None:
        present = [(index, slots[key]) for key, index in self._used.items() if key in slots]
        return Share(self, path, present, _kept(self._handed_on(), path, ModuleLayouts)) if present else None

    def _take_over(self, layouts: dict[str, ModuleLayouts] | None) -> None:
        """Lay out in `layouts` from now on, by module path; None: never again."""
        self._layouts = layouts
        for plan in self._layers.values():
            plan._take_over(layouts)

    def _handed_on(self) -> dict[str, ModuleLayouts]:
        if self._layouts is None:
            raise GateError("expected the plan of the batch as it is now, got one that another plan has followed")
        return self._layouts


class Share:
    """What the adapters of one batch add at one module."""

    def __init__(self, plan: Plan, path: str, slots: Sequence[tuple[int, Slot]], layouts: ModuleLayouts) -> None:
        # Copied, not reached through the plan: a cycle would keep layouts and adapters until the collector runs.
        self._positions = (plan.rows,) if plan.tokens is None else (plan.rows, plan.tokens)
        self._prices = plan.prices
        self._path = path
        self._layouts = layouts
        low_ranks = [(index, slot.low_rank) for index, slot in slots if slot.low_rank is not None]
        self._adapters: list[LowRank] = [low_rank for _, low_rank in low_ranks]
        self._mixing = plan.mixing(Form.of(low_ranks))
        self._differentiable = plan.gates.requires_grad or any(one.a.requires_grad for one in self._adapters)
        self._rescale = plan.gated_sum(slots, lambda slot: slot.rescale)
        self._bias = plan.gated_sum(slots, lambda slot: slot.bias)
        self.rescales = self._rescale is not None
        self._ways: dict[tuple[torch.Size, bool], Way] = {}
        self._concatenated: Concatenated | None = None
        self._by_row: ByRow | None = None
        self._segments: list[Segment] | None = None
        self._pieces: Tensor | None = None

    def add(self, y: Tensor, x: Tensor, base_bias: Tensor | None = None) -> Tensor:
        """Add to the base's output y (rows, …, d_out) for its input x (rows, …, d_in); y is overwritten.

        `base_bias` is the base's own; it is looked at only where the share `rescales`.
        """
        shape = (x.shape, y.requires_grad)
        way = self._ways.get(shape)  # a decode step has one shape, and many modules: what is decided is kept
        if way is None:
            way = self._ways[shape] = self._way(x, y)
        if self._rescale is None and self._bias is None:
            return way(y, x)
        change = self._vector_change(y, base_bias)
        return way(y, x).add_(change)

    def concatenated(self) -> Concatenated:
        """The concatenated layout."""
        if self._concatenated is None:
            a, b = self._layouts.concatenated(self._adapters)
            self._concatenated = Concatenated(a=a, b=b, coefficients=self._mixing.coefficients())
        return self._concatenated

    def check_rows(self, positions: Sequence[int]) -> None:
        """Raise `GateError` unless `positions`, (rows, …), are the batch's, without which gates have no meaning."""
        expected = self._positions
        if tuple(positions[: len(expected)]) != expected:
            what = f"{expected[0]} rows" + "".join(f" of {tokens} tokens" for tokens in expected[1:])
            raise GateError(
                f"module {self._path!r}: expected an input of {what}, got {tuple(positions)}, "
                "so its rows cannot be told apart"
            )

    def _way(self, x: Tensor, y: Tensor) -> Way:
        """How the low-rank part is added for inputs of this shape. Raises `GateError` where it is not the batch's."""
        self.check_rows(x.shape[:-1])
        if not self._adapters:
            return lambda y, x: y
        layout, units = self._layout(x, y), self._mixing.units
        if layout == "by_row":
            rows = self._in_rows()
            return lambda y, x: gated.add_by_row(y, x, rows)
        if layout == "segmented":
            segments = self._in_segments()
            return lambda y, x: gated.add_segments(y, x, segments, units)
        if layout == "grouped":
            groups = self._in_groups(x)
            return lambda y, x: add_grouped(y, x, groups, units)
        joined = self.concatenated()
        return lambda y, x: gated.add_joined(y, x, joined)

    def _layout(self, x: Tensor, y: Tensor) -> Layout:
        if self._differentiable or y.requires_grad:
            return "concatenated"
        tokens = x.numel() // (x.shape[0] * x.shape[-1])
        return self._mixing.cheapest(tokens, x.shape[-1] + y.shape[-1], self._prices)

    def _in_rows(self) -> ByRow:
        if self._by_row is None:
            self._by_row = self._layouts.by_row(self._mixing.rows(self._adapters))
        return self._by_row

    def _in_segments(self) -> list[Segment]:
        if self._segments is None:
            self._segments = self._mixing.segments(self._adapters)
        return self._segments

    def _in_groups(self, x: Tensor) -> Grouped:
        if self._pieces is None:
            self._pieces = self._layouts.pieces(self._adapters)
        tokens = x.numel() // (self._mixing.units * x.shape[-1])
        return Grouped(groups=self._mixing.groups(tokens), pieces=self._pieces)

    def _vector_change(self, y: Tensor, base_bias: Tensor | None) -> Tensor:
        """DoRA's rescaling of the base output without its bias, plus the change of bias; there is one of them."""
        change = torch.zeros_like(y) if self._bias is None else _spread(self._bias, y).expand_as(y)
        if self._rescale is None:
            return change
        return torch.addcmul(change, _spread(self._rescale, y), y if base_bias is None else y - base_bias)


def _spread(vectors: Tensor, like: Tensor) -> Tensor:
    """(rows[, tokens], d) → (rows[, tokens], 1 …, d) with as many dimensions as `like`."""
    *units, d = vectors.shape
    return vectors.view(*units, *[1] * (like.dim() - len(units) - 1), d)


_K = TypeVar("_K")
_V = TypeVar("_V")


def _kept(store: dict[_K, _V], key: _K, make: Callable[[], _V]) -> _V:
    if key not in store:
        store[key] = make()
    return store[key]
