"""Who fetches what next: the decisions of a transfer, without I/O. `federation.transfer` asks under a lock and acts.

Parts of cards that are under way come first, then the next card; of the peers that hold it, the least busy is asked.
A peer that gave something wrong is not asked for that card again, and one whose line fails over and over for none. A
tensor that turned out wrong though several peers gave parts of it is fetched again from one, so that the liar shows.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from federation import limits
from registry.card import LoRACard
from registry.digest import Digest
from registry.drafts import Draft
from registry.entries import CardEntry, Origin
from registry.spans import Span


class Source(Protocol):
    """What a transfer needs of a peer; called from several threads at once. Both raise `FederationError`."""

    def describe(self, digest: Digest) -> LoRACard:
        """The card, manifest and signature checked: without its tensors, or a small one with all, verified too."""

    def read(self, digest: Digest, offset: int, nbytes: int) -> Generator[memoryview, None, None]:
        """`nbytes` of the card's tensor bytes from `offset` on, in pieces, unverified; closing it ends the call."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Holder:
    """A peer that has cards; `origin` is what the catalog will say of those that it gave."""

    source: Source
    origin: Origin


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A card to bring here. `nbytes` is what was offered: it counts for progress only."""

    digest: Digest
    label: str
    nbytes: int
    holders: tuple[Holder, ...]


@dataclass(kw_only=True, eq=False)
class Job:
    """A card on its way."""

    wanted: Wanted
    holders: list[Holder]
    """Who may still be asked for it."""
    draft: Draft | None = None
    parts: deque[Span] = field(default_factory=deque)
    busy: int = 0
    """How many threads work on it."""
    given: list[tuple[int, int, Holder]] = field(default_factory=list)
    moved: Counter[Holder] = field(default_factory=Counter)
    failures: list[tuple[Holder, str]] = field(default_factory=list)
    bytes_here: int = 0
    entry: CardEntry | None = None
    claimed: bool = False
    """A thread has taken it to its end."""
    settled: bool = False


@dataclass(frozen=True, kw_only=True)
class Task:
    """Fetch `part` of a job's tensor bytes from `holder`; without a part, ask for its manifest and open its draft."""

    job: Job
    holder: Holder
    part: Span | None = None


class Board:
    """The jobs of one transfer and the state of its peers' lines."""

    def __init__(self, wanted: Iterable[Wanted]) -> None:
        self.jobs = [Job(wanted=card, holders=[*card.holders]) for card in wanted]
        self._waiting = deque(self.jobs)
        self._open: list[Job] = []
        self._streams: Counter[Holder] = Counter()
        self._calls: Counter[Holder] = Counter()
        self._line_failures: Counter[Holder] = Counter()
        self._unsettled = len(self.jobs)
        for job in self.jobs:
            self._settle_if_hopeless(job)

    @property
    def is_done(self) -> bool:
        """Whether nothing will change any more."""
        return not self._unsettled

    def next(self) -> Task | None:
        """What one thread does next; None while all that is left is in others' hands. `ended` gives it back."""
        for job in self._open:
            if job.parts and (holder := self._freest(job, self._streams, limits.STREAMS_PER_PEER)) is not None:
                return self._begun(Task(job=job, holder=holder, part=job.parts.popleft()))
        while self._waiting and self._waiting[0].settled:
            self._waiting.popleft()
        # Each card that is opened takes its space on the disk, so with parts to fetch no more are opened than needed.
        most = limits.STREAMS_PER_PEER if any(job.parts for job in self._open) else limits.CALLS_PER_PEER
        for index, job in enumerate(self._waiting):
            if (holder := self._freest(job, self._calls, most)) is not None:
                del self._waiting[index]
                self._open.append(job)
                return self._begun(Task(job=job, holder=holder))
        return None

    def ended(self, task: Task) -> None:
        """A thread has let go of a task, whatever came of it; a card that never opened waits for another peer."""
        task.job.busy -= 1
        self._count(task, -1)
        if task.job.draft is None and not task.job.settled and task.job in self._open:
            self._open.remove(task.job)
            self._waiting.appendleft(task.job)
        self._settle_if_hopeless(task.job)

    def opened(self, job: Job, draft: Draft) -> None:
        """The draft is there, and with it what is missing."""
        job.draft = draft
        job.parts = deque(parts_of(draft.gaps()))

    def came(self, task: Task, start: int, end: int) -> None:
        """The holder gave tensor bytes."""
        task.job.given.append((start, end, task.holder))
        task.job.moved[task.holder] += end - start

    def thrown_away(self, task: Task, tensor: Span) -> bool:
        """A tensor was wrong and has to come again; whether the task's holder gave all of it."""
        start, end = tensor
        spans = [(first, last) for first, last, holder in task.job.given if holder is task.holder]
        share = sum(max(0, min(last, end) - max(first, start)) for first, last in spans)
        task.job.given = _without(task.job.given, start, end)
        task.job.parts.append(tensor)
        return share == end - start

    def returned(self, job: Job, start: int, end: int) -> None:
        """The rest of a part did not come."""
        if start < end:
            job.parts.appendleft((start, end))

    def line_worked(self, holder: Holder) -> None:
        """The holder gave what it was asked for."""
        self._line_failures[holder] = 0

    def line_failed(self, holder: Holder, reason: str) -> int:
        """How often it did in a row; after `MAX_LINE_FAILURES` the holder is asked for nothing more."""
        self._line_failures[holder] += 1
        if self._line_failures[holder] >= limits.MAX_LINE_FAILURES:
            for other in [*self._open, *self._waiting]:
                self.refuse(other, holder, reason)
        return self._line_failures[holder]

    def refuse(self, job: Job, holder: Holder, reason: str) -> None:
        """Do not ask the holder for this card again."""
        if holder in job.holders:
            job.holders.remove(holder)
            job.failures.append((holder, reason))
        self._settle_if_hopeless(job)

    def settle(self, job: Job, entry: CardEntry | None) -> None:
        """This is what became of the card."""
        job.entry, job.settled = entry, True
        self._unsettled -= 1
        if job in self._open:
            self._open.remove(job)

    def _freest(self, job: Job, busy: Counter[Holder], most: int) -> Holder | None:
        free = [holder for holder in job.holders if busy[holder] < most]
        return min(free, key=lambda holder: busy[holder], default=None)

    def _begun(self, task: Task) -> Task:
        task.job.busy += 1
        self._count(task, 1)
        return task

    def _count(self, task: Task, change: int) -> None:
        self._calls[task.holder] += change
        if task.part is not None:
            self._streams[task.holder] += change

    def _settle_if_hopeless(self, job: Job) -> None:
        if not (job.holders or job.busy or job.claimed or job.settled):
            self.settle(job, None)


def parts_of(gaps: Sequence[Span]) -> list[Span]:
    """The gaps, cut at multiples of `MAX_PART_BYTES`."""
    parts = []
    for start, end in gaps:
        while start < end:
            until = min(end, (start // limits.MAX_PART_BYTES + 1) * limits.MAX_PART_BYTES)
            parts.append((start, until))
            start = until
    return parts


def _without(given: Sequence[tuple[int, int, Holder]], start: int, end: int) -> list[tuple[int, int, Holder]]:
    parts = []
    for first, last, holder in given:
        parts += [(first, min(last, start), holder), (max(first, end), last, holder)]
    return [part for part in parts if part[0] < part[1]]


__all__ = ["Board", "Holder", "Job", "Source", "Task", "Wanted", "parts_of"]
