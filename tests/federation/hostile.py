"""A hostile caller: HTTP/2 frames by hand, so that it can do what no gRPC client would. RFC 9113, RFC 7541."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import time
from collections.abc import Iterator
from typing import Self

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST, _SETTINGS, _PING, _WINDOW, _CONTINUATION = 0, 1, 3, 4, 6, 8, 9
_ACK = _END_STREAM = 1
_END_HEADERS = 4
_FRAME_BYTES = 16_384
_FIRST_DYNAMIC = 62
_SERVICE = "/arrow.flight.protocol.FlightService/"


class Hostile:
    """One connection to a Flight server, by TLS unless `plain`. What it sends, it sends whatever the server says."""

    def __init__(self, port: int, *, source: str = "127.0.0.1", plain: bool = False, window: int = 65_535) -> None:
        line = socket.create_connection(("127.0.0.1", port), timeout=5, source_address=(source, 0))
        self.line = line if plain else _secured(line)
        self.sent = 0
        self._stream = -1
        self._indexed: list[tuple[str, bytes]] = []
        self.send(_PREFACE + frame(_SETTINGS, 0, 0, struct.pack(">HI", 4, window)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.line.close()

    def send(self, data: bytes) -> None:
        self.line.sendall(data)
        self.sent += len(data)

    def call(self, method: str, *, headers: dict[str, bytes] | None = None, body: bytes | None = None) -> None:
        """Open a call of that Flight method; with `body` ask it in full, without let the server wait for it."""
        self._stream += 2
        fields = _fields(method, headers or {})
        block = b"".join(literal(name, value, indexed=True) for name, value in fields)
        if fields == self._indexed:  # the server has kept them all: one byte each
            block = bytes(0x80 | _FIRST_DYNAMIC + at for at in reversed(range(len(fields))))
        self._indexed = fields
        self.send(frame(_HEADERS, _END_HEADERS, self._stream, block))
        if body is not None:
            message = b"\0" + len(body).to_bytes(4, "big") + body
            self.send(frame(_DATA, _END_STREAM, self._stream, message))

    def calls(
        self, count: int, method: str, *, headers: dict[str, bytes] | None = None, body: bytes | None = None
    ) -> int:
        """Open so many calls; how many before the line was cut."""
        for opened in range(count):
            try:
                self.call(method, headers=headers, body=body)
            except OSError:
                return opened
        return count

    def shrink_window(self) -> None:
        """Take no byte more of any answer from now on."""
        self.send(frame(_SETTINGS, 0, 0, struct.pack(">HI", 4, 0)))

    def trickle(self) -> None:
        """Send one byte, if that is still possible."""
        with contextlib.suppress(OSError):
            self.send(b"\0")

    def promise(self, nbytes: int) -> None:
        """Begin a message of `nbytes` on the last call."""
        self.send(frame(_DATA, 0, self._stream, b"\0" + nbytes.to_bytes(4, "big")))

    def flood(self, nbytes: int) -> int:
        """Send up to `nbytes` of data on the last call, flow control or not; how many before the line was cut."""
        return self._until_cut(
            frame(_DATA, 0, self._stream, bytes(_FRAME_BYTES)) for _ in range(nbytes // _FRAME_BYTES)
        )

    def endless_headers(self, nbytes: int) -> int:
        """Send up to `nbytes` of metadata of one call; how many before the line was cut."""
        self._stream += 2
        start = b"".join(literal(name, value) for name, value in _fields("DoAction", {}))
        first = frame(_HEADERS, 0, self._stream, start)
        more = frame(_CONTINUATION, 0, self._stream, (literal("x-much", b"x" * 8000) * 3)[:_FRAME_BYTES])
        return self._until_cut([first, *[more] * (nbytes // len(more))])

    def is_cut(self, within_s: float = 5.0) -> bool:
        """Whether the server, or what stands before it, ends the line."""
        self.line.settimeout(within_s)
        deadline = time.monotonic() + within_s
        try:
            while time.monotonic() < deadline:
                if not self.line.recv(1 << 16):
                    return True
        except TimeoutError:
            return False
        except OSError:
            return True
        return False

    def hears(self, expected: bytes, within_s: float = 5.0) -> bool:
        """Whether the server says that."""
        self.line.settimeout(within_s)
        parts = bytearray()
        with contextlib.suppress(OSError):
            while expected not in parts and (part := self.line.recv(1 << 16)):
                parts += part
        return expected in parts

    def _until_cut(self, frames: Iterator[bytes] | list[bytes]) -> int:
        before = self.sent
        with contextlib.suppress(OSError):
            for data in frames:
                self.send(data)
        return self.sent - before


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def _fields(method: str, headers: dict[str, bytes]) -> list[tuple[str, bytes]]:
    fields = {
        ":method": b"POST",
        ":scheme": b"http",
        ":path": (_SERVICE + method).encode(),
        ":authority": b"arrowmoe.invalid",
        "te": b"trailers",
        "content-type": b"application/grpc",
        **headers,
    }
    return list(fields.items())


def literal(name: str, value: bytes, *, indexed: bool = False) -> bytes:
    """A header field, its strings as they are; with `indexed` the server is to remember it."""
    return (b"\x40" if indexed else b"\x10") + _string(name.encode()) + _string(value)


def _string(data: bytes) -> bytes:
    if len(data) < 127:
        return bytes([len(data)]) + data
    rest, out = len(data) - 127, bytearray([127])
    while rest >= 128:
        out.append(rest % 128 + 128)
        rest //= 128
    return bytes([*out, rest]) + data


def _secured(line: socket.socket) -> ssl.SSLSocket:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    return context.wrap_socket(line)
