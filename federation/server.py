"""The Flight server: it lets any Flight client list, look up and read this node's cards, and peers compare inventories.

Cards go out as the record batches that lie in their mapped files, never copied, never decoded. A handler fails with a
Flight error that says what happened, never with a traceback of ours. What the calls mean: `docs/protocol.md`.
With credentials every caller proves who they are before a handler runs, and the peer book says at every call who is
answered. Without, nobody proves anything.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Self, TypeVar

from pyarrow import flight

from federation import limits, wire
from federation.access import Doorman
from federation.answers import Action, Answers, Result
from federation.card_files import batches, one_line, opened
from federation.credentials import Credentials, pem_of
from federation.errors import BusyError, FederationError, NotApprovedError, PushRefusedError
from federation.gate import Gate
from federation.handshake import Callers
from federation.membership import Membership
from federation.peer import format_address, is_loopback
from federation.places import Places
from federation.turnstile import Turnstile, place_of
from federation.uploads import Uploads
from registry.digest import Digest
from registry.entries import CardEntry
from registry.errors import AmbiguousCardError, ArrowMoEError, UnknownCardError
from registry.logs import get_logger
from registry.peers import PeerBook
from registry.store import Registry

_log = get_logger(__name__)
_Item = TypeVar("_Item")
_PRIVATE = "127.0.0.1"
"""Where gRPC listens, behind the turnstile, which has the address that callers know."""


class LoRAFlightServer:
    """Serves a registry's cards on `host`:`port` from gRPC's own threads, between `start` and `close`.

    With `credentials` it speaks TLS, callers prove their ids, and those are answered that the registry's peer book has
    approved; on the loopback, and with `open`, all that it has not blocked. Without, it speaks plaintext and answers
    everyone, on the loopback only, else it raises `FederationError`. `uploads` takes in what callers with ids push.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        node_id: str,
        name: str,
        host: str = "127.0.0.1",
        port: int = 0,
        open: bool = False,
        credentials: Credentials | None = None,
        uploads: Uploads | None = None,
    ) -> None:
        if credentials is None and not is_loopback(host):
            raise FederationError(
                f"expected a loopback address for a server without credentials, got {host}, so anybody could listen",
                hint="give it credentials: Credentials.of(registry.identity)",
            )
        if not 0 < len(name) <= limits.MAX_NAME_CHARS or not name.isprintable():
            raise FederationError(f"expected a node name of 1 to {limits.MAX_NAME_CHARS} characters, got {name!r:.200}")
        self._registry, self._node_id, self._name = registry, node_id, name
        self.host = host
        self._port = port
        self._open = open or is_loopback(host)
        self._credentials, self._uploads = credentials, uploads
        self._handlers: _Handlers | None = None

    def start(self) -> None:
        """Listen, and answer from now on. Raises `FederationError` if the address cannot be had."""
        if self._handlers is not None:
            return
        answers = Answers(self._registry, node_id=self._node_id, name=self._name)
        try:
            turnstile = Turnstile(host=self.host, port=self._port)
        except OSError as error:
            raise FederationError(
                f"cannot listen on {format_address(self.host, self._port)}: {one_line(error)}",
                hint="another program may hold that port; port 0 takes a free one",
            ) from error
        self._handlers = (
            _Handlers("grpc+tcp", turnstile, self._registry, answers)
            if self._credentials is None
            else _secured(turnstile, self._registry, answers, self._credentials, self._uploads, open=self._open)
        )
        turnstile.start((_PRIVATE, self._handlers.port))
        _log.info("flight_server_started", address=self.address, open=self._open, tls=self._credentials is not None)

    def close(self) -> None:
        """End within about a second: streams get `CLOSE_GRACE_S` to end, then their connections are cut."""
        handlers, self._handlers = self._handlers, None
        if handlers is None:
            return
        shutdown = threading.Thread(target=handlers.shutdown, name="arrowmoe-flight-close", daemon=True)
        shutdown.start()
        shutdown.join(limits.CLOSE_GRACE_S)
        if shutdown.is_alive():  # it waits for every call, and a reader that stalls never ends its own
            _log.warning("flight_connections_cut", port=handlers.turnstile.port, connections=handlers.turnstile.open)
        handlers.turnstile.close()
        shutdown.join()
        if self._uploads is not None:
            self._uploads.close()

    def cut(self, node_ids: Collection[str]) -> None:
        """End the streams that these nodes have open; further calls, the peer book refuses."""
        if self._handlers is not None:
            self._handlers.places.end(node_ids)

    @property
    def port(self) -> int:
        """The port listened on; the one asked for while the server does not run."""
        return self._port if self._handlers is None else self._handlers.turnstile.port

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

    def __init__(
        self,
        scheme: str,
        turnstile: Turnstile,
        registry: Registry,
        answers: Answers,
        *,
        doorman: Doorman | None = None,
        uploads: Uploads | None = None,
        **security: Any,
    ) -> None:
        self._registry, self._answers, self._doorman, self._uploads = registry, answers, doorman, uploads
        self._membership = Membership(registry.database)
        self.turnstile = turnstile
        self.places = Places(turnstile.cut)
        super().__init__(f"{scheme}://{format_address(_PRIVATE, 0)}", middleware={"gate": Gate()}, **security)

    def list_flights(self, context: flight.ServerCallContext, criteria: bytes) -> Iterator[flight.FlightInfo]:
        with self._answering(context, "list_flights"):
            name = criteria.decode(errors="replace") or None
            return iter(self._listing(self._registry.list(name=name)))

    def get_flight_info(
        self, context: flight.ServerCallContext, descriptor: flight.FlightDescriptor
    ) -> flight.FlightInfo:
        with self._answering(context, "get_flight_info"):
            return _info(self._registry, self._registry.entry(_ref_of(descriptor)))

    def do_get(self, context: flight.ServerCallContext, ticket: flight.Ticket) -> flight.GeneratorStream:
        with self._answering(context, "do_get") as caller:
            reader = opened(self._registry, Digest(ticket.ticket.decode(errors="replace")))
            return flight.GeneratorStream(
                reader.schema, self._stream(_guarded(batches(reader)), caller, place_of(context.peer()))
            )

    def do_action(self, context: flight.ServerCallContext, action: flight.Action) -> Iterator[Result]:
        with self._answering(context, action.type) as caller:
            known = self._actions(context, caller).get(action.type)
            if known is None:
                raise flight.FlightServerError(
                    f"action {action.type[:80]!r} is unknown; list_actions names those there are"
                )
            results = _guarded(known.answer(action.body.to_pybytes()))
            return self._stream(results, caller, place_of(context.peer())) if known.streams else results

    def list_actions(self, context: flight.ServerCallContext) -> list[tuple[str, str]]:
        with self._answering(context, "list_actions") as caller:
            return [(name, action.description) for name, action in self._actions(context, caller).items()]

    def get_schema(self, context: flight.ServerCallContext, descriptor: flight.FlightDescriptor) -> flight.SchemaResult:
        with self._answering(context, "get_schema"):
            return flight.SchemaResult(opened(self._registry, self._registry.entry(_ref_of(descriptor)).digest).schema)

    @contextmanager
    def _answering(self, context: flight.ServerCallContext, call: str) -> Iterator[str]:
        """Answer `call`, if its caller may ask it; yields their node id, empty without credentials."""
        with _flight_errors():
            caller = context.peer_identity().decode()
            if self._doorman is None or self._doorman.check(caller, call):
                self.turnstile.admit(place_of(context.peer()))
            yield caller

    def _actions(self, context: flight.ServerCallContext, caller: str) -> Mapping[str, Action]:
        """What can be asked; without credentials nobody can join."""
        if self._doorman is None:
            return self._answers.actions
        place = place_of(context.peer())
        host = self.turnstile.address_of(place)
        known = {**self._answers.actions, **self._membership.actions(caller, host)}
        if self._uploads is None:
            return known
        return {**known, **self._uploads.actions(caller, host, partial(self.turnstile.took_in, place))}

    def _stream(self, items: Iterator[Any], caller: str, place: int) -> Iterator[Any]:
        """`items`, holding a place until the call ends; without credentials each connection is a caller."""
        return self.places.take(items, caller=caller or str(place), place=place)

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
                    f"give a card's name as criteria, or use the {wire.ACTION_CHANGES!r} action"
                )
        return infos


