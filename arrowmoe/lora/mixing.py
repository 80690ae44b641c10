"""How the gates of one batch mix adapters of given ranks and scalings: shared by all modules where they are alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from arrowmoe.lora import costs, grouped
from arrowmoe.lora.costs import Layout, Part, Prices, Sizes
from arrowmoe.lora.grouped import Groups
from arrowmoe.lora.layouts import RowChoice
from evolution.gated import LowRank, Segment

Coefficients = Tensor | float


@dataclass(frozen=True, kw_only=True)
class Form:
    """Which adapters (columns of the gates) are present at a module, their ranks and scalings."""

    present: tuple[int, ...]
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]

    @classmethod
    def of(cls, adapters: Sequence[tuple[int, LowRank]]) -> Form:
        """The form of the adapters at one module, each with its column."""
        return cls(
            present=tuple(column for column, _ in adapters),
            ranks=tuple(adapter.rank for _, adapter in adapters),
            scalings=tuple(adapter.scaling for _, adapter in adapters),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Where:
    """The units of one adapter's segment and its coefficients, as in `Segment`."""

    units: slice | Tensor
    coefficients: Coefficients
    count: int


class Mixing:
    """`gates` (rows[, tokens], adapters) on the device, and their `values` on the host, for adapters of one form.

    Everything is worked out at its first use and kept; nothing but the first use waits for a device.
    """

    def __init__(self, gates: Tensor, values: Tensor, form: Form) -> None:
        self._gates = gates
        self._form = form
        self._values = values[..., list(form.present)]
        flat = self._values.flatten(0, -2)
        self.units = flat.shape[0]
        self._one_gate = len(form.present) == 1 and bool((flat == flat[:1]).all()) and not gates.requires_grad
        self._chosen: list[list[tuple[int, float]]] | None = None
        if gates.dim() == 2:
            self._chosen = [[(k, float(row[k])) for k in row.nonzero().flatten().tolist()] for row in flat]
        self._coefficients: Coefficients | None = None
        self._where: list[_Where] | None = None
        self._sizes: Sizes | None = None
        self._cheapest: dict[tuple[int, int], Layout] = {}
        self._groups: dict[int, Groups] = {}

    def coefficients(self) -> Coefficients:
        """G · s with each adapter's column repeated rank times: (rows[, tokens], Σr), or one number for all."""
        if self._coefficients is None:
            self._coefficients = self._expand()
        return self._coefficients

    def rows(self, adapters: Sequence[LowRank]) -> list[RowChoice]:
        """For each row the adapters that it chose, with their gates."""
        assert self._chosen is not None, "gates for each token have no layout by row"
        return [tuple((adapters[at], gate) for at, gate in row) for row in self._chosen]

    def segments(self, adapters: Sequence[LowRank]) -> list[Segment]:
        """Each adapter with the units that chose it."""
        return [
            Segment(a=adapter.a, b=adapter.b, units=where.units, coefficients=where.coefficients)
            for adapter, where in zip(adapters, self._segments(), strict=True)
            if where.count
        ]

    def groups(self, tokens: int) -> Groups:
        """The units by what they chose, for `tokens` in each."""
        together = grouped.together(tokens)
        if together not in self._groups:
            values, form = self._values.flatten(0, -2), self._form
            self._groups[together] = grouped.form_groups(
                values, form.ranks, form.scalings, together=together, device=self._gates.device
            )
        return self._groups[together]

    def cheapest(self, tokens: int, width: int, prices: Prices) -> Layout:
        """The cheapest layout for `tokens` per row at a module with `width` = d_in + d_out."""
        key = (tokens, width)
        if key not in self._cheapest:
            self._cheapest[key] = costs.cheapest(
                self.sizes(), tokens, width, prices, costs.layouts_on(self._gates.device)
            )
        return self._cheapest[key]

    def sizes(self) -> Sizes:
        """What the costs of the layouts depend on."""
        if self._sizes is None:
            self._sizes = self._measured()
        return self._sizes

    def _expand(self) -> Coefficients:
        if self._one_gate:
            return float(self._values.flatten()[0]) * self._form.scalings[0]
        scaled = self._gates[..., list(self._form.present)] * self._gates.new_tensor(self._form.scalings)
        return scaled.repeat_interleave(torch.tensor(self._form.ranks, device=scaled.device), dim=-1)

    def _segments(self) -> list[_Where]:
        if self._where is None:
            columns = self._values.flatten(0, -2).T
            pairs = zip(columns, self._form.scalings, strict=True)
            self._where = [self._place(column, scaling) for column, scaling in pairs]
        return self._where

    def _place(self, column: Tensor, scaling: float) -> _Where:
        """Where the gates (units,) of one adapter are not zero."""
        units = column.nonzero().flatten()
        gates, count = column[units], len(units)
        together = count > 0 and int(units[-1] - units[0]) == count - 1
        return _Where(
            units=slice(int(units[0]), int(units[-1]) + 1) if together else units.to(self._gates.device),
            coefficients=float(gates[0]) * scaling
            if count and bool((gates == gates[0]).all())
            else (gates * scaling).to(self._gates),
            count=count,
        )

    def _measured(self) -> Sizes:
        chosen, ranks = self._chosen, self._form.ranks
        return Sizes(
            rows=self._gates.shape[0],
            row_rank=None if chosen is None else max(sum(ranks[at] for at, _ in row) for row in chosen),
            total_rank=sum(ranks),
            one_gate=self._one_gate,
            parts=[
                Part(
                    rank=rank,
                    units=where.count,
                    together=isinstance(where.units, slice),
                    one_gate=isinstance(where.coefficients, float),
                )
                for rank, where in zip(ranks, self._segments(), strict=True)
            ],
        )
