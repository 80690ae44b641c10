"""The line to one peer: connects, makes sure who answers, proves who asks, and names what goes wrong.

With credentials it is TLS, always: the server's certificate is read first, checked, and then the only root of the
connection. Without, it is plaintext, and nobody proves anything. What the peer got wrong is a `PeerError`, what the
line got wrong a `TransportError`.
"""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

import pyarrow as pa
from pyarrow import flight

from federation import limits, wire
from federation.allowances import CLIENT_RULES, Budget
from federation.credentials import SERVER_NAME, Credentials, node_of, pem_of
from federation.errors import (
    CopiedHomeError,
    FederationError,
    IdentityError,
    NotApprovedError,
    PeerError,
    PeerUnreachableError,
    PushRefusedError,
    TransportError,
)
from federation.handshake import PROOF_HEADER, certificate_at, proof
from federation.peer import format_address, parse_address, shown_id
from federation.sightings import Sightings
from federation.turnstile import Address, Turnstile

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")
_ARROW_ERRORS = (pa.ArrowException, OSError, UnicodeError)
_GONE = (flight.FlightUnavailableError, flight.FlightUnauthenticatedError)
_OPTIONS = (
    ("grpc.max_receive_message_length", limits.MAX_MESSAGE_BYTES),
    ("grpc.http2.bdp_probe", 0),  # else gRPC reads ahead as far as it likes: a whole card of 64 MiB was seen
    ("grpc.http2.lookahead_bytes", limits.READ_AHEAD_BYTES),
    ("grpc.enable_http_proxy", 0),  # a peer is on this network, a proxy of the environment is not
    ("grpc.use_local_subchannel_pool", 1),  # else a new client inherits an old one's back-off
)


@dataclass(frozen=True, kw_only=True)
class Proven:
    """Who answers: a node id, and the certificate (DER) of its process."""

    node_id: str
    certificate: bytes


@dataclass(frozen=True, kw_only=True)
class _Connection:
    channel: flight.FlightClient
    headers: tuple[tuple[bytes, bytes], ...] = ()
    proven: Proven | None = None


class Line:
    """Connects at the first call, and anew after a failure; safe to share between threads; must not outlive a `fork`.

    `node_id`: the only node that may answer; empty for whichever does. `calls`: how many its connection has had.
    """

    def __init__(
        self,
        address: str,
        *,
        credentials: Credentials | None,
        node_id: str,
        timeout_s: float,
        sightings: Sightings | None = None,
    ) -> None:
        self._host, self._port = parse_address(address)
        self.address = format_address(self._host, self._port)
        self._credentials, self._node_id, self._timeout_s = credentials, node_id, timeout_s
        self._sightings = sightings
        self._lock = threading.Lock()
        self._connection: _Connection | None = None
        self.calls = 0
        self._closed = False
        self._budget = Budget()
        self._turnstile: Turnstile | None = None

    def proven(self) -> Proven:
        """Who answers there. Raises `FederationError` on a plaintext line, else as `call` does."""
        found = self._connected().proven
        if found is None:
            raise FederationError(f"expected a line with credentials to {self.address}, got one that proves nothing")
        return found

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection that has not failed."""
        return self._connection is not None

    def renew(self) -> None:
        """Connect anew at the next call; calls in progress go on."""
        with self._lock:
            self._connection = None

    def call(
        self, action: flight.Action, timeout_s: float, broken: type[TransportError], nbytes: int
    ) -> Generator[memoryview, None, None]:
        """The results of an action, `nbytes` at the most, one by one; closing the iterator early cancels the call.

        A peer that sends more is cut off; gRPC itself would take in a message of any size. A connection that was there
        before and turns out to be gone is made anew, once: the peer may have been started again, or have cut it.

        `broken` is what a failing line is called at this point. Raises `PeerError` for what the peer got wrong:
        `IdentityError` if it is another node than expected, `NotApprovedError` if it does not answer this one.
        """
        may_be_gone = self.is_connected
        try:
            with closing(self._called(action, timeout_s, broken, nbytes)) as results:
                for result in results:
                    may_be_gone = False
                    yield result
        except TransportError as error:  # not one that sent too much: that is an answer of a kind
            if not may_be_gone or not isinstance(error.__cause__, _GONE):
                raise
            yield from self._called(action, timeout_s, broken, nbytes)

    def _called(
        self, action: flight.Action, timeout_s: float, broken: type[TransportError], nbytes: int
    ) -> Generator[memoryview, None, None]:
        connection = self._connected()
        self.calls += 1
        options = flight.FlightCallOptions(timeout=timeout_s, headers=list(connection.headers))
        with self._errors(broken, connection), self._budget.expecting(nbytes):
            for result in connection.channel.do_action(action, options):
                yield memoryview(result.body).cast("B")

    def close(self) -> None:
        """Close the connection, for good."""
        with self._lock:
            self._closed = True
            connection, self._connection = self._connection, None
        if connection is not None:
            connection.channel.close()
        if self._turnstile is not None:
            self._turnstile.close()

    def _connected(self) -> _Connection:
        with self._lock:
            if self._closed:
                raise PeerUnreachableError(f"the line to {self.address} was closed")
            if self._connection is None:
                self.calls = 0
                with self._errors(PeerUnreachableError):
                    self._connection = self._plain() if self._credentials is None else self._secured(self._credentials)
            return self._connection

    def _plain(self) -> _Connection:
        return _Connection(channel=flight.FlightClient(f"grpc+tcp://{self._behind()}", generic_options=[*_OPTIONS]))

    def _secured(self, credentials: Credentials) -> _Connection:
        certificate = certificate_at(self._host, self._port, timeout_s=self._timeout_s)
        node_id = node_of(certificate, now=datetime.now(UTC))
        self._check_expected(node_id)
        _check_other(node_id, certificate, credentials, self.address)
        if self._sightings is not None:
            self._sightings.note(node_id, certificate, self.address)
        channel = flight.FlightClient(
            f"grpc+tls://{self._behind()}",
            tls_root_certs=pem_of(certificate),
            override_hostname=SERVER_NAME,
            generic_options=[*_OPTIONS],
        )
        return _Connection(
            channel=channel,
            headers=((PROOF_HEADER, proof(credentials.identity, certificate)),),
            proven=Proven(node_id=node_id, certificate=certificate),
        )

    def _behind(self) -> str:
        """Where the turnstile listens that leads to the peer."""
        target = _resolved(self._host, self._port, self.address)
        if self._turnstile is None:
            self._turnstile = Turnstile(rules=CLIENT_RULES, budget=self._budget)
        self._turnstile.start(target)
        return format_address("127.0.0.1", self._turnstile.port)

    def _check_expected(self, node_id: str) -> None:
        if self._node_id and node_id != self._node_id:
            raise IdentityError(
                f"expected node {shown_id(self._node_id)} at {self.address}, got {shown_id(node_id)}, "
                "so nothing is exchanged"
            )

    @contextmanager
    def _errors(self, broken: type[TransportError], connection: _Connection | None = None) -> Iterator[None]:
        try:
            yield
        except _ARROW_ERRORS as error:
            if self._closed:
                raise broken(f"the line to {self.address} was closed") from error
            if isinstance(error, (*_GONE, flight.FlightTimedOutError)) and connection is self._connection:
                self._connection = None  # a server that was started anew has another certificate
            if self._budget.overrun:
                self._budget.overrun = False
                raise PeerError(f"{self.address} sent more than was asked for, so it was cut off") from error
            raise _translated(error, self.address, broken) from error


def _resolved(host: str, port: int, address: str) -> Address:
    """The socket address of a peer, IPv4 if it has one."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise PeerUnreachableError(f"{address} is not available: {error}", hint="is the address right?") from error
    place: Address = min(found, key=lambda entry: entry[0] != socket.AF_INET)[4]  # type: ignore[assignment]
    return place


