"""The transfer: brings wanted cards here, in parts, from several peers at once and over several streams of each.

The parts go into a draft on disk (`registry.drafts`), where every tensor is verified as its bytes come; a card is kept
once all of it is there. What a broken transfer leaves is taken up by the next one, whoever gives the rest.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeAlias

from federation import limits
from federation.board import Board, Holder, Job, Source, Task, Wanted
from federation.errors import FederationError, PeerError, TransportError
from federation.pace import Pace
from registry.card import LoRACard
from registry.digest import Digest, is_digest
from registry.drafts import BLOCK_BYTES, Draft
from registry.entries import CardEntry, Origin
from registry.errors import ArrowMoEError, CardError, MissingFileError, RemovedCardError, UnknownCardError
from registry.logs import get_logger
from registry.store import Registry

_log = get_logger(__name__)

Check: TypeAlias = "Callable[[LoRACard, Origin], None]"
"""Sees a card without its tensors, as its publisher signed it; raises `FederationError` unless it may come."""

Keep: TypeAlias = "Callable[[LoRACard, Origin, Path], CardEntry]"
"""Takes a card that is whole and verified into the catalog, out of the file in which it lies; may refuse it."""


@dataclass(frozen=True, kw_only=True)
class TransferProgress:
    """Where a transfer is, in bytes of the card that moved last and of all; a card that failed counts as done."""

    holder: Holder
    card: str
    card_bytes_done: int
    card_bytes_total: int
    bytes_done: int
    bytes_total: int
    cards_done: int
    cards_total: int


@dataclass(frozen=True, kw_only=True)
class CardOutcome:
    """What became of one card. `entry` is None if it did not come; `failures`: who could not give it, and why.

    `moved`: tensor bytes that came from each holder, of failed attempts too. `bytes_here`: those that were here
    already, in other cards or from an earlier attempt.
    """

    wanted: Wanted
    entry: CardEntry | None
    failures: tuple[tuple[Holder, str], ...] = ()
    moved: Mapping[Holder, int] = field(default_factory=dict)
    tensors_verified: int = 0
    bytes_here: int = 0

    @property
    def giver(self) -> Holder:
        """Who gave most of the card, or else the first who has it."""
        return max(self.moved, key=lambda holder: self.moved[holder], default=self.wanted.holders[0])


def transfer(
    registry: Registry,
    wanted: Sequence[Wanted],
    *,
    check: Check | None = None,
    keep: Keep | None = None,
    on_progress: Callable[[TransferProgress], None] | None = None,
    bytes_per_s: float | None = None,
    cancelled: threading.Event | None = None,
    now: datetime | None = None,
) -> tuple[CardOutcome, ...]:
    """Bring the `wanted` cards, each digest once, into `registry`; their outcomes in the same order.

    `check` hears of each card before its tensors come. `keep` is `Registry.admit` unless given. `bytes_per_s` bounds
    all of it together. `on_progress` is called from the transfer's threads, one at a time. Setting `cancelled` ends it
    soon, with what has come kept for the next time. One failing card or peer never stops the others.
    """
    registry.drafts.sweep(now or datetime.now(UTC))
    run = _Run(
        registry,
        wanted,
        check=check or _anything,
        keep=keep or _admitting(registry),
        on_progress=on_progress,
        bytes_per_s=bytes_per_s,
        cancelled=cancelled or threading.Event(),
    )
    return run.outcomes()


class _Run:
    """One transfer: threads that take tasks from a board until there are none."""

    def __init__(
        self,
        registry: Registry,
        wanted: Sequence[Wanted],
        *,
        check: Check,
        keep: Keep,
        on_progress: Callable[[TransferProgress], None] | None,
        bytes_per_s: float | None,
        cancelled: threading.Event,
    ) -> None:
        self._registry, self._check, self._keep, self._cancelled = registry, check, keep, cancelled
        self._board = Board(wanted)
        self._change = threading.Condition()
        self._pace = Pace(bytes_per_s, wait=cancelled.wait)
        self._meter = _Meter(wanted, on_progress)
        self._crash: BaseException | None = None

    def outcomes(self) -> tuple[CardOutcome, ...]:
        """Run to the end; raises what a thread of ours or `on_progress` raised unexpectedly."""
        holders = {holder for job in self._board.jobs for holder in job.holders}
        count = min(limits.MAX_TRANSFER_STREAMS, limits.STREAMS_PER_PEER * len(holders))
        threads = [threading.Thread(target=self._work, name=f"arrowmoe-transfer-{n}") for n in range(count)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except BaseException:  # an interrupt
            self._cancelled.set()
            raise
        finally:
            self._end(threads)
        if self._crash is not None:
            raise self._crash
        return tuple(map(_outcome, self._board.jobs))

    def _end(self, threads: Sequence[threading.Thread]) -> None:
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        for job in self._board.jobs:
            if job.draft is not None:
                job.draft.close()

    def _work(self) -> None:
        try:
            while (task := self._next()) is not None:
                self._cancelled.wait(self._do(task))
                self._ended(task)
        except BaseException as error:  # noqa: BLE001  # raised again by `outcomes`
            self._crash = self._crash or error
            self._cancelled.set()

    def _next(self) -> Task | None:
        with self._change:
            while not (self._board.is_done or self._cancelled.is_set()):
                if (task := self._board.next()) is not None:
                    return task
                self._change.wait(limits.CANCEL_POLL_S)  # whoever sets `cancelled` does not notify
            return None

    def _ended(self, task: Task) -> None:
        job = task.job
        with self._change:
            self._board.ended(task)
            self._change.notify_all()
            if job.settled and not job.busy and job.draft is not None:
                job.draft.close()
            if job.settled:
                self._meter.ended(task)

    def _do(self, task: Task) -> float:
        """Do a task, and say for how long to leave the holder alone."""
        try:
            if task.part is None:
                self._open(task)
            else:
                self._fetch(task, *task.part)
        except TransportError as error:
            return self._line_failed(task, error)
        except FederationError as error:
            self._refused(task, error)
        except (ArrowMoEError, OSError) as error:
            self._failed(task, error)
        if task.job.draft is not None and task.job.draft.is_whole:
            self._complete(task, task.job.draft)
        return 0.0

    def _open(self, task: Task) -> None:
        """Ask what the card is, and see what of it is here."""
        job = task.job
        card = task.holder.source.describe(job.wanted.digest)
        self._check(card, task.holder.origin)
        draft = self._draft(card)
        with self._change:
            job.bytes_here = card.nbytes - sum(end - start for start, end in draft.gaps())
            self._board.opened(job, draft)
            self._board.line_worked(task.holder)
            self._change.notify_all()
        self._meter.moved(task, job.bytes_here)

    def _draft(self, card: LoRACard) -> Draft:
        """The draft of `card`, with what of it is here already."""
        with ExitStack() as undo:
            draft = undo.enter_context(self._registry.drafts.open(card))
            for sibling in _siblings(self._registry, card) if draft.gaps() else ():
                draft.take_from(sibling)
            undo.pop_all()
            return draft

    def _fetch(self, task: Task, start: int, end: int) -> None:
        """Fetch a part; what does not come goes back to the board."""
        at = begun = start
        try:
            with closing(task.holder.source.read(task.job.wanted.digest, start, end - start)) as pieces:
                for piece in pieces:
                    if not 0 < len(piece) <= end - at:  # of empty ones there could be no end
                        raise PeerError(f"expected 1 to {end - at} more tensor bytes, got {len(piece)}")
                    is_lie = self._took(task, at, piece)
                    at += len(piece)
                    if is_lie:
                        raise PeerError(f"tensor bytes of card {task.job.wanted.digest} were damaged or forged")
                    if at - begun >= BLOCK_BYTES:
                        begun = at
                        self._line_worked(task.holder)
                    if at == end:  # a peer may leave its stream open
                        break
                    if self._cancelled.is_set() or task.job.settled:
                        return
            if at < end:
                raise PeerError(f"expected {end - at} more tensor bytes, got none, so the card is not whole")
            self._line_worked(task.holder)
        finally:
            with self._change:
                self._board.returned(task.job, at, end)

    def _took(self, task: Task, at: int, piece: memoryview) -> bool:
        """Put a piece into the draft; whether the holder turns out to have given a tensor that is wrong."""
        assert task.job.draft is not None
        with self._change:
            self._board.came(task, at, at + len(piece))
        wrong = task.job.draft.write(at, piece)
        self._meter.moved(task, len(piece))
        with self._change:
            lies = [self._board.thrown_away(task, tensor) for tensor in wrong]
        self._pace.spend(len(piece))
        return any(lies)

    def _complete(self, task: Task, draft: Draft) -> None:
        """Take a whole card into the catalog, once."""
        job = task.job
        with self._change:
            if job.claimed or job.settled:
                return
            job.claimed = True
            giver = max(job.moved, key=lambda holder: job.moved[holder], default=task.holder)
        try:
            entry = self._keep(draft.finish(), giver.origin, draft.path)
        except (ArrowMoEError, OSError) as error:
            self._failed(task, error)
            return
        draft.discard()
        with self._change:
            self._board.settle(job, entry)
        _log.info(
            "card_fetched", card=job.wanted.label, digest=entry.digest, peer=giver.origin.peer_id, bytes=entry.nbytes
        )

    def _line_worked(self, holder: Holder) -> None:
        with self._change:
            self._board.line_worked(holder)

    def _line_failed(self, task: Task, error: TransportError) -> float:
        with self._change:
            count = self._board.line_failed(task.holder, str(error))
        _log.warning("line_failed", peer=task.holder.origin.address, card=task.job.wanted.label, error=str(error))
        return float(limits.RETRY_DELAY_S * 2 ** (count - 1))

    def _refused(self, task: Task, error: FederationError) -> None:
        with self._change:
            self._board.refuse(task.job, task.holder, str(error))
        _log.warning("card_refused", peer=task.holder.origin.address, card=task.job.wanted.label, error=str(error))

    def _failed(self, task: Task, error: Exception) -> None:
        """No peer can help: the card itself, or this node, is at fault."""
        job = task.job
        if job.draft is not None and isinstance(error, CardError | RemovedCardError):
            job.draft.discard()
        with self._change:
            job.failures.append((task.holder, str(error)))
            if not job.settled:
                self._board.settle(job, None)
        _log.warning("card_failed", card=job.wanted.label, digest=job.wanted.digest, error=str(error))


class _Meter:
    """Counts what arrives, for whoever watches."""

    def __init__(self, wanted: Sequence[Wanted], on_progress: Callable[[TransferProgress], None] | None) -> None:
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self._bytes_total, self._bytes_done = sum(card.nbytes for card in wanted), 0
        self._cards_total, self._ended = len(wanted), set[Job]()
        self._of_card: Counter[Job] = Counter()

    def moved(self, task: Task, nbytes: int) -> None:
        """So many bytes more of the card are here."""
        with self._lock:
            self._set(task.job, min(task.job.wanted.nbytes, self._of_card[task.job] + nbytes))
            self._tell(task)

    def ended(self, task: Task) -> None:
        """No more of this card will be tried."""
        with self._lock:
            if task.job not in self._ended:
                self._ended.add(task.job)
                self._set(task.job, task.job.wanted.nbytes)
                self._tell(task)

    def _set(self, job: Job, nbytes: int) -> None:
        self._bytes_done += nbytes - self._of_card[job]
        self._of_card[job] = nbytes

    def _tell(self, task: Task) -> None:
        if self._on_progress is None:
            return
        wanted = task.job.wanted
        self._on_progress(
            TransferProgress(
                holder=task.holder,
                card=wanted.label,
                card_bytes_done=self._of_card[task.job],
                card_bytes_total=wanted.nbytes,
                bytes_done=self._bytes_done,
                bytes_total=self._bytes_total,
                cards_done=len(self._ended),
                cards_total=self._cards_total,
            )
        )


def _outcome(job: Job) -> CardOutcome:
    return CardOutcome(
        wanted=job.wanted,
        entry=job.entry,
        failures=tuple(job.failures),
        moved=dict(job.moved),
        tensors_verified=0 if job.draft is None else job.draft.tensors_verified,
        bytes_here=job.bytes_here,
    )


def _anything(card: LoRACard, origin: Origin) -> None:
    """Every card may come."""


def _admitting(registry: Registry) -> Keep:
    return lambda card, origin, draft: registry.admit(card, origin=origin, draft=draft)


def _siblings(registry: Registry, card: LoRACard) -> Iterator[LoRACard]:
    """Cards here that are likely to share tensors with `card`: its parents, and those of its name."""
    if card.nbytes < BLOCK_BYTES:  # fetching it costs no more than looking
        return
    named = (entry.digest for entry in registry.list(name=card.name)[: limits.MAX_SIBLINGS])
    parents = (Digest(parent) for parent in card.manifest.parents[: limits.MAX_SIBLINGS] if is_digest(parent))
    for digest in dict.fromkeys((*parents, *named)):
        try:
            yield registry.get(digest)
        except UnknownCardError:
            continue
        except (CardError, MissingFileError) as error:
            _log.warning("sibling_unreadable", digest=digest, error=str(error))


__all__ = [
    "CardOutcome",
    "Check",
    "Holder",
    "Keep",
    "Source",
    "TransferProgress",
    "Wanted",
    "transfer",
]
