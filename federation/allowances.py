"""How many bytes and connections a turnstile lets through: its rules, what a client expects, a pace. No sockets."""

from __future__ import annotations

import ipaddress
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from federation import limits

NO_LIMIT = 1 << 62
"""More bytes than ever come."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a turnstile lets through. The defaults are those of a server; None means without a limit."""

    connections: int = limits.MAX_CONNECTIONS
    connections_per_address: int = limits.MAX_CONNECTIONS_PER_ADDRESS
    strangers: int = limits.MAX_STRANGERS
    stranger_bytes: int = limits.STRANGER_BYTES
    stranger_s: float = limits.STRANGER_S
    caller_bytes: int | None = limits.CALLER_BYTES
    caller_share: float = limits.CALLER_SHARE
    callers_bytes: int = limits.MAX_CALLERS_BYTES
    upload_window_bytes: int = limits.UPLOAD_WINDOW_BYTES
    idle_s: float = limits.IDLE_S
    stuck_s: float = limits.STUCK_S
    age_s: float = limits.CONNECTION_AGE_S
    bytes_per_s: float | None = None


CLIENT_RULES = Rules(connections=limits.MAX_STREAMS, caller_bytes=None)
"""For a turnstile behind a client: what goes out is the client's own; what comes in, a `Budget` bounds."""


class Budget:
    """How many bytes a client expects of a server: those of the calls in progress, and a little for the transport."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._expected = limits.ANSWER_SLACK_BYTES
        self._calls = self._taken = 0
        self.overrun = False

    @contextmanager
    def expecting(self, nbytes: int) -> Iterator[None]:
        """A call whose answers are `nbytes` long at the most; what it leaves over is nobody's afterwards."""
        room = int(nbytes * limits.ANSWER_OVERHEAD) + limits.ANSWER_SLACK_BYTES
        with self._lock:
            if not self._calls:  # what came meanwhile was for nobody, and is gone
                self._taken = 0
            self._calls += 1
            self._expected += room
        try:
            yield
        finally:
            with self._lock:
                self._calls -= 1
                self._expected -= room
                self._taken = max(0, self._taken - room)

    def left(self) -> int:
        """Bytes that may still come."""
        with self._lock:
            return self._expected - self._taken

    def take(self, nbytes: int) -> None:
        """So many came."""
        with self._lock:
            self._taken += nbytes


class Bucket:
    """At most `bytes_per_s` over any second or so; None: as many as come."""

    def __init__(self, bytes_per_s: float | None, *, now: float = 0.0) -> None:
        self._bytes_per_s, self._filled = bytes_per_s, now
        self._ready = 0.0

    def left(self) -> int:
        """Bytes that may pass now."""
        return NO_LIMIT if self._bytes_per_s is None else max(0, int(self._ready))

    @property
    def waits(self) -> bool:
        """Whether nothing may pass now."""
        return not self.left()

    def take(self, nbytes: int) -> None:
        """So many passed."""
        self._ready -= nbytes

    def refilled(self, now: float) -> bool:
        """Let time pass; whether that ended a wait."""
        if self._bytes_per_s is None:
            return False
        waited = self.waits
        most = self._bytes_per_s * limits.PACE_BURST_S
        self._ready = min(most, self._ready + (now - self._filled) * self._bytes_per_s)
        self._filled = now
        return waited and not self.waits


def crowd_of(address: str) -> str:
    """Those who count as one caller: an IPv4 address, or the /64 network that one IPv6 host has for itself."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv6Address):
        return str(ip.ipv4_mapped or ipaddress.ip_network((ip, 64), strict=False))
    return str(ip)


__all__ = ["CLIENT_RULES", "NO_LIMIT", "Bucket", "Budget", "Rules", "crowd_of"]
