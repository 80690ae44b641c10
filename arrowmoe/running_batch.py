"""Rows that are computed together: their key-value cache, who attends to what, and which adapters each row uses.

Rows come and go between forward passes. All of them end at the same column and are padded on the left: a row that joins
a longer batch, or that is longer itself, moves the others' beginning, never their end. So a mask and positions are all
that tells rows apart, and a sliding window means the same columns for every row. Whoever calls is in inference mode.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from arrowmoe.base_model import BaseModel
from arrowmoe.errors import EngineError
from arrowmoe.generation import pad
from arrowmoe.lora.plan import Plan
from arrowmoe.routing.gates import Gates
from arrowmoe.row_gates import gates_of, prompt_gates_of
from arrowmoe.rows import Row, choose_tokens


class Planning(Protocol):
    """Lays gates out for the rows of a batch (`LoRAManager.plan`)."""

    def __call__(self, gates: Gates, *, after: Plan | None = None) -> Plan | None:
        """A plan that takes over what `after`, the batch's plan before, had laid out; None for the bare base model."""


Running = Callable[[Plan | None], AbstractContextManager[None]]
"""Within it forward passes are computed with that plan, and nobody else computes (`LoRAManager.running`)."""


class Batch:
    """Rows from their prompts on. A place in `rows` whose row left is None, and is computed for nothing until taken."""

    def __init__(self, base: BaseModel, rows: Sequence[Row], *, plan: Planning, running: Running) -> None:
        self.rows: list[Row | None] = list(rows)
        self._base = base
        self._planning, self._running = plan, running
        self._plan = plan(gates_of(rows))
        padded = pad(base, [row.prompt for row in rows])
        self._ids: Tensor = padded["input_ids"]  # (rows, tokens that were not computed yet)
        self._mask: Tensor = padded["attention_mask"]  # (rows, tokens), of all of them
        self._prompt_gates = prompt_gates_of(rows, self.columns)
        self._prompt_plan = plan(self._prompt_gates) if self._prompt_gates is not None else None
        self._cache = DynamicCache(config=base.model.config)
        self.is_answering = False

    @property
    def live(self) -> list[Row]:
        """The rows that are here."""
        return [row for row in self.rows if row is not None]

    @property
    def columns(self) -> int:
        """Tokens of the longest prompt that were not computed yet."""
        return self._ids.shape[1]

    @property
    def can_change(self) -> bool:
        """Whether rows can join: this model's cache is one that rows can be put into (attention, maybe sliding)."""
        return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in self._cache.layers)

    def advance(self, columns: int) -> list[tuple[int, float]] | None:
        """Compute up to `columns` tokens of each row: None while prompts go on, then each row's next token, in nats."""
        taken, rest = self._ids[:, :columns], self._ids[:, columns:]
        mask = self._mask[:, : self._mask.shape[1] - rest.shape[1]]
        with self._running(self._plan_for(taken.shape[1])):
            logits = _forward(self._base, taken, mask, self._cache)
        self._ids = rest
        if not rest.shape[1]:
            self._prompt_gates = self._prompt_plan = None
        return None if rest.shape[1] else choose_tokens(self.rows, logits[:, -1])

    def feed(self, tokens: Sequence[int]) -> None:
        """What each row chose, to be computed next."""
        self.is_answering = True
        self._ids = torch.tensor(tokens, device=self._ids.device)[:, None]
        attended = [[int(row is not None)] for row in self.rows]
        self._mask = torch.cat([self._mask, self._mask.new_tensor(attended)], dim=-1)

    def leave(self, row: Row) -> None:
        """Let a row go; its place stays."""
        place = self.rows.index(row)
        self.rows[place] = None
        self._mask[place] = 0

    def compact(self) -> None:
        """Have the last rows take the places of those that left, and give up the columns that only these had."""
        live = [place for place, row in enumerate(self.rows) if row is not None]
        if len(live) < len(self.rows):
            kept = [place if self.rows[place] is not None else live.pop() for place in range(len(live))]
            rows = [self.rows[place] for place in kept]
            self._plan = self._planning(gates_of(rows), after=self._plan)
            self.rows = rows
            places = torch.tensor(kept, device=self._ids.device)
            self._ids, self._mask = self._ids[places], self._mask[places]
            self._cache.batch_select_indices(places)
        self._trim()

    def join(self, other: Batch) -> None:
        """Take in `other`'s rows, where rows left or behind the last; every row here and there has its next token.

        Raises as `Planning`, and then leaves both as they were.
        """
        other.compact()
        free = [place for place, row in enumerate(self.rows) if row is None]
        places = [*free, *range(len(self.rows), len(self.rows) + len(other.rows))][: len(other.rows)]
        rows = self.rows + [None] * (max(places) + 1 - len(self.rows))
        for place, row in zip(places, other.rows, strict=True):
            rows[place] = row
        self._plan = self._planning(gates_of(rows), after=self._plan)
        self.rows = rows
        self._trim()
        columns = max(self._mask.shape[1], other._mask.shape[1])
        for batch in (self, other):
            batch._stand_at(columns)
        self._ids = _put(self._ids, other._ids, places)
        self._mask = _put(self._mask, other._mask, places)
        for mine, theirs in zip(self._cache.layers, other._cache.layers, strict=True):
            if mine.is_initialized:
                mine.keys = _put(mine.keys, theirs.keys, places)
                mine.values = _put(mine.values, theirs.values, places)

    def _plan_for(self, columns: int) -> Plan | None:
        """The plan of the next so many tokens of each row."""
        gates = self._prompt_gates
        if gates is None or gates.tokens == columns:
            return self._prompt_plan or self._plan
        first = self._mask.shape[1] - self._ids.shape[1]
        return self._planning(gates.columns(first, first + columns))  # its adapters are held by the whole prompt's

    def _trim(self) -> None:
        """Give up the leading columns that no row here attends to."""
        first = int(self._mask.any(dim=0).int().argmax())
        self._stand_at(self._mask.shape[1] - first)

    def _stand_at(self, columns: int) -> None:
        """Have `columns` columns, the last of which is not computed yet: more or fewer on the left."""
        more = columns - self._mask.shape[1]
        if more:
            self._mask = torch.nn.functional.pad(self._mask, (more, 0))
            for layer in self._cache.layers:
                _stand_at(layer, columns - 1)


