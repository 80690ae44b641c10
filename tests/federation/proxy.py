"""A TCP proxy on the loopback that counts, cuts, delays, damages and keeps from passing what a server sends."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from typing import Self

CHUNK_BYTES = 64 * 1024
_ALWAYS = 1 << 30


class Proxy:
    """Listens on a free port and passes everything on to `target_port`; faults hit what comes back from there.

    `cut_after`: closes all connections once so many bytes came back, and each later one at its first. `cuts_left`:
    how often at the most. `flip_at`: inverts a bit of that byte. `delay_s`: waits before each chunk. `cut_chance`: of a
    chunk to be lost with its connection, by `dice`. `record`: what came back is kept there. All may be set while it
    runs, and `target_port` too; None and 0 mean no fault.
    """

    def __init__(self, target_port: int, *, dice: random.Random | None = None) -> None:
        self.cut_after: int | None = None
        self.cuts_left = _ALWAYS
        self.flip_at: int | None = None
        self.delay_s = 0.0
        self.cut_chance = 0.0
        self.record: bytearray | None = None
        self.cuts = 0
        self._dice = dice or random.Random(0)
        self._parted = False
        self.bytes_back = 0
        self.bytes_there = 0
        self.connections = 0
        self.target_port = target_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._spawn(self._accept)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def reset(self) -> None:
        """Count from zero, without faults."""
        self.cut_after = self.flip_at = self.record = None
        self.cuts_left, self.cuts = _ALWAYS, 0
        self.delay_s = self.cut_chance = 0.0
        self.bytes_back = self.bytes_there = self.connections = 0

    def part(self) -> None:
        """Let nothing pass any more: what is connected is cut, and nobody is let in."""
        self._parted = True
        self._cut()

    def heal(self) -> None:
        """Let everything pass again."""
        self._parted = False

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._cut()
        for thread in list(self._threads):
            thread.join(5)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _spawn(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True, name="proxy")  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._parted:
                client.close()
                continue
            try:
                server = socket.create_connection(("127.0.0.1", self.target_port), timeout=5)
                server.settimeout(None)
            except OSError:
                client.close()
                continue
            self.connections += 1
            with self._lock:
                self._sockets += [client, server]
            self._spawn(self._pump, client, server, False)
            self._spawn(self._pump, server, client, True)

    def _pump(self, source: socket.socket, sink: socket.socket, back: bool) -> None:
        try:
            while data := source.recv(CHUNK_BYTES):
                sink.sendall(self._returned(data, sink) if back else self._sent(data))
        except OSError:
            pass
        finally:
            for end in (source, sink):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def _sent(self, data: bytes) -> bytes:
        self.bytes_there += len(data)
        return data

    def _returned(self, data: bytes, sink: socket.socket) -> bytes:
        time.sleep(self.delay_s)
        if self._dice.random() < self.cut_chance:
            self.cuts += 1
            raise OSError("cut by chance")
        start, self.bytes_back = self.bytes_back, self.bytes_back + len(data)
        if self.cut_after is not None and self.cuts_left and self.bytes_back > self.cut_after:
            self.cuts_left, self.cuts = self.cuts_left - 1, self.cuts + 1
            sink.sendall(data[: max(0, self.cut_after - start)])
            self._cut()
            raise OSError("cut")
        if self.record is not None:
            self.record += data
        if self.flip_at is not None and start <= self.flip_at < self.bytes_back:
            damaged = bytearray(data)
            damaged[self.flip_at - start] ^= 0x10
            return bytes(damaged)
        return data

    def _cut(self) -> None:
        with self._lock:
            sockets, self._sockets = self._sockets, []
        for end in sockets:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
