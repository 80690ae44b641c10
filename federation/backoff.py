"""When what failed may be tried again: a delay that doubles with each failure in a row, and that no two nodes share."""

from __future__ import annotations

import random
from collections.abc import Callable


class Backoff:
    """Delays by key, from `first_s` up to `most_s`; `chance` takes up to a half off each. Has no clock of its own."""

    def __init__(self, *, first_s: float, most_s: float, chance: Callable[[], float] = random.random) -> None:
        self._first_s, self._most_s, self._chance = first_s, most_s, chance
        self._failures: dict[str, int] = {}
        self._due_s: dict[str, float] = {}

    def failed(self, key: str, now_s: float) -> float:
        """Note a failure; returns the seconds until the next attempt."""
        count = self._failures.get(key, 0)
        self._failures[key] = count + 1
        delay_s = min(self._most_s, self._first_s * 2.0 ** min(count, 32)) * (1 - self._chance() / 2)
        self._due_s[key] = now_s + delay_s
        return delay_s

    def worked(self, key: str) -> None:
        """Forget the failures."""
        self._failures.pop(key, None)
        self._due_s.pop(key, None)

    def waiting(self, now_s: float) -> frozenset[str]:
        """What is not to be tried yet."""
        return frozenset(key for key, due_s in self._due_s.items() if due_s > now_s)

    def keep_only(self, keys: frozenset[str]) -> None:
        """Forget all others, of which nobody speaks any more."""
        for key in self._due_s.keys() - keys:
            self.worked(key)


__all__ = ["Backoff"]
