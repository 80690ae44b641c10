"""The turnstile: a relay that stands before a gRPC server, or behind a gRPC client, and counts bytes.

gRPC takes in a message of any size whole before anyone may look at it, keeps as many calls open as there are, and
waits for readers for ever. So it gets its bytes from here, and no more of them than `Rules` allow: a caller may send a
fixed allowance and a share of what it was sent, an answer may be as long as its call said. TLS passes through
unopened; nothing here knows what the bytes mean. One thread and one buffer for all connections; a sink that waits is
what makes its source wait. Measured: receiving into one buffer costs as little as `splice`, and works everywhere.
"""

from __future__ import annotations

import os
import selectors
import socket
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TypeAlias

from federation import limits
from federation.allowances import NO_LIMIT, Bucket, Budget, Rules, crowd_of
from registry.logs import get_logger

_log = get_logger(__name__)

Address: TypeAlias = "tuple[str, int] | tuple[str, int, int, int]"
"""As `socket` has it; an IPv6 one may name a flow and a scope."""

_BUFFER_BYTES = 256 * 1024
_TICK_S = 0.25
_PACE_S = 0.01
_ACCEPT_AT_ONCE = 64
_QUIET_S = 1.0
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Turnstile:
    """Listens on `host`:`port` from construction on; between `start` and `close` passes everything on to its target.

    A caller is known by its *place*, the port from which the target sees it come. `budget` bounds what comes back, over
    all connections. Raises `OSError` if the address cannot be had.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        rules: Rules | None = None,
        budget: Budget | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rules, self._budget, self._now = rules or Rules(), budget, now
        self._target: Address = ("", 0)
        self._listener = _listening(host, port)
        self.port: int = self._listener.getsockname()[1]
        self._woken, self._waker = socket.socketpair()
        self._woken.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._connections: dict[int, _Connection] = {}
        self._to_cut: deque[tuple[int, str]] = deque()
        self._refused: Counter[str] = Counter()
        self._pace = Bucket(self._rules.bytes_per_s)
        self._closing = False
        self._thread: threading.Thread | None = None

    def start(self, target: Address) -> None:
        """Pass who connects from now on to `target`, whose host is an IP address; may be called again for another."""
        self._target = target
        if self._thread is None and not self._closing:
            self._thread = threading.Thread(target=self._run, name="arrowmoe-turnstile", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Cut every connection and give the port back."""
        self._closing = True
        self._wake()
        if self._thread is not None:
            self._thread.join()
        for end in (self._listener, self._waker, self._woken):
            end.close()

    def admit(self, place: int) -> None:
        """The caller there has proven who it is: no stranger any more."""
        connection = self._connections.get(place)
        if connection is not None:
            connection.admitted = True

    def took_in(self, place: int, nbytes: int) -> None:
        """A handler has taken in `nbytes` of a card that the caller may push; they count no more, and more may come."""
        connection = self._connections.get(place)
        if connection is not None:
            connection.uploads = True
            connection.taken_in += nbytes

    def cut(self, place: int, reason: str) -> None:
        """End the connection there, soon; `reason` is for the log."""
        self._to_cut.append((place, reason))
        self._wake()

    def address_of(self, place: int) -> str | None:
        """The caller's own address; None if no connection of ours comes from there."""
        connection = self._connections.get(place)
        return None if connection is None else connection.address

    @property
    def open(self) -> int:
        """How many connections there are now."""
        return len(self._connections)

    def _wake(self) -> None:
        try:
            self._waker.send(b"\0")
        except OSError:  # closed, or woken so often that it is awake anyway
            return

    def _run(self) -> None:
        with ExitStack() as stack:
            stack.callback(self._selector.close)
            stack.callback(self._cut_all)
            self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
            self._selector.register(self._woken, selectors.EVENT_READ, lambda _: self._drain())
            checked = self._now()
            while not self._closing:
                for key, mask in self._selector.select(_PACE_S if self._pace.waits else _TICK_S):
                    key.data(mask)
                if self._pace.refilled(self._now()):
                    for connection in self._connections.values():
                        self._watch(connection)
                if (now := self._now()) - checked >= _TICK_S:
                    checked = now
                    self._enforce(now)

    def _drain(self) -> None:
        self._woken.recv(4096)
        while self._to_cut:
            place, reason = self._to_cut.popleft()
            if (connection := self._connections.get(place)) is not None:
                self._cut(connection, reason)

    def _accept(self, _: int) -> None:
        for _ in range(_ACCEPT_AT_ONCE):
            try:
                caller, address = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:  # the process may have no descriptor left: nothing to do but to wait for one
                self._refused[f"cannot accept: {error.strerror}"] += 1
                return
            self._enter(caller, str(address[0]))

    def _enter(self, caller: socket.socket, address: str) -> None:
        if self._crowded(crowd_of(address)):
            self._refused["too many connections from one address"] += 1
            _close(caller, reset=True)
            return
        server = socket.socket(socket.AF_INET6 if ":" in self._target[0] else socket.AF_INET)
        for end in (caller, server):
            end.setblocking(False)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        server.connect_ex(self._target)  # what became of it, the selector will say
        connection = _Connection(caller, server, address=address, now=self._now())
        self._connections[connection.place] = connection
        self._watch(connection)
        self._evict()

    def _crowded(self, crowd: str) -> bool:
        """Whether one more from there is too many."""
        here = sum(connection.crowd == crowd for connection in self._connections.values())
        return here >= self._rules.connections_per_address

    def _evict(self) -> None:
        """Over a limit the oldest stranger, or the connection that is quiet longest, makes room for who comes."""
        if len(self._connections) > self._rules.connections:
            quietest = min(self._connections.values(), key=lambda connection: connection.moved)
            self._cut(quietest, "too many connections, this one quiet longest")
        strangers = [connection for connection in self._connections.values() if not connection.admitted]
        if self._rules.caller_bytes is not None and len(strangers) > self._rules.strangers:
            self._cut(strangers[0], "too many who have not proven who they are")

    def _on(self, connection: _Connection, end: socket.socket, mask: int) -> None:
        if self._connections.get(connection.place) is not connection:  # cut since the selector named it
            return
        outgoing, incoming = connection.flows(end)
        try:
            connection.check_connected()
            if mask & selectors.EVENT_WRITE:
                incoming.flush(self._now())
            if mask & selectors.EVENT_READ:
                self._move(connection, outgoing)
        except OSError as error:
            self._lost(connection, error)
            return
        if self._connections.get(connection.place) is connection:
            if connection.down.finished:
                self._close(connection)
            else:
                self._watch(connection)

    def _lost(self, connection: _Connection, error: OSError) -> None:
        """An end went away. Callers do that; the target should not."""
        if connection.connecting:
            self._cut(connection, f"the server behind does not answer: {error.strerror}")
        else:
            _log.debug("turnstile_connection_lost", address=connection.address, error=error.strerror)
            self._close(connection, reset=True)

    def _move(self, connection: _Connection, flow: _Flow) -> None:
        """Take what waits at `flow`'s source, if the rules allow that much, and pass it on."""
        up = flow is connection.up
        left = self._caller_left(connection) if up else self._answer_left()
        room = min(len(self._buffer), left + 1, NO_LIMIT if up else self._pace.left())
        nbytes = flow.receive(self._buffer[:room]) if room else 0
        if nbytes > left:
            self._overrun(connection, up)
            return
        connection.moved = self._now()
        if not up:
            self._pace.take(nbytes)
            if self._budget is not None:
                self._budget.take(nbytes)
        flow.send(self._buffer[:nbytes], connection.moved)

    def _caller_left(self, connection: _Connection) -> int:
        """Bytes that this caller may still send."""
        rules = self._rules
        if rules.caller_bytes is None:
            return NO_LIMIT
        if not connection.admitted:
            return rules.stranger_bytes - connection.up.moved
        allowed = rules.caller_bytes + int(connection.down.moved * rules.caller_share)
        if connection.uploads:
            allowed += rules.upload_window_bytes + int(connection.taken_in * (1 + limits.UPLOAD_OVERHEAD))
        return allowed - connection.up.moved

    def _answer_left(self) -> int:
        return NO_LIMIT if self._budget is None else max(0, self._budget.left())

    def _overrun(self, connection: _Connection, up: bool) -> None:
        if self._budget is not None and not up:
            self._budget.overrun = True
        who = "a caller" if connection.admitted else "a stranger"
        self._cut(connection, f"{who} sent more than it may" if up else "the server sent more than was asked for")

    def _watch(self, connection: _Connection) -> None:
        """Wait for what each end of the connection can do next."""
        for end in (connection.caller, connection.server):
            outgoing, incoming = connection.flows(end)
            paced = outgoing is connection.down and self._pace.waits
            reads = outgoing.wants_read and not connection.connecting and not paced
            writes = incoming.pending or (connection.connecting and end is connection.server)
            self._set_interest(
                connection, end, (selectors.EVENT_READ if reads else 0) | (selectors.EVENT_WRITE if writes else 0)
            )

    def _set_interest(self, connection: _Connection, end: socket.socket, interest: int) -> None:
        before = connection.interest.get(end.fileno(), 0)
        if before == interest:
            return
        connection.interest[end.fileno()] = interest
        if not interest:
            self._selector.unregister(end)
            return
        register = self._selector.modify if before else self._selector.register
        register(end, interest, lambda mask: self._on(connection, end, mask))

    def _enforce(self, now: float) -> None:
        """End what takes too long or holds too much; say once a tick how many were refused."""
        for connection in list(self._connections.values()):
            if reason := self._late(connection, now):
                self._cut(connection, reason)
            elif now - connection.since > self._rules.age_s and now - connection.moved > _QUIET_S:
                self._close(connection)
        total = sum(connection.held for connection in self._connections.values())
        if self._rules.caller_bytes is not None and total > self._rules.callers_bytes:
            largest = max(self._connections.values(), key=lambda connection: connection.held)
            self._cut(largest, "callers sent more than all may together, this one the most")
        if self._refused:
            _log.warning("turnstile_refused", port=self.port, reasons=dict(self._refused))
            self._refused.clear()

    def _late(self, connection: _Connection, now: float) -> str | None:
        rules = self._rules
        if rules.caller_bytes is not None and not connection.admitted and now - connection.since > rules.stranger_s:
            return "did not prove who it is in time"
        if connection.connecting and now - connection.since > limits.CONNECT_S:
            return "the server behind does not answer"
        if any(flow.pending and now - flow.sent > rules.stuck_s for flow in (connection.up, connection.down)):
            return "takes nothing of what it is sent"
        if now - connection.moved > rules.idle_s:
            return "nothing passed for too long"
        return None

    def _cut(self, connection: _Connection, reason: str) -> None:
        self._refused[reason] += 1
        self._close(connection, reset=True)

    def _cut_all(self) -> None:
        for connection in list(self._connections.values()):
            self._close(connection, reset=True)

    def _close(self, connection: _Connection, *, reset: bool = False) -> None:
        del self._connections[connection.place]
        for end in (connection.caller, connection.server):
            self._set_interest(connection, end, 0)
            _close(end, reset=reset)