def check_has_cache(base: BaseModel) -> None:
    """Raise `EngineError` for a model that would see one token only at each step."""
    if "past_key_values" not in inspect.signature(base.model.forward).parameters:
        raise EngineError(f"{base.name}: expected a model with a key-value cache, got {base.architecture}")


def _forward(base: BaseModel, ids: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
    """Logits (rows, 1 or more, vocabulary) of the last of `ids` (rows, tokens), which `mask` (rows, all) ends with."""
    positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    known = inspect.signature(base.model.forward).parameters
    optional = {"position_ids": positions, "logits_to_keep": 1}
    output = base.model(
        input_ids=ids,
        attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
        **{name: value for name, value in optional.items() if name in known},
    )
    logits: Tensor = output.logits
    return logits


def _stand_at(layer: CacheLayerMixin, columns: int) -> None:
    """Have `layer` hold `columns` columns, or as many of them as its window keeps: more or fewer on the left."""
    if not layer.is_initialized:  # it reads another layer's
        return
    kept = min(columns, layer.sliding_window - 1) if layer.is_sliding else columns
    more = kept - layer.keys.shape[-2]
    layer.keys, layer.values = (torch.nn.functional.pad(of, (0, 0, more, 0)) for of in (layer.keys, layer.values))
    if layer.is_sliding:
        layer.cumulative_length = columns


def _put(into: Tensor, rows: Tensor, places: Sequence[int]) -> Tensor:
    """`into` with `rows` at `places`, those within it first, then those right behind it."""
    within = [place for place in places if place < into.shape[0]]
    if within:
        into[within] = rows[: len(within)]
    return torch.cat([into, rows[len(within) :]]) if len(within) < len(places) else into


__all__ = ["Batch", "Planning", "Running", "check_has_cache"]