def _secured(
    turnstile: Turnstile,
    registry: Registry,
    answers: Answers,
    credentials: Credentials,
    uploads: Uploads | None,
    *,
    open: bool,
) -> _Handlers:
    """Handlers behind TLS, which know their callers."""
    return _Handlers(
        "grpc+tls",
        turnstile,
        registry,
        answers,
        doorman=Doorman(PeerBook(registry.database), open=open, own_id=credentials.node_id),
        uploads=uploads,
        auth_handler=Callers(credentials.certificate),
        tls_certificates=[(pem_of(credentials.certificate), credentials.private_key)],
    )


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
    except NotApprovedError as error:
        raise flight.FlightUnauthorizedError(str(error), wire.NOT_APPROVED) from None
    except PushRefusedError as error:
        raise flight.FlightUnauthorizedError(str(error), wire.PUSH_REFUSED) from None
    except BusyError as error:
        raise flight.FlightUnavailableError(str(error)) from None
    except (UnknownCardError, AmbiguousCardError) as error:
        raise flight.FlightServerError(str(error), wire.NOT_FOUND) from None
    except ArrowMoEError as error:
        raise flight.FlightServerError(str(error)) from None
    except Exception:  # noqa: BLE001  # the boundary: what is raised from here is sent with its traceback
        _log.exception("flight_handler_failed")
        raise flight.FlightInternalError("this node failed to answer; its log says why") from None


__all__ = ["LoRAFlightServer"]
