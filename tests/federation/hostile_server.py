"""A Flight server made of HTTP/2 frames by hand, so that it can do what no gRPC server would. RFC 9113, RFC 7541."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from tests.federation.hostile import frame, literal

_PREFACE_BYTES = 24
_DATA, _HEADERS, _SETTINGS, _PING, _WINDOW, _CONTINUATION = 0, 1, 4, 6, 8, 9
_ACK = _END_STREAM = 1
_END_HEADERS = 4
_INITIAL_WINDOW = 4
_FRAME_BYTES = 16_384
_STATUS_200 = b"\x88"


@dataclass(kw_only=True)
class Connection:
    """One client's connection. What it sends, it sends as fast as the client's windows allow."""

    line: socket.socket
    sent: int = 0
    _window: int = 65_535
    _initial: int = 65_535
    _windows: dict[int, int] = field(default_factory=dict)
    _asked: dict[int, bytearray] = field(default_factory=dict)

    def begin(self) -> None:
        self._read(_PREFACE_BYTES)
        self.send(frame(_SETTINGS, 0, 0, b""))

    def calls(self) -> Iterator[tuple[int, bytes]]:
        """Each call's stream and the action's name, as they come."""
        while True:
            kind, flags, stream, payload = self._frame()
            if kind == _HEADERS:
                self._asked[stream] = bytearray()
            elif kind == _DATA:
                self._asked[stream] += payload
            if kind in (_HEADERS, _DATA) and flags & _END_STREAM:
                action = bytes(self._asked.pop(stream))[5:]  # behind gRPC's prefix: field 1, its length, its value
                yield stream, action[2 : 2 + action[1]]

    def answer(self, stream: int, *results: bytes) -> None:
        """What an honest server says."""
        self.headers(stream)
        for result in results:
            self.data(stream, message_of(result))
        self.send(frame(_HEADERS, _END_HEADERS | _END_STREAM, stream, literal("grpc-status", b"0")))

    def headers(self, stream: int) -> None:
        block = _STATUS_200 + literal("content-type", b"application/grpc")
        self.send(frame(_HEADERS, _END_HEADERS, stream, block))

    def endless_headers(self, stream: int, nbytes: int) -> None:
        """Metadata of so many bytes."""
        self.send(frame(_HEADERS, 0, stream, _STATUS_200))
        more = frame(_CONTINUATION, 0, stream, (literal("x-much", b"x" * 8000) * 2)[:_FRAME_BYTES])
        for _ in range(nbytes // len(more)):
            self.send(more)

    def promise(self, stream: int, nbytes: int) -> None:
        """A message of so many bytes, as many of them as are taken."""
        self.headers(stream)
        self.data(stream, b"\0" + nbytes.to_bytes(4, "big"))
        for _ in range(nbytes // _FRAME_BYTES):
            self.data(stream, bytes(_FRAME_BYTES))

    def data(self, stream: int, data: bytes) -> None:
        for start in range(0, len(data), _FRAME_BYTES):
            part = data[start : start + _FRAME_BYTES]
            while min(self._window, self._initial + self._windows.get(stream, 0)) < len(part):
                self._frame()
            self._window -= len(part)
            self._windows[stream] = self._windows.get(stream, 0) - len(part)
            self.send(frame(_DATA, 0, stream, part))

    def send(self, data: bytes) -> None:
        self.line.sendall(data)
        self.sent += len(data)

    def _frame(self) -> tuple[int, int, int, bytes]:
        head = self._read(9)
        kind, flags, stream = head[3], head[4], int.from_bytes(head[5:9], "big") & 0x7FFFFFFF
        payload = self._read(int.from_bytes(head[:3], "big"))
        match kind:
            case 4 if not flags & _ACK:
                for name, value in struct.iter_unpack(">HI", payload):
                    self._initial = value if name == _INITIAL_WINDOW else self._initial
                self.send(frame(_SETTINGS, _ACK, 0, b""))
            case 6 if not flags & _ACK:
                self.send(frame(_PING, _ACK, 0, payload))
            case 8 if stream:
                self._windows[stream] = self._windows.get(stream, 0) + int.from_bytes(payload, "big")
            case 8:
                self._window += int.from_bytes(payload, "big")
        return kind, flags, stream, payload

    def _read(self, count: int) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            part = self.line.recv(count - len(parts))
            if not part:
                raise ConnectionResetError
            parts += part
        return bytes(parts)


Deed: TypeAlias = Callable[[Connection, int], None]
"""What a server does with a call: the connection, and the call's stream."""


def doing(deeds: dict[str, Deed], heard: list[int] | None = None) -> Callable[[socket.socket], None]:
    """What to do with a connection: `deeds` by the action's name. `heard` gets the bytes sent on each."""

    def serve(line: socket.socket) -> None:
        connection = Connection(line=line)
        try:
            connection.begin()
            for stream, action in connection.calls():
                deeds[action.decode()](connection, stream)
        finally:
            if heard is not None:
                heard.append(connection.sent)

    return serve


def message_of(result: bytes) -> bytes:
    """An action's result as a gRPC message."""
    head, length = bytearray(b"\x0a"), len(result)
    while length >= 128:
        head.append(length % 128 + 128)
        length //= 128
    head.append(length)
    return b"\0" + (len(head) + len(result)).to_bytes(4, "big") + bytes(head) + result
