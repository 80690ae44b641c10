"""A TCP proxy on the loopback that counts, cuts, delays and damages what a server sends."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import Self

_CHUNK_BYTES = 64 * 1024


class Proxy:
    """Listens on a free port and passes everything on to `target_port`; faults hit what comes back from there.

    `cut_after`: closes all connections once so many bytes came back. `flip_at`: inverts a bit of that byte.
    `delay_s`: waits before each chunk. All may be set while it runs; None and 0 mean no fault.
    """

    def __init__(self, target_port: int) -> None:
        self.cut_after: int | None = None
        self.flip_at: int | None = None
        self.delay_s = 0.0
        self.bytes_back = 0
        self.bytes_there = 0
        self.connections = 0
        self._target_port = target_port
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
        self.cut_after = self.flip_at = None
        self.delay_s = 0.0
        self.bytes_back = self.bytes_there = self.connections = 0

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
            try:
                server = socket.create_connection(("127.0.0.1", self._target_port), timeout=5)
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
            while data := source.recv(_CHUNK_BYTES):
                sink.sendall(self._returned(data) if back else self._sent(data))
        except OSError:
            pass
        finally:
            for end in (source, sink):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def _sent(self, data: bytes) -> bytes:
        self.bytes_there += len(data)
        return data

    def _returned(self, data: bytes) -> bytes:
        time.sleep(self.delay_s)
        start, self.bytes_back = self.bytes_back, self.bytes_back + len(data)
        if self.cut_after is not None and self.bytes_back > self.cut_after:
            self._cut()
            raise OSError("cut")
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
