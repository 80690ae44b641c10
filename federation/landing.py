"""Whole cards that wait to be kept together: one transaction for many of them costs little more than one for each."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from federation import limits
from federation.board import Task
from registry.arrivals import Arrival
from registry.drafts import BLOCK_BYTES


@dataclass(frozen=True, kw_only=True)
class Landed:
    """A card that is whole and durable in its draft, by the task that made it so."""

    task: Task
    arrival: Arrival


class Landing:
    """Cards that have landed; to be used under its owner's lock."""

    def __init__(self, *, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._waiting: list[Landed] = []
        self._due_at = 0.0

    def add(self, landed: Landed) -> None:
        """A card waits from now on; a large one for nothing."""
        if not self._waiting:
            self._due_at = self._now() + limits.KEEP_TOGETHER_S
        if landed.arrival.card.nbytes > BLOCK_BYTES:
            self._due_at = self._now()
        self._waiting.append(landed)

    def due(self) -> list[Landed]:
        """All that wait, if they are many or have waited long."""
        is_due = len(self._waiting) >= limits.KEEP_TOGETHER_CARDS or self._now() >= self._due_at
        return self.all() if is_due else []

    def all(self) -> list[Landed]:
        """All that wait, which they do no more."""
        waiting, self._waiting = self._waiting, []
        return waiting


__all__ = ["Landed", "Landing"]
