"""The server that is tested: Flight's own calls to it, and what the checks so far have found out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import pyarrow as pa
from pyarrow import flight

from federation import limits, wire
from federation.credentials import SERVER_NAME, pem_of
from federation.errors import FederationError
from federation.handshake import PROOF_HEADER, proof
from federation.peer import format_address, parse_address
from registry.card import LoRACard
from registry.changes import Position
from registry.digest import Digest
from registry.identity import Identity
from registry.tombstones import Tombstone

Headers: TypeAlias = "Sequence[tuple[bytes, bytes]]"

CALL_ERRORS = (pa.ArrowException, OSError, UnicodeError)
"""What the library raises where a call fails, with whatever status."""

_NO_REFUSALS = (
    flight.FlightUnavailableError,
    flight.FlightTimedOutError,
    flight.FlightCancelledError,
    flight.FlightInternalError,
)
_OPTIONS = (
    ("grpc.max_receive_message_length", limits.CONFORMANCE_MESSAGE_BYTES),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
)


class Failed(FederationError):
    """What came is not what the protocol says."""


class NotTested(FederationError):
    """The server as it is gives no opportunity to test this."""


class Subject:
    """The server at `address`. With `identity` the line is TLS and calls are proven to be of that node.

    Call it within `connected` only. Facts are there once the checks passed that find them out.
    """

    def __init__(self, address: str, identity: Identity | None) -> None:
        self.host, self.port = parse_address(address)
        self.address = format_address(self.host, self.port)
        self.identity = identity
        self.errors: list[str] = []
        """The text of every error that the server answered with, as it came."""
        self.certificate = b""
        self.node_id = ""
        self.health: wire.Health | None = None
        self.known = Position()
        self.entries: dict[Digest, wire.InventoryEntry] = {}
        self.tombstones: list[Tombstone] = []
        self.cards: dict[Digest, LoRACard] = {}
        self.messages: dict[Digest, list[bytes]] = {}
        self._channel: flight.FlightClient | None = None

    @contextmanager
    def connected(self) -> Iterator[None]:
        """A new connection, for the calls made meanwhile."""
        target = format_address(self.host, self.port)
        if self.certificate:
            roots = {"tls_root_certs": pem_of(self.certificate), "override_hostname": SERVER_NAME}
            channel = flight.FlightClient(f"grpc+tls://{target}", generic_options=[*_OPTIONS], **roots)
        else:
            channel = flight.FlightClient(f"grpc+tcp://{target}", generic_options=[*_OPTIONS])
        with channel:
            self._channel = channel
            try:
                yield
            finally:
                self._channel = None

    @property
    def channel(self) -> flight.FlightClient:
        """The connection there is now."""
        if self._channel is None:
            raise RuntimeError("expected calls within `connected`")
        return self._channel

    def options(self, headers: Headers | None = None) -> flight.FlightCallOptions:
        """A deadline, and the proof of who asks unless there are other `headers`."""
        if headers is None:
            headers = [] if self.identity is None else [(PROOF_HEADER, proof(self.identity, self.certificate))]
        return flight.FlightCallOptions(timeout=limits.CONFORMANCE_TIMEOUT_S, headers=list(headers))

    def action(self, kind: str, body: bytes = b"", *, headers: Headers | None = None) -> list[bytes]:
        """The results of an action, which end at `CONFORMANCE_CARD_BYTES`."""
        results, size = [], 0
        for result in self.channel.do_action(flight.Action(kind, body), self.options(headers)):
            results.append(result.body.to_pybytes())
            size += len(results[-1])
            if size > limits.CONFORMANCE_CARD_BYTES or len(results) > limits.CONFORMANCE_CARD_BYTES >> 10:
                raise Failed(f"{kind} answered with more than {size} bytes in {len(results)} results")
        return results

    def only(self, kind: str, body: bytes = b"") -> bytes:
        """The only result of an action."""
        results = self.action(kind, body)
        if len(results) != 1:
            raise Failed(f"{len(results)} results")
        return results[0]

    def changes(self, known: Position) -> wire.ChangesPage:
        """A page of changes, whose form is checked."""
        return wire.decode_changes(self.only(wire.ACTION_CHANGES, wire.encode_changes_request(known)), known)

    def refused(self, call: Callable[[], object], what: object) -> Exception:
        """The error with which the server answers `call`, which it has to refuse."""
        try:
            call()
        except flight.FlightUnauthorizedError:
            raise
        except CALL_ERRORS as error:
            self.errors.append(str(error))
            if isinstance(error, _NO_REFUSALS):
                raise Failed(f"the call failed instead of being refused: {_named(error)}, for {what!r:.80}") from error
            return error
        raise Failed(f"an answer to {what!r:.80}")

    def refused_all(self, kind: str, bodies: Iterable[bytes]) -> str:
        """Have the server refuse an action with each of these bodies."""
        bodies = list(bodies)
        for body in bodies:
            self.refused(lambda body=body: self.action(kind, body), body)  # type: ignore[misc]
        return f"{len(bodies)} refused"

    def not_found(self, call: Callable[[], object], what: object) -> str:
        """Have the server say that it has no such card."""
        error = self.refused(call, what)
        if not isinstance(error, flight.FlightServerError) or error.extra_info != wire.NOT_FOUND:
            raise Failed(f"{_named(error)} for {what!r:.80}")
        return "UNKNOWN with not-found"

    def some(self) -> list[Digest]:
        """Cards to look at: the smallest, and the largest of those that are not too large."""
        offered = sorted(self.entries.values(), key=lambda entry: (entry.nbytes, entry.digest))
        fitting = [entry.digest for entry in offered if entry.nbytes <= limits.CONFORMANCE_CARD_BYTES]
        if not fitting:
            raise NotTested(f"it offers no card of at most {limits.CONFORMANCE_CARD_BYTES} bytes; publish one there")
        return list(dict.fromkeys([*fitting[: limits.CONFORMANCE_CARDS - 1], fitting[-1]]))


def brief(error: Exception) -> str:
    """The first line of an error without what the library adds, printable and short."""
    text = str(error).partition("\n")[0].split(". gRPC client debug context")[0].split(". Detail: ")[0]
    return "".join(character for character in text if character.isprintable())[:300]


def _named(error: Exception) -> str:
    extra = getattr(error, "extra_info", b"") or b""
    return f"{type(error).__name__}{f' with {extra!r:.40}' if extra else ''} ({brief(error)})"


__all__ = ["CALL_ERRORS", "Failed", "Headers", "NotTested", "Subject", "brief"]
