"""How fast bytes may pass."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Pace:
    """Lets bytes pass at `bytes_per_s` at the most, over all that share it; None: as fast as they come."""

    def __init__(self, bytes_per_s: float | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._bytes_per_s, self._clock = bytes_per_s, clock
        self._lock = threading.Lock()
        self._free_at = clock()

    def spend(self, nbytes: int, wait: Callable[[float], object] = time.sleep) -> None:
        """Wait until `nbytes` that have passed are within the rate.

        `wait` sleeps for so many seconds, and may return early, as that of a `threading.Event` does.
        """
        if self._bytes_per_s is None:
            return
        with self._lock:
            now = self._clock()
            self._free_at = max(self._free_at, now) + nbytes / self._bytes_per_s
            delay_s = self._free_at - now
        wait(delay_s)


__all__ = ["Pace"]
