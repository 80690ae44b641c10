"""How fast bytes may pass."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Pace:
    """Lets bytes pass at `bytes_per_s` at the most, over all threads together; None: as fast as they come.

    `wait` sleeps for so many seconds, and may return early, as that of a `threading.Event` does.
    """

    def __init__(
        self,
        bytes_per_s: float | None,
        *,
        wait: Callable[[float], object] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bytes_per_s, self._wait, self._clock = bytes_per_s, wait, clock
        self._lock = threading.Lock()
        self._free_at = clock()

    def spend(self, nbytes: int) -> None:
        """Wait until `nbytes` that have passed are within the rate."""
        if self._bytes_per_s is None:
            return
        with self._lock:
            now = self._clock()
            self._free_at = max(self._free_at, now) + nbytes / self._bytes_per_s
            delay_s = self._free_at - now
        self._wait(delay_s)


__all__ = ["Pace"]
