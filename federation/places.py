"""The places of a server's streams: so many in all, so many for one caller, and none for ever.

A stream moves only while its reader takes what it is sent. Where every place is held, the one that has stood still
longest is cut, if that is long, so that readers who stall keep nobody else from being served.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import TypeVar

from federation import limits
from federation.errors import BusyError

_Item = TypeVar("_Item")


@dataclass(kw_only=True, eq=False)
class _Held:
    caller: str
    place: int
    moved: float


class Places:
    """Hands out `MAX_STREAMS` places. `cut` ends the connection of a caller, by its place at the turnstile."""

    def __init__(self, cut: Callable[[int, str], None], *, now: Callable[[], float] = time.monotonic) -> None:
        self._cut, self._now = cut, now
        self._lock = threading.Lock()
        self._held: set[_Held] = set()

    def take(self, items: Iterator[_Item], *, caller: str, place: int) -> Iterator[_Item]:
        """`items`, holding a place until they are gone, even if nobody ever reads. Raises `BusyError`."""
        held = _Held(caller=caller, place=place, moved=self._now())
        with self._lock:
            self._check(caller, list(self._held))
            self._held.add(held)
        kept = self._counted(items, held)
        weakref.finalize(kept, self._held.discard, held).atexit = False  # takes no lock: it may run inside this one
        return kept

    def end(self, callers: Collection[str]) -> None:
        """Cut the streams that these callers have open."""
        for held in [*self._held]:
            if held.caller in callers:
                self._cut(held.place, "its caller is blocked")

    def _check(self, caller: str, others: list[_Held]) -> None:
        if sum(held.caller == caller for held in others) >= limits.MAX_STREAMS_PER_CALLER:
            raise BusyError(f"{limits.MAX_STREAMS_PER_CALLER} streams of this caller are open here already; end one")
        if len(others) < limits.MAX_STREAMS:
            return
        stillest = min(others, key=lambda held: held.moved)
        if self._now() - stillest.moved > limits.STALLED_S:
            self._cut(stillest.place, "its reader stalls, and others wait")
        raise BusyError(f"{limits.MAX_STREAMS} streams are open here already; try again soon")

    def _counted(self, items: Iterator[_Item], held: _Held) -> Iterator[_Item]:
        for item in items:
            held.moved = self._now()
            yield item


__all__ = ["Places"]