@dataclass(kw_only=True)
class _Flow:
    """Bytes on their way from `source` to `sink`. `sent`: when the sink last took some."""

    source: socket.socket
    sink: socket.socket
    sent: float
    moved: int = 0
    pending: bytes = b""
    ended: bool = False
    finished: bool = False

    @property
    def wants_read(self) -> bool:
        return not (self.ended or self.pending)

    def receive(self, buffer: memoryview) -> int:
        """How many bytes came into `buffer` without waiting."""
        try:
            nbytes = self.source.recv_into(buffer)
        except BlockingIOError:
            return 0
        self.ended = not nbytes
        self.moved += nbytes
        return nbytes

    def send(self, data: memoryview, now: float) -> None:
        """Pass `data` on; what the sink does not take now waits. After the last byte the sink hears of the end."""
        try:
            taken = self.sink.send(data) if data else 0
        except BlockingIOError:
            taken = 0
        if taken or not self.pending:
            self.sent = now
        self.pending = bytes(data[taken:])
        if self.ended and not self.pending and not self.finished:
            self.finished = True
            self.sink.shutdown(socket.SHUT_WR)

    def flush(self, now: float) -> None:
        """Pass on what waits."""
        self.send(memoryview(self.pending), now)


class _Connection:
    """One caller's, and ours to the target for it."""

    def __init__(self, caller: socket.socket, server: socket.socket, *, address: str, now: float) -> None:
        self.caller, self.server, self.address = caller, server, address
        self.crowd = crowd_of(address)
        self.place: int = server.getsockname()[1]
        self.up = _Flow(source=caller, sink=server, sent=now)
        self.down = _Flow(source=server, sink=caller, sent=now)
        self.since = self.moved = now
        self.admitted = self.uploads = False
        self.taken_in = 0
        self.connecting = True
        self.interest: dict[int, int] = {}

    @property
    def held(self) -> int:
        """What the caller has sent that no handler has taken in as a part of a card."""
        return self.up.moved - self.taken_in

    def flows(self, end: socket.socket) -> tuple[_Flow, _Flow]:
        """What `end` sends, and what it is sent."""
        return (self.up, self.down) if end is self.caller else (self.down, self.up)

    def check_connected(self) -> None:
        """The first event of a connection: the target took it, or an `OSError` says why not."""
        if self.connecting:
            if error := self.server.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise OSError(error, os.strerror(error))
            self.connecting = False


def place_of(peer: str) -> int:
    """The place of a call whose gRPC peer is `peer`, ``ipv4:127.0.0.1:PORT``; 0 if that names no port."""
    port = peer.rpartition(":")[2]
    return int(port) if port.isascii() and port.isdigit() else 0


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    both = host == "::" and socket.has_dualstack_ipv6()
    listener = socket.create_server((host, port), family=family, backlog=128, dualstack_ipv6=both)
    listener.setblocking(False)
    return listener


def _close(end: socket.socket, *, reset: bool) -> None:
    """Close `end`; with `reset` at once, what it has not yet taken included."""
    if reset:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    end.close()


__all__ = ["Address", "Turnstile", "place_of"]
