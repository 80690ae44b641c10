"""The transfer: brings wanted cards here, in parts, from several peers at once and over several streams of each.

The parts go into a draft on disk (`registry.drafts`), where every tensor is verified as its bytes come; a card is kept
once all of it is there. What a broken transfer leaves is taken up by the next one, whoever gives the rest.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import TypeAlias

from federation import limits
from federation.board import Board, Holder, Job, Source, Task, Wanted
from federation.errors import FederationError, PeerError, TransportError
from federation.landing import Landed, Landing
from federation.meter import Meter, TransferProgress
from federation.pace import Pace
from federation.siblings import drafted
from registry.arrivals import Arrival
from registry.card import LoRACard
from registry.drafts import BLOCK_BYTES, Draft
from registry.entries import CardEntry, Origin
from registry.errors import ArrowMoEError, CardError, RemovedCardError
from registry.logs import get_logger
from registry.store import Registry

_log = get_logger(__name__)

Check: TypeAlias = "Callable[[LoRACard, Origin], None]"
"""Sees a card without its tensors, as its publisher signed it; raises `FederationError` unless it may come."""

Keep: TypeAlias = "Callable[[Sequence[Arrival]], Sequence[CardEntry | ArrowMoEError | OSError]]"
"""Takes cards that are whole and verified into the catalog, out of their drafts: of each its entry, or why not."""


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
    pace: Pace | None = None,
    cancelled: threading.Event | None = None,
    now: datetime | None = None,
) -> tuple[CardOutcome, ...]:
    """Bring the `wanted` cards, each digest once, into `registry`; their outcomes in the same order.

    `check` hears of each card before its tensors come. `keep` is `Registry.admit_all` unless given. `pace`
    bounds all of it together. `on_progress` is called from the transfer's threads, one at a time. Setting `cancelled`
    ends it soon, with what has come kept for the next time. One failing card or peer never stops the others.
    """
    registry.recover()  # else a draft whose card could not be entered would still be that card's file
    registry.drafts.sweep(now or datetime.now(UTC))
    run = _Run(
        registry,
        wanted,
        check=check or _anything,
        keep=keep or registry.admit_all,
        on_progress=on_progress,
        pace=pace or Pace(None),
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
        pace: Pace,
        cancelled: threading.Event,
    ) -> None:
        self._registry, self._check, self._keep, self._cancelled = registry, check, keep, cancelled
        self._board = Board(wanted)
        self._change = threading.Condition()
        self._pace = pace
        self._meter = Meter(wanted, on_progress)
        self._landing = Landing()
        self._crash: BaseException | None = None

    def outcomes(self) -> tuple[CardOutcome, ...]:
        """Run to the end; raises what a thread of ours or `on_progress` raised unexpectedly."""
        holders = {holder for job in self._board.jobs for holder in job.holders}
        count = min(limits.MAX_TRANSFER_STREAMS, limits.CALLS_PER_PEER * len(holders))
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
            while (step := self._next()) is not None:
                step()
            self._keep_landed(self._landing.all())
        except BaseException as error:  # noqa: BLE001  # raised again by `outcomes`
            self._crash = self._crash or error
            self._cancelled.set()

    def _next(self) -> Callable[[], None] | None:
        """What this thread does next: keep cards if that is due, else a task, else keep what has landed."""
        with self._change:
            while not (self._board.is_done or self._cancelled.is_set()):
                if landed := self._landing.due():
                    return partial(self._keep_landed, landed)
                if (task := self._board.next()) is not None:
                    return partial(self._work_on, task)
                if landed := self._landing.all():
                    return partial(self._keep_landed, landed)
                self._change.wait(limits.CANCEL_POLL_S)  # whoever sets `cancelled` does not notify
            return None

    def _work_on(self, task: Task) -> None:
        self._cancelled.wait(self._do(task))
        with self._change:
            self._board.ended(task)
            self._change.notify_all()
            self._let_go(task)

    def _let_go(self, task: Task) -> None:
        """Close the draft of a card that is settled once nobody works on it."""
        job = task.job
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
        given = task.holder.source.describe(job.wanted.digest)
        card = replace(given, tensors=())
        self._check(card, task.holder.origin)
        draft = drafted(self._registry, card)
        moved = self._put(task, draft, given)
        with self._change:
            job.bytes_here = card.nbytes - sum(end - start for start, end in draft.gaps()) - moved
            self._board.opened(job, draft)
            self._board.line_worked(task.holder)
            self._change.notify_all()
        self._meter.moved(task, job.bytes_here)
        if moved:
            self._meter.moved(task, moved)
            self._pace.spend(moved, self._cancelled.wait)

    def _put(self, task: Task, draft: Draft, given: LoRACard) -> int:
        """Put the tensors of a card that came with its manifest where they are missing; how many bytes that were."""
        if not given.tensors:
            return 0
        data, moved = memoryview(b"".join(tensor.data for tensor in given.tensors)), 0
        for start, end in draft.gaps():
            draft.write(start, data[start:end])
            with self._change:
                self._board.came(task, start, end)
            moved += end - start
        return moved

    def _fetch(self, task: Task, start: int, end: int) -> None:
        """Fetch a part; what does not come goes back to the board."""
        at = begun = start
        try:
            with closing(task.holder.source.read(task.job.wanted.digest, start, end - start)) as pieces:
                for piece in pieces:
                    if not 0 < len(piece) <= end - at:  # of empty ones there could be no end
                        raise PeerError(f"expected 1 to {end - at} more tensor bytes, got {len(piece)}")
                    at += len(piece)  # before they are put down: if the card itself is at fault they are here
                    if self._took(task, at - len(piece), piece):
                        raise PeerError(f"tensor bytes of card {task.job.wanted.digest} were damaged or forged")
                    if at - begun >= BLOCK_BYTES:
                        begun = at
                        self._line_worked(task.holder)
                        self._keep_due()
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
        self._pace.spend(len(piece), self._cancelled.wait)
        return any(lies)

    def _complete(self, task: Task, draft: Draft) -> None:
        """Let a whole card land, once."""
        job = task.job
        with self._change:
            if job.claimed or job.settled:
                return
            job.claimed = True
            giver = max(job.moved, key=lambda holder: job.moved[holder], default=task.holder)
        try:
            arrival = Arrival(card=draft.finish(), origin=giver.origin, draft=draft.path)
        except (ArrowMoEError, OSError) as error:
            self._failed(task, error)
            return
        with self._change:
            self._landing.add(Landed(task=task, arrival=arrival))

    def _keep_landed(self, cards: Sequence[Landed]) -> None:
        """Take cards into the catalog."""
        kept = self._keep([landed.arrival for landed in cards]) if cards else ()
        for landed, entry in zip(cards, kept, strict=True):
            if isinstance(entry, CardEntry):
                self._kept(landed, entry)
            else:
                self._failed(landed.task, entry)
            with self._change:
                self._let_go(landed.task)
                self._change.notify_all()

    def _kept(self, landed: Landed, entry: CardEntry) -> None:
        job, origin = landed.task.job, landed.arrival.origin
        if job.draft is not None:
            job.draft.discard()
        with self._change:
            self._board.settle(job, entry)
        peer_id = None if origin is None else origin.peer_id
        _log.info("card_fetched", card=job.wanted.label, digest=entry.digest, peer=peer_id, bytes=entry.nbytes)

    def _keep_due(self) -> None:
        with self._change:
            landed = self._landing.due()
        self._keep_landed(landed)

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