def _check_other(node_id: str, certificate: bytes, credentials: Credentials, address: str) -> None:
    """Raise unless that is another node than this one."""
    if node_id != credentials.node_id:
        return
    if certificate == credentials.certificate:
        raise FederationError("that address is this node itself", hint="name another node with --peer")
    raise CopiedHomeError(
        f"a node with this node's own id answers at {address}, so one home serves twice or was copied",
        hint="remove identity.key from the copy: its next start makes a new identity, which peers must approve anew",
    )


def _translated(error: Exception, address: str, broken: type[TransportError]) -> FederationError:
    said = _brief(error)
    match error:
        case flight.FlightUnavailableError():
            return broken(f"{address} is not available: {said}", hint="is the node running, and the address right?")
        case flight.FlightTimedOutError():
            return broken(f"{address} did not answer in time: {said}")
        case flight.FlightInternalError():
            return broken(f"the exchange with {address} failed: {said}")
        case flight.FlightCancelledError():  # gRPC cuts a stream so when a message is over the limit
            return PeerError(f"{address} cancelled the call, or sent a message over the size limit: {said}")
        case flight.FlightUnauthenticatedError():
            return IdentityError(f"{address} does not believe who this node is: {said}")
        case flight.FlightUnauthorizedError() if error.extra_info == wire.NOT_APPROVED:
            return NotApprovedError(f"{address} does not answer: {said}")
        case flight.FlightUnauthorizedError() if error.extra_info == wire.PUSH_REFUSED:
            return PushRefusedError(
                f"{address} takes no push: {said}", hint="it can fetch: `arrowmoe skills sync` there"
            )
        case flight.FlightServerError() if error.extra_info == wire.NOT_FOUND:
            return PeerError(f"{address} does not have that: {said}")
        case flight.FlightError():
            return PeerError(f"{address} refused: {said}")
    return PeerError(f"{address} sent something that cannot be read: {said}")


def _brief(error: Exception) -> str:
    """The first part of the library's text, without what a terminal would obey: a peer may have written it."""
    text = str(error).split(". Detail: ")[0].split(". gRPC client debug context")[0]
    return _CONTROL.sub(" ", text).strip()[:300] or type(error).__name__


__all__ = ["Line", "Proven"]
