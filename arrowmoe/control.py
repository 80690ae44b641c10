"""How a command talks to the running node of its home: loopback TCP, one request per connection, lines of JSON.

    → {"token": …, "method": "sync", "params": {…}}
    ← {"progress": {…}}          any number of them
    ← {"result": …}              or {"error": {"type": …, "message": …, "hint": …}}

The token stands in a file that only the home's owner can read (`arrowmoe.home`).
"""

from __future__ import annotations

import hmac
import json
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import IO, Any, Self

from arrowmoe.home import NodeError, NodeRecord
from registry.errors import ArrowMoEError
from registry.logs import get_logger

MAX_THREADS = 16
MAX_REQUEST_BYTES = 8 << 20
MAX_ANSWER_BYTES = 256 << 20
REQUEST_TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 3.0
ANSWER_TIMEOUT_S = 600.0

Progress = Callable[[Mapping[str, Any]], None]
Handler = Callable[[Mapping[str, Any], Progress], Any]
log = get_logger(__name__)


class NodeNotRunningError(NodeError):
    """No node runs on this home."""


class RemoteError(NodeError):
    """The node answered with an error; `kind` is its type there."""

    def __init__(self, message: str, *, kind: str, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.kind = kind


class ControlServer:
    """Answers requests on a loopback port with `handlers`, each in a thread of its own, between `start` and `close`."""

    def __init__(self, handlers: Mapping[str, Handler]) -> None:
        self.token = secrets.token_hex(32)
        self._handlers = handlers
        self._listener: socket.socket | None = None
        self._slots = threading.BoundedSemaphore(MAX_THREADS)
        self._threads: set[threading.Thread] = set()
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        self.port = 0

    def start(self) -> None:
        """Listen from now on."""
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=MAX_THREADS)
        self.port = self._listener.getsockname()[1]
        self._spawn(self._accept, self._listener)

    def close(self, timeout_s: float = 5.0) -> None:
        """Listen no more; answers under way get `timeout_s` in all, then their connections are cut."""
        if self._listener is None:
            return
        with suppress(OSError):  # not connected, says the kernel, and wakes up the accepting thread all the same
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        deadline = time.monotonic() + timeout_s
        for thread in self._alive():
            thread.join(max(0.0, deadline - time.monotonic()))
        with self._lock:
            for connection in self._connections:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        for thread in self._alive():
            log.warning("control_answer_abandoned", thread=thread.name)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _alive(self) -> list[threading.Thread]:
        with self._lock:
            return [thread for thread in self._threads if thread is not threading.current_thread()]

    def _spawn(self, work: Callable[[socket.socket], None], argument: socket.socket) -> None:
        def body() -> None:
            try:
                work(argument)
            finally:
                with self._lock:
                    self._threads.discard(thread)

        thread = threading.Thread(target=body, name=f"arrowmoe-control-{work.__name__.strip('_')}", daemon=True)
        with self._lock:
            self._threads.add(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return  # closed
            if self._slots.acquire(blocking=False):
                self._spawn(self._serve, connection)
            else:
                _send(connection, _error_line("NodeError", f"the node answers {MAX_THREADS} requests already", "retry"))
                connection.close()

    def _serve(self, connection: socket.socket) -> None:
        with self._lock:
            self._connections.add(connection)
        try:
            connection.settimeout(REQUEST_TIMEOUT_S)
            with connection, connection.makefile("rb") as lines:
                line = lines.readline(MAX_REQUEST_BYTES + 1)
                _send(connection, self._answer(line, _progress_to(connection)))
        except OSError as error:
            log.info("control_connection_lost", error=str(error))
        finally:
            with self._lock:
                self._connections.discard(connection)
            self._slots.release()

    def _answer(self, line: bytes, progress: Progress) -> dict[str, Any]:
        try:
            method, params = self._request(line)
            return {"result": self._handlers[method](params, progress)}
        except ArrowMoEError as error:
            kind = error.kind if isinstance(error, RemoteError) else type(error).__name__
            return _error_line(kind, str(error), error.hint)
        except Exception as error:
            log.exception("control_answer_failed")  # a bug in one answer must not end the node
            message = f"the node failed at this, which is a bug: {type(error).__name__}: {error}"
            return _error_line(type(error).__name__, message, "the node's log has the traceback")

    def _request(self, line: bytes) -> tuple[str, Mapping[str, Any]]:
        if len(line) > MAX_REQUEST_BYTES:
            raise NodeError(f"expected a request of at most {MAX_REQUEST_BYTES} bytes, got more")
        try:
            request = json.loads(line)
            token, method, params = request["token"], request["method"], request["params"]
        except (ValueError, KeyError, TypeError) as error:
            raise NodeError("expected one line of JSON with token, method and params") from error
        if not (isinstance(token, str) and hmac.compare_digest(token.encode(), self.token.encode())):
            raise NodeError("the token is not this node's", hint="it changes at each start; read node.json again")
        if method not in self._handlers or not isinstance(params, dict):
            raise NodeError(f"expected a method out of {', '.join(self._handlers)} with named params, got {method!r}")
        return method, params


def call(
    record: NodeRecord,
    method: str,
    params: Mapping[str, Any] | None = None,
    *,
    on_progress: Progress | None = None,
    timeout_s: float = ANSWER_TIMEOUT_S,
) -> Any:
    """Ask the node of `record`; `timeout_s` bounds the wait for each line. Raises `NodeError`."""
    request = {"token": record.token, "method": method, "params": dict(params or {})}
    try:
        with socket.create_connection(("127.0.0.1", record.port), timeout=CONNECT_TIMEOUT_S) as connection:
            connection.settimeout(timeout_s)
            _send(connection, request)
            with connection.makefile("rb") as lines:
                return _read_answer(lines, on_progress)
    except TimeoutError as error:
        raise NodeError(f"the node (process {record.pid}) did not answer {method!r} within {timeout_s:g} s") from error
    except OSError as error:
        raise NodeNotRunningError(
            f"the node (process {record.pid}) cannot be reached: {error}", hint="see `arrowmoe node status`"
        ) from error


def _read_answer(lines: IO[bytes], on_progress: Progress | None) -> Any:
    while True:
        line = lines.readline(MAX_ANSWER_BYTES + 1)
        if not line.endswith(b"\n"):
            raise NodeNotRunningError("the node went away before it answered", hint="its log says why")
        message = json.loads(line)
        if "result" in message:
            return message["result"]
        if "error" in message:
            error = message["error"]
            raise RemoteError(error["message"], kind=error["type"], hint=error["hint"])
        if on_progress is not None:
            on_progress(message["progress"])


def _send(connection: socket.socket, message: Mapping[str, Any]) -> None:
    connection.sendall(json.dumps(message, ensure_ascii=False, allow_nan=False).encode() + b"\n")


def _progress_to(connection: socket.socket) -> Progress:
    """Sends progress until the asker is gone; what it asked for is finished all the same."""
    gone = threading.Event()

    def send(done: Mapping[str, Any]) -> None:
        if gone.is_set():
            return
        try:
            _send(connection, {"progress": done})
        except OSError as error:
            gone.set()
            log.info("control_asker_gone", error=str(error))

    return send


def _error_line(kind: str, message: str, hint: str | None) -> dict[str, Any]:
    return {"error": {"type": kind, "message": message, "hint": hint}}


__all__ = [
    "ControlServer",
    "Handler",
    "NodeNotRunningError",
    "Progress",
    "RemoteError",
    "call",
]
