"""Where a transfer is: counts what arrives, for whoever watches."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from federation.board import Holder, Job, Task, Wanted


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


class Meter:
    """One transfer's count; tells `on_progress` from the transfer's threads, one at a time."""

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


__all__ = ["Meter", "TransferProgress"]
