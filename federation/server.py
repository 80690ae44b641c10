"""The Flight server: it lets any Flight client list, look up and read this node's cards, and peers compare inventories.

Cards go out as the record batches that lie in their mapped files, never copied, never decoded. A handler fails with a
Flight error that says what happened, never with a traceback of ours. What the calls mean: `docs/protocol.md`.
Nothing here knows who is asking; until nodes prove who they are, off loopback takes `open=True`.
"""

from __future__ import annotations

import os
import socket
import stat
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

import pyarrow as pa
from pyarrow import flight

from federation import limits, wire
from federation.answers import Answers, Result
from federation.card_files import batches, one_line, opened
from federation.errors import FederationError
from federation.peer import format_address, is_loopback
from registry.digest import Digest
from registry.entries import CardEntry
from registry.errors import AmbiguousCardError, ArrowMoEError, UnknownCardError
from registry.logs import get_logger
from registry.store import Registry

_log = get_logger(__name__)
_Item = TypeVar("_Item")


class LoRAFlightServer:
    """Serves a registry's cards on `host`:`port` from gRPC's own threads, between `start` and `close`.

    Raises `FederationError` where `host` can be reached from elsewhere and `open` is not set.
    """

    def __init__(
        self, registry: Registry, *, node_id: str, name: str, host: str = "127.0.0.1", port: int = 0, open: bool = False
    ) -> None:
        if not (open or is_loopback(host)):
            raise FederationError(
                f"expected a loopback address, got {host}, so anybody who reaches it could read every card",
                hint="this release cannot tell peers apart; --open serves all the same, for networks you trust",
            )
        if not 0 < len(name) <= limits.MAX_NAME_CHARS or not name.isprintable():
            raise FederationError(f"expected a node name of 1 to {limits.MAX_NAME_CHARS} characters, got {name!r:.200}")
        self._registry, self._node_id, self._name = registry, node_id, name
        self.host = host
        self._port = port
        self._handlers: _Handlers | None = None

    def start(self) -> None:
        """Listen, and answer from now on. Raises `FederationError` if the address cannot be had."""
        if self._handlers is not None:
            return
        location = f"grpc+tcp://{format_address(self.host, self._port)}"
        try:
            self._handlers = _Handlers(location, self._registry, node_id=self._node_id, name=self._name)
        except (pa.ArrowException, OSError) as error:
            raise FederationError(
                f"cannot listen on {format_address(self.host, self._port)}: {one_line(error)}",
                hint="another program may hold that port; port 0 takes a free one",
            ) from error
        _log.info("flight_server_started", address=self.address, open=not is_loopback(self.host))

    def close(self) -> None:
        """End within about a second: streams get `CLOSE_GRACE_S` to end, then their connections are cut."""
        handlers, self._handlers = self._handlers, None
        if handlers is None:
            return
        shutdown = threading.Thread(target=handlers.shutdown, name="arrowmoe-flight-close", daemon=True)
        shutdown.start()
        shutdown.join(limits.CLOSE_GRACE_S)
        while shutdown.is_alive():
            cut = _cut_connections(handlers.port)
            _log.warning("flight_connections_cut", port=handlers.port, connections=cut)
            shutdown.join(limits.CLOSE_GRACE_S)

    @property
    def port(self) -> int:
        """The port listened on; the one asked for while the server does not run."""
        return self._port if self._handlers is None else int(self._handlers.port)

    @property
    def address(self) -> str:
        """``HOST:PORT``."""
        return format_address(self.host, self.port)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Handlers(flight.FlightServerBase):  # type: ignore[misc]  # the library takes handlers as a subclass only
    """Serves from construction on. `serve()` is never called: all it would add is signal handlers of its own."""

    def __init__(self, location: str, registry: Registry, *, node_id: str, name: str) -> None:
        self._registry = registry
        self._answers = Answers(registry, node_id=node_id, name=name)
        self._streams = threading.BoundedSemaphore(limits.MAX_STREAMS)
        super().__init__(location)

    def list_flights(self, context: flight.ServerCallContext, criteria: bytes) -> Iterator[flight.FlightInfo]:
        with _flight_errors():
            name = criteria.decode(errors="replace") or None
            return iter(self._listing(self._registry.list(name=name)))

    def get_flight_info(
        self, context: flight.ServerCallContext, descriptor: flight.FlightDescriptor
    ) -> flight.FlightInfo:
        with _flight_errors():
            return _info(self._registry, self._registry.entry(_ref_of(descriptor)))

    def do_get(self, context: flight.ServerCallContext, ticket: flight.Ticket) -> flight.GeneratorStream:
        with _flight_errors():
            reader = opened(self._registry, Digest(ticket.ticket.decode(errors="replace")))
            return flight.GeneratorStream(reader.schema, self._stream(_guarded(batches(reader))))

    def do_action(self, context: flight.ServerCallContext, action: flight.Action) -> Iterator[Result]:
        with _flight_errors():
            known = self._answers.actions.get(action.type)
            if known is None:
                raise flight.FlightServerError(
                    f"action {action.type[:80]!r} is unknown; list_actions names those there are"
                )
            results = _guarded(known.answer(action.body.to_pybytes()))
            return self._stream(results) if known.streams else results

    def list_actions(self, context: flight.ServerCallContext) -> list[tuple[str, str]]:
        return [(name, action.description) for name, action in self._answers.actions.items()]

    def do_put(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        raise flight.FlightUnauthorizedError("this node takes no uploads; publish on your own node, peers will fetch")

    def do_exchange(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        raise flight.FlightUnauthorizedError("this node does not exchange streams; use get_flight_info and do_get")

    def get_schema(self, context: Any, descriptor: flight.FlightDescriptor) -> flight.SchemaResult:
        with _flight_errors():
            return flight.SchemaResult(opened(self._registry, self._registry.entry(_ref_of(descriptor)).digest).schema)

    def _stream(self, items: Iterator[Any]) -> Iterator[Any]:
        """`items`, holding one of the `MAX_STREAMS` places until the call ends, even if it never starts to read."""
        if not self._streams.acquire(blocking=False):
            raise flight.FlightUnavailableError(f"{limits.MAX_STREAMS} streams are open here already; try again soon")
        weakref.finalize(items, self._streams.release).atexit = False
        return items

    def _listing(self, entries: Iterable[CardEntry]) -> list[flight.FlightInfo]:
        """Infos within `MAX_LISTING_BYTES`: the library sends a listing only when it is whole."""
        infos: list[flight.FlightInfo] = []
        size = 0
        for entry in entries:
            infos.append(info := _info(self._registry, entry))
            size += sum(map(len, (info.schema.metadata or {}).values()))
            if size > limits.MAX_LISTING_BYTES:
                raise flight.FlightServerError(
                    f"a listing ends at {limits.MAX_LISTING_BYTES} bytes of manifests; "
                    f"give a card's name as criteria, or use the {wire.ACTION_INVENTORY!r} action"
                )
        return infos


def _ref_of(descriptor: flight.FlightDescriptor) -> str:
    """The card that ``skills / REF``, ``skills / NAME / VERSION`` or ``skills / NAME / VERSION / DIGEST`` means."""
    parts = [part.decode(errors="replace") for part in descriptor.path or []]
    match parts:
        case [wire.DESCRIPTOR_ROOT, ref] | [wire.DESCRIPTOR_ROOT, _, _, ref]:
            return str(ref)
        case [wire.DESCRIPTOR_ROOT, name, version]:
            return f"{name}@{version}"
    raise UnknownCardError(f"expected the path skills/NAME, skills/NAME/VERSION or skills/DIGEST, got {parts!r:.200}")


def _info(registry: Registry, entry: CardEntry) -> flight.FlightInfo:
    reader = opened(registry, entry.digest)
    rows = sum(batch.num_rows for batch in batches(reader))
    path = flight.FlightDescriptor.for_path(wire.DESCRIPTOR_ROOT, entry.name, entry.version, entry.digest)
    endpoint = flight.FlightEndpoint(flight.Ticket(entry.digest), [])
    return flight.FlightInfo(reader.schema, path, [endpoint], rows, entry.nbytes)


def _guarded(items: Iterator[_Item]) -> Iterator[_Item]:
    """`items`, whose errors are Flight errors too."""
    with _flight_errors():
        yield from items


@contextmanager
def _flight_errors() -> Iterator[None]:
    """Turn what goes wrong in a handler into a Flight error; of any other exception the library sends the traceback."""
    try:
        yield
    except flight.FlightError:
        raise
    except (UnknownCardError, AmbiguousCardError) as error:
        raise flight.FlightServerError(str(error), wire.NOT_FOUND) from None
    except ArrowMoEError as error:
        raise flight.FlightServerError(str(error)) from None
    except Exception:  # noqa: BLE001  # the boundary: what is raised from here is sent with its traceback
        _log.exception("flight_handler_failed")
        raise flight.FlightInternalError("this node failed to answer; its log says why") from None


def _cut_connections(port: int) -> int:
    """Shut down this process's accepted connections on `port`; returns how many.

    gRPC's shutdown waits for every call, and a reader that stalls never ends its own. The library passes no deadline
    on and cannot cancel a call, so the socket under it goes.
    """
    cut = 0
    for descriptor in [int(path.name) for path in Path("/dev/fd").iterdir()]:
        cut += _with_socket(descriptor, lambda connection: _cut(connection, port))
    return cut


def _with_socket(descriptor: int, act: Callable[[socket.socket], bool]) -> bool:
    try:
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            return False
        duplicate = os.dup(descriptor)
    except OSError:  # closed since it was listed
        return False
    with socket.socket(fileno=duplicate) as connection:
        return act(connection)


def _cut(connection: socket.socket, port: int) -> bool:
    try:
        if connection.family not in (socket.AF_INET, socket.AF_INET6) or connection.getsockname()[1] != port:
            return False
        connection.getpeername()  # a listening socket has none
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return False
    return True


__all__ = ["LoRAFlightServer"]
