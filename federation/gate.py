"""What a server refuses before it reads a request: uploads, and more calls than it has threads for.

The library runs each call in a thread of its own, from its first header until its last byte is taken, and waits for an
upload's first message before it asks a handler. So callers who send half a call, or leave answers lying, would make a
thread each.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Mapping

from pyarrow import flight

from federation import limits
from federation.handshake import PROOF_HEADER

_CALLER = PROOF_HEADER.decode()


class Gate(flight.ServerMiddlewareFactory):  # type: ignore[misc]  # the library takes a subclass only
    """Lets `MAX_CALLS` in at once, and `MAX_CALLS_PER_CALLER` of one who shows a proof; no uploads."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = (
            threading.RLock()
        )  # a call may end in the middle of another's beginning: the collector runs anywhere
        self._open: Counter[str | bytes] = Counter()

    def start_call(self, info: flight.CallInfo, headers: Mapping[str, list[str | bytes]]) -> flight.ServerMiddleware:
        """A token of the call, which the library drops when it ends."""
        match info.method:
            case flight.FlightMethod.DO_PUT:
                raise flight.FlightUnauthorizedError(
                    "this node takes no uploads by do_put; peers fetch, or the action push offers a card"
                )
            case flight.FlightMethod.DO_EXCHANGE:
                raise flight.FlightUnauthorizedError(
                    "this node does not exchange streams; use get_flight_info and do_get"
                )
        call = _Call()
        caller = next(iter(headers.get(_CALLER, ())), b"")
        with self._lock:
            self._check(caller)
            self._open[caller] += 1
        weakref.finalize(call, self._end, caller).atexit = False
        return call

    def _check(self, caller: str | bytes) -> None:
        if caller and self._open[caller] >= limits.MAX_CALLS_PER_CALLER:
            raise flight.FlightUnavailableError(
                f"{limits.MAX_CALLS_PER_CALLER} calls of this caller are open here already"
            )
        if self._open.total() >= limits.MAX_CALLS:
            raise flight.FlightUnavailableError(f"{limits.MAX_CALLS} calls are open here already; try again soon")

    def _end(self, caller: str | bytes) -> None:
        with self._lock:
            self._open[caller] -= 1
            if not self._open[caller]:
                del self._open[caller]


class _Call(flight.ServerMiddleware):  # type: ignore[misc]
    """One call, for as long as it lasts."""


__all__ = ["Gate"]
