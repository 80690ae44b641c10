"""Continuous batching: requests of many threads, each with its own adapters and sampling, in one running batch.

A request joins between two steps and leaves when it is done. Newcomers' prompts are computed in pieces, one between two
steps of those that are answered already; then their rows are put into the running batch (`arrowmoe.running_batch`).

Whoever waits for a chunk computes the next step for everybody, unless somebody does so already: nothing is computed
that nobody waits for, and there is nothing to start or to stop. What one reader has computed for another that does not
read is kept for it, which its `max_new_tokens` bounds. Only adapters of rows that wait are loaded by another thread
meanwhile (`arrowmoe.lora.loader`); such a row begins when they are there.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from arrowmoe.base_model import BaseModel
from arrowmoe.errors import AdapterMemoryError, BusyError, DeadlineError, EngineError
from arrowmoe.generation import Chunk, Prompt, Sampling, token_ids
from arrowmoe.lora.loader import Loader
from arrowmoe.routing.gates import Gates
from arrowmoe.row_gates import by_row
from arrowmoe.rows import Request, Row
from arrowmoe.running_batch import Batch, Planning, Running, check_has_cache
from arrowmoe.waiting import WaitingRows
from registry.errors import ArrowMoEError
from registry.logs import get_logger

log = get_logger(__name__)

_ROW_S = 1.0  # what a row is expected to take before any was measured
_NEWEST_SHARE = 0.2  # of the newest row, in the mean of what rows take


@dataclass(frozen=True, kw_only=True)
class BatchLimits:
    """`rows` are answered at once; `tokens` bounds rows times the longest row's tokens, which is what the cache holds;
    as many rows as `waiting` wait; `prompt_tokens` of newcomers are computed between two steps of others' answers.
    """

    rows: int = 64
    tokens: int = 1 << 17
    waiting: int = 1024
    prompt_tokens: int = 128


class Batching:
    """The running batch of one base model, and the rows that wait to join it. Calls may come from any thread."""

    def __init__(
        self,
        base: BaseModel,
        *,
        plan: Planning,
        running: Running,
        loader: Loader | None = None,
        limits: BatchLimits | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._base = base
        self._batch = partial(Batch, base, plan=plan, running=running)
        self._loader = loader
        self._limits = limits or BatchLimits()
        self._now = now
        # Not reentrant: a stream that is collected as garbage is closed by any thread, even one that has the lock.
        self._changed = threading.Condition(threading.Lock())
        self._computing = False
        self._waiting = WaitingRows()
        self._newcomers: list[Row] = []
        self._joining: Batch | None = None
        self._running: Batch | None = None
        self._adapters_wait = False
        self._row_s = _ROW_S

    def generate(
        self,
        prompts: Sequence[Prompt],
        weights: Sequence[Mapping[str, float]],
        sampling: Sampling,
        *,
        finer: Gates | None = None,
        timeout_s: float | None = None,
    ) -> Iterator[Chunk]:
        """Chunks as text becomes certain, the last of each row with its `Generation`; closing it gives the rest up.

        `weights` are each row's adapters, by digest; `finer` the gates where tokens or layers have their own. Raises
        `PromptError`, `GateError`, `BusyError` where too many rows wait, `DeadlineError` after `timeout_s`, and what
        ended a forward pass that one of its rows was in.
        """
        request = self._submit(prompts, weights, sampling, finer, timeout_s)
        try:
            while (chunk := self._next(request)) is not None:
                yield chunk
        finally:
            self._close(request)

    def _submit(
        self,
        prompts: Sequence[Prompt],
        weights: Sequence[Mapping[str, float]],
        sampling: Sampling,
        finer: Gates | None,
        timeout_s: float | None,
    ) -> Request:
        check_has_cache(self._base)
        ids = token_ids(self._base, prompts, sampling.max_new_tokens)
        now_s = self._now()
        deadline_s = math.inf if timeout_s is None else now_s + timeout_s
        request = Request(sampling=sampling, left=len(ids), submitted_s=now_s, deadline_s=deadline_s)
        own = [None] * len(ids) if finer is None else by_row(finer, [len(prompt) for prompt in ids])
        made = zip(ids, weights, own, strict=True)
        rows = [Row(self._base, request, index, *given) for index, given in enumerate(made)]
        with self._changed:
            self._check_room()
            self._waiting.add(rows)
            self._load_ahead()
        return request

    def _check_room(self) -> None:
        """Raise `BusyError` where as many rows wait as may; one call may bring more than that."""
        if len(self._waiting) >= self._limits.waiting:
            retry_s = self._row_s * math.ceil(len(self._waiting) / self._limits.rows)
            raise BusyError(
                f"expected fewer than {self._limits.waiting} rows to wait, got {len(self._waiting)}, so none is taken",
                retry_s=retry_s,
            )

    def _next(self, request: Request) -> Chunk | None:
        """The request's next chunk, computed by this thread if there is none and no other thread computes."""
        with self._changed:
            while not request.chunks and not request.is_over:
                if self._computing:
                    self._changed.wait()
                else:
                    self._compute()
            return request.read()

    def _compute(self) -> None:
        """One turn. Called with the lock, which others may have meanwhile."""
        self._computing = True
        self._changed.release()
        try:
            self._turn()
        except BaseException:  # an interrupt in the midst of a pass: the caches cannot be trusted
            self._fail(self._rows(), EngineError("the step that this request was in was interrupted"))
            raise
        finally:
            self._changed.acquire()
            self._computing = False
            self._sweep()
            self._changed.notify_all()

    def _close(self, request: Request) -> None:
        """Give up what is left of a request: at once if nobody computes, else with the next turn."""
        request.closed = True
        if self._changed.acquire(blocking=False):
            try:
                if not self._computing:
                    self._sweep()
            finally:
                self._changed.release()

    @torch.inference_mode()
    def _turn(self) -> None:
        """A step of the answers, and a piece of the newcomers' prompts."""
        if self._running is not None:
            self._advance(self._running, columns=1)
        with self._changed:
            self._sweep()
            self._newcomers = self._take_newcomers()
            self._load_ahead()
        if self._newcomers:
            self._joining, self._newcomers = self._begin(self._newcomers), []
        if self._joining is not None:
            self._advance_joining(self._joining)

    @torch.inference_mode()
    def _sweep(self) -> None:
        """Let go of what is done, closed, failed or late."""
        now_s = self._now()
        for row in [*self._waiting, *self._rows()]:
            if row.request.deadline_s <= now_s and not row.request.is_over:
                waited_s = now_s - row.request.submitted_s
                row.request.error = DeadlineError(f"expected an answer in time, got none after {waited_s:.1f} s")
        self._waiting.drop_over()
        self._joining, self._running = _without_those_over(self._joining), _without_those_over(self._running)

    def _take_newcomers(self) -> list[Row]:
        """Rows whose turn it is and for which there is room, if no others are joining just now."""
        if self._joining is not None:
            return []
        if self._running is not None and (self._adapters_wait or not self._running.can_change):
            return []
        rows: list[Row] = []
        while (row := self._waiting.first(self._can_begin)) is not None and self._is_room_for(row, rows):
            rows.append(self._waiting.pop(row))
        return rows

    def _can_begin(self, adapters: Collection[str]) -> bool:
        """Whether rows with these adapters need not wait for them; while nothing is computed, waiting costs nobody."""
        return self._running is None or self._loader is None or not self._loader.is_loading(adapters)

    def _load_ahead(self) -> None:
        """Have the adapters loaded of whoever comes next."""
        if self._loader is not None:
            begun = [digest for row in self._newcomers for digest in row.weights]
            self._loader.ask([*begun, *self._waiting.adapters(self._limits.rows)])

    def _is_room_for(self, row: Row, others: Sequence[Row]) -> bool:
        """Whether `row` fits beside `others` and those that are answered; alone it always does."""
        running = self._running.rows if self._running is not None else []
        here = [*(one for one in running if one is not None), *others, row]
        longest = max(one.most_tokens for one in here)
        places = max(len(here), len(running))
        return len(here) == 1 or (len(here) <= self._limits.rows and places * longest <= self._limits.tokens)

    def _begin(self, rows: list[Row]) -> Batch | None:
        """A batch of newcomers: all of them, or as many as have adapters that fit in together; the others wait on."""
        for row in rows:
            row.started_s = self._now()
        try:
            return self._batch(rows)
        except ArrowMoEError as error:
            self._adapters_wait = isinstance(error, AdapterMemoryError) and error.later and self._running is not None
            if len(rows) == 1 and not self._adapters_wait:
                self._fail(rows, error)
        first, others = rows[: len(rows) // 2], rows[len(rows) // 2 :]
        with self._changed:
            self._waiting.put_back(others)  # one that failed is forgotten with the next sweep
        return self._begin(first) if first else None

    def _advance_joining(self, batch: Batch) -> None:
        """A piece of the prompts; once they are through, into the running batch."""
        if not batch.is_answering:
            whole = self._running is None
            self._advance(batch, batch.columns if whole else max(1, self._limits.prompt_tokens // len(batch.rows)))
        if batch.is_answering and batch.live:
            self._join(batch)

    def _join(self, batch: Batch) -> None:
        """Put newcomers into the running batch; in a later turn if there is no room for the adapters of both."""
        running = self._running
        try:
            if running is not None:
                running.join(batch)
        except AdapterMemoryError as error:
            log.info("rows_wait_for_adapters", rows=len(batch.live), reason=str(error))
            return
        except Exception as error:
            log.exception("join_failed", rows=len(batch.live))
            self._fail(self._rows(), error)
            return
        self._running, self._joining = running or batch, None

    def _advance(self, batch: Batch, columns: int) -> None:
        """One forward pass; what ends it, ends every row that was in it."""
        try:
            if self._is_worth_compacting(batch):
                batch.compact()
                self._adapters_wait = False
            chosen = batch.advance(columns)
        except Exception as error:
            log.exception("step_failed", rows=len(batch.live))
            self._fail(batch.live, error)
            return
        if chosen is not None:
            for row, (token, logprob) in zip(batch.rows, chosen, strict=True):
                if row is not None and not row.request.is_over:
                    self._give(row, token, logprob)
            for row in batch.live:
                if row.finish_reason is not None or row.request.is_over:
                    batch.leave(row)
            batch.feed([token for token, _ in chosen])

    def _is_worth_compacting(self, batch: Batch) -> bool:
        """Where half of the rows left: it copies the cache. Where adapters wait, one, for its own may make room."""
        here, places = len(batch.live), len(batch.rows)
        is_worth_it = 2 * here <= places or (self._adapters_wait and here < places)
        return batch.is_answering and batch.can_change and is_worth_it

    def _give(self, row: Row, token: int, logprob: float) -> None:
        """Hand a row its token, and its request the text."""
        if math.isnan(logprob):
            self._fail([row], _overflow())
            return
        now_s = self._now()
        row.request.chunks.extend(row.take(token, logprob, now_s))
        if row.finish_reason is not None:
            row.request.left -= 1
            self._row_s += _NEWEST_SHARE * (now_s - row.started_s - self._row_s)

    def _rows(self) -> list[Row]:
        """The rows that wait no more."""
        batches = [batch for batch in (self._joining, self._running) if batch is not None]
        return [*self._newcomers, *(row for batch in batches for row in batch.live)]

    def _fail(self, rows: Iterable[Row], error: Exception) -> None:
        _forget_frames(error)
        for row in rows:
            if not row.request.is_over:
                row.request.error = error


def _without_those_over(batch: Batch | None) -> Batch | None:
    """Without the rows of requests that are over; None if no row is left."""
    if batch is not None:
        for row in batch.live:
            if row.request.is_over:
                batch.leave(row)
    return batch if batch is not None and batch.live else None


def _forget_frames(error: BaseException | None) -> None:
    """Take their tracebacks from an error and its causes: the frames hold the batch, so whoever keeps it keeps that."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def _overflow() -> EngineError:
    return EngineError(
        "expected finite logits, got NaN, so there is no answer",
        hint="an adapter's weight is too large, or the dtype too narrow for this model",
    )


__all__ = ["BatchLimits", "Batching"]
