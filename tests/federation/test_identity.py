"""Who answers and who asks, over real TLS on the loopback."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import flight

from federation import handshake, limits, wire
from federation.access import Doorman
from federation.client import LoRAFlightClient
from federation.credentials import Credentials, pem_of
from federation.errors import (
    CopiedHomeError,
    FederationError,
    IdentityError,
    NotApprovedError,
    PeerError,
    PeerUnreachableError,
    TransportError,
)
from federation.server import LoRAFlightServer
from registry.identity import Identity
from registry.peers import PeerBook, PeerState
from registry.store import Registry
from tests.federation.certificates import Made, made
from tests.registry.cards import small_card

ANYWHERE = "0.0.0.0"


def secured(registry: Registry, *, host: str = "127.0.0.1", port: int = 0, open: bool = False) -> LoRAFlightServer:
    credentials = Credentials.of(registry.identity)
    return LoRAFlightServer(
        registry,
        node_id=registry.identity.id,
        name="theirs",
        host=host,
        port=port,
        open=open,
        credentials=credentials,
    )


def client_of(
    server: LoRAFlightServer | int, asks: Credentials | None, node_id: str = "", timeout_s: float = 5
) -> LoRAFlightClient:
    port = server if isinstance(server, int) else server.port
    return LoRAFlightClient(f"127.0.0.1:{port}", credentials=asks, node_id=node_id, timeout_s=timeout_s)


@pytest.fixture
def guest() -> Credentials:
    return Credentials.of(Identity.generate())


@pytest.fixture
def strict(theirs: Registry) -> Iterator[LoRAFlightServer]:
    """As on a network: only approved peers are answered."""
    with secured(theirs, host=ANYWHERE) as server:
        yield server


def test_a_card_travels_over_tls_between_nodes_that_prove_who_they_are(theirs: Registry, guest: Credentials) -> None:
    entry = theirs.publish(small_card("poet"))
    with secured(theirs) as server, client_of(server, guest, theirs.identity.id) as client:
        assert client.health().node_id == theirs.identity.id == client.proven().node_id
        assert client.fetch_skill(entry.digest).digest == entry.digest


def test_another_process_is_reached_over_tls(theirs: Registry, tmp_path: Path, guest: Credentials) -> None:
    entry = theirs.publish(small_card("poet"))
    with serving_tls(tmp_path / "theirs") as port, client_of(port, guest, theirs.identity.id) as client:
        assert client.fetch_skill(entry.digest).digest == entry.digest
        assert client.proven().node_id == theirs.identity.id


def test_nothing_is_readable_on_the_line(theirs: Registry, guest: Credentials) -> None:
    theirs.publish(small_card("poet", description="a secret description"))
    digest = theirs.entry("poet").digest
    with secured(theirs) as server, eavesdropper(server.port) as (port, heard):
        with LoRAFlightClient(f"127.0.0.1:{port}", credentials=guest) as client:
            client.fetch_skill(digest)
        assert sum(map(len, heard)) > 4096
        assert b"secret description" not in b"".join(heard)
        assert digest.encode() not in b"".join(heard)


# The server's proof ---------------------------------------------------------------------------------------------------


def test_another_node_than_expected_is_refused_before_anything_is_said(theirs: Registry, guest: Credentials) -> None:
    with secured(theirs) as server, client_of(server, guest, "0" * 32) as client:
        for call in (client.health, client.proven):
            with pytest.raises(IdentityError, match=r"expected node 0000-.*, got") as caught:
                call()
        assert not isinstance(caught.value, TransportError)


@pytest.mark.parametrize(
    ("certificate", "message"),
    [
        (lambda: made(authority=True), "CA:TRUE"),
        (lambda: made(end=datetime(2020, 1, 1, tzinfo=UTC)), "valid at"),
        (lambda: made(bound=b""), "no node's"),
        (lambda: made(bound=binding_of(Credentials.of(Identity.generate()))), "did not sign"),
        (lambda: made(extra=b"x" * 5000), "at most"),
    ],
    ids=["authority", "expired", "nobody", "copied extension", "large"],
)
def test_a_certificate_that_proves_nothing_is_refused(
    certificate: Callable[[], Made], message: str, guest: Credentials
) -> None:
    with impostor(certificate()) as server, client_of(server.port, guest) as client:
        with pytest.raises(IdentityError, match=message):
            client.health()
        assert server.heard == []


def test_a_stolen_certificate_without_its_key_gets_no_connection(theirs: Registry, guest: Credentials) -> None:
    """The thief shows the victim's certificate to whoever asks first, and has to answer with a key of its own."""
    thief = made()
    with impostor(thief) as server, client_of(server.port, guest, theirs.identity.id) as client:
        victim = Credentials.of(theirs.identity)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("federation.line.certificate_at", lambda *_, **__: victim.certificate)
            with pytest.raises(PeerUnreachableError):
                client.health()
        assert server.heard == []


def test_a_server_that_calls_itself_another_node_is_refused(guest: Credentials) -> None:
    with (
        impostor(made()) as server,
        client_of(server.port, guest) as client,
        pytest.raises(IdentityError, match="calls itself"),
    ):
        client.health()


def test_a_server_without_tls_is_refused(server: LoRAFlightServer, guest: Credentials) -> None:
    with client_of(server, guest) as client, pytest.raises(PeerError, match="TLS"):
        client.health()


def test_a_client_without_tls_gets_nothing(theirs: Registry) -> None:
    with secured(theirs) as server, client_of(server, None) as client, pytest.raises(FederationError):
        client.health()


def test_a_server_that_says_nothing_is_left_in_time(guest: Credentials) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        with (
            client_of(silent.getsockname()[1], guest, timeout_s=0.5) as client,
            pytest.raises(PeerUnreachableError, match="in time"),
        ):
            client.health()
        assert time.monotonic() - started < 2


def test_nobody_there_is_unreachable(guest: Credentials) -> None:
    with client_of(1, guest) as client, pytest.raises(PeerUnreachableError, match="not available"):
        client.health()


def test_a_server_that_was_started_anew_is_reached_again(theirs: Registry, guest: Credentials) -> None:
    with secured(theirs) as first, client_of(first, guest, theirs.identity.id) as client:
        client.health()
        port = first.port
        first.close()
        with pytest.raises(PeerUnreachableError):
            client.health()
        with secured(theirs, port=port):
            assert client.health().node_id == theirs.identity.id


def test_a_copied_home_is_named(theirs: Registry) -> None:
    original, copy = Credentials.of(theirs.identity), Credentials.of(theirs.identity)
    with secured(theirs) as server:
        with client_of(server, original) as client, pytest.raises(CopiedHomeError, match="copied"):
            client.health()
        with client_of(server, copy) as client, pytest.raises(CopiedHomeError):
            client.health()


def test_this_node_itself_is_no_copy(theirs: Registry) -> None:
    credentials = Credentials.of(theirs.identity)
    with (
        LoRAFlightServer(theirs, node_id=theirs.identity.id, name="theirs", credentials=credentials) as server,
        client_of(server, credentials) as client,
        pytest.raises(FederationError, match="this node itself") as caught,
    ):
        client.health()
    assert not isinstance(caught.value, CopiedHomeError)


# The caller's proof ---------------------------------------------------------------------------------------------------


def test_a_proof_says_who_asks() -> None:
    identity, server = Identity.generate(), Credentials.of(Identity.generate())
    assert handshake.caller_of(handshake.proof(identity, server.certificate), server.certificate) == identity.id


def test_a_proof_for_one_server_is_worth_nothing_at_another() -> None:
    node = Identity.generate()
    one, other = Credentials.of(Identity.generate()), Credentials.of(Identity.generate())
    shown = handshake.proof(node, one.certificate)
    with pytest.raises(IdentityError, match="not for this server"):
        handshake.caller_of(shown, other.certificate)


def test_a_proof_dies_with_the_process_that_it_was_for() -> None:
    node, home = Identity.generate(), Identity.generate()
    shown = handshake.proof(node, Credentials.of(home).certificate)
    with pytest.raises(IdentityError):
        handshake.caller_of(shown, Credentials.of(home).certificate)


def test_a_proof_under_another_s_key_is_worth_nothing() -> None:
    certificate = Credentials.of(Identity.generate()).certificate
    mine, victim = Identity.generate(), Identity.generate()
    with pytest.raises(IdentityError):
        handshake.caller_of(victim.public_key + handshake.proof(mine, certificate)[32:], certificate)


def test_other_signatures_of_a_node_are_no_proof() -> None:
    """What a node signs elsewhere (cards, tombstones, its own certificate) cannot be shown as a proof."""
    certificate, node = Credentials.of(Identity.generate()).certificate, Identity.generate()
    for message in (certificate, b"", handshake.DOMAIN):
        with pytest.raises(IdentityError):
            handshake.caller_of(node.public_key + node.sign(message).value, certificate)


def len_of(token: bytes | None) -> str:
    return "none" if token is None else f"{token[:1]!r} x {len(token)}"


def raw_client(server: LoRAFlightServer, headers: list[tuple[bytes, bytes]]) -> Callable[[str], list[bytes]]:
    """A caller of our own making, which sends what it likes."""
    shown = handshake.certificate_at("127.0.0.1", server.port, timeout_s=5)
    client = flight.FlightClient(
        f"grpc+tls://127.0.0.1:{server.port}",
        tls_root_certs=pem_of(shown),
        override_hostname="arrowmoe.invalid",
        generic_options=[("grpc.use_local_subchannel_pool", 1)],
    )
    options = flight.FlightCallOptions(timeout=5, headers=headers)
    return lambda action: [bytes(result.body) for result in client.do_action(action, options)]


@pytest.mark.parametrize("token", [None, b"", b"x", b"\0" * 96, b"x" * 96, b"x" * 200], ids=len_of)
def test_who_proves_nothing_is_not_answered(theirs: Registry, token: bytes | None) -> None:
    with secured(theirs) as server:
        ask = raw_client(server, [] if token is None else [(handshake.PROOF_HEADER, token)])
        for action in ("health", "inventory", "roster"):
            with pytest.raises(flight.FlightUnauthenticatedError):
                ask(action)


def test_a_proof_heard_by_one_server_is_refused_by_the_next(theirs: Registry, ours: Registry) -> None:
    """A node that is asked passes the caller's proof on, to be answered in its name."""
    caller = Identity.generate()
    with secured(theirs) as one, secured(ours) as other:
        heard = handshake.proof(caller, handshake.certificate_at("127.0.0.1", one.port, timeout_s=5))
        assert raw_client(one, [(handshake.PROOF_HEADER, heard)])("health")
        with pytest.raises(flight.FlightUnauthenticatedError, match="not for this server"):
            raw_client(other, [(handshake.PROOF_HEADER, heard)])("health")


def test_flight_s_own_handshake_is_refused(theirs: Registry) -> None:
    with secured(theirs) as server:
        shown = handshake.certificate_at("127.0.0.1", server.port, timeout_s=5)
        with (
            flight.FlightClient(
                f"grpc+tls://127.0.0.1:{server.port}",
                tls_root_certs=pem_of(shown),
                override_hostname="arrowmoe.invalid",
            ) as client,
            pytest.raises(flight.FlightUnauthenticatedError, match="no handshake"),
        ):
            client.authenticate_basic_token("anna", "secret")


def test_remembered_callers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_KNOWN_CALLERS", 3)
    certificate = Credentials.of(Identity.generate()).certificate
    callers = handshake.Callers(certificate)
    nodes = [Identity.generate() for _ in range(6)]
    for _ in range(2):
        assert [callers.is_valid(handshake.proof(node, certificate)) for node in nodes] == [node.id for node in nodes]
    assert len(callers._known) == 3


# Who is answered ------------------------------------------------------------------------------------------------------


def test_a_stranger_is_told_that_approval_is_pending(
    theirs: Registry, strict: LoRAFlightServer, guest: Credentials
) -> None:
    entry = theirs.publish(small_card("poet"))
    with client_of(strict, guest) as client:
        assert client.health().node_id == theirs.identity.id
        for call in (lambda: client.fetch_skill(entry.digest), lambda: list(client.ask("roster"))):
            with pytest.raises(NotApprovedError, match=r"arrowmoe peers approve [0-9a-f]{4}-"):
                call()
    (peer,) = PeerBook(theirs.database).peers()
    assert (peer.node_id, peer.state) == (guest.node_id, PeerState.PENDING)


def test_decisions_act_on_a_running_server_at_once(
    theirs: Registry, strict: LoRAFlightServer, guest: Credentials
) -> None:
    entry = theirs.publish(small_card("poet"))
    book = PeerBook(theirs.database)
    with client_of(strict, guest) as client:
        book.approve(guest.node_id)
        assert client.fetch_skill(entry.digest).digest == entry.digest
        book.block(guest.node_id)
        with pytest.raises(NotApprovedError, match="blocked"):
            client.fetch_skill(entry.digest)
        with pytest.raises(NotApprovedError, match="blocked"):
            client.health()
        book.remove(guest.node_id)
        with pytest.raises(NotApprovedError, match="pending"):
            client.fetch_skill(entry.digest)


def test_a_decision_made_by_another_process_acts_too(
    theirs: Registry, strict: LoRAFlightServer, guest: Credentials
) -> None:
    entry = theirs.publish(small_card("poet"))
    script = (
        "import sys; from registry.store import Registry; from registry.peers import PeerBook\n"
        "with Registry.open(sys.argv[1]) as registry: PeerBook(registry.database).approve(sys.argv[2])"
    )
    with client_of(strict, guest) as client:
        with pytest.raises(NotApprovedError):
            client.fetch_skill(entry.digest)
        subprocess.run([sys.executable, "-c", script, str(theirs.home), guest.node_id], check=True)
        assert client.fetch_skill(entry.digest).digest == entry.digest


@pytest.mark.parametrize("host", ["127.0.0.1", ANYWHERE])
def test_an_open_server_answers_everyone_but_the_blocked(theirs: Registry, guest: Credentials, host: str) -> None:
    entry = theirs.publish(small_card("poet"))
    book = PeerBook(theirs.database)
    with secured(theirs, host=host, open=host == ANYWHERE) as server, client_of(server, guest) as client:
        assert client.fetch_skill(entry.digest).digest == entry.digest
        assert book.peers() == []
        book.block(guest.node_id)
        with pytest.raises(NotApprovedError, match="blocked"):
            client.fetch_skill(entry.digest)


def test_every_call_of_a_plain_client_asks_the_peer_book(
    theirs: Registry, strict: LoRAFlightServer, guest: Credentials
) -> None:
    digest = theirs.publish(small_card("poet")).digest
    shown = handshake.certificate_at("127.0.0.1", strict.port, timeout_s=5)
    header = (handshake.PROOF_HEADER, handshake.proof(guest.identity, shown))
    options = flight.FlightCallOptions(timeout=5, headers=[header])
    path = flight.FlightDescriptor.for_path("skills", "poet")
    with flight.FlightClient(
        f"grpc+tls://127.0.0.1:{strict.port}",
        tls_root_certs=pem_of(shown),
        override_hostname="arrowmoe.invalid",
    ) as client:
        calls: dict[str, Callable[[], Any]] = {
            "list_flights": lambda: list(client.list_flights(options=options)),
            "get_flight_info": lambda: client.get_flight_info(path, options),
            "do_get": lambda: client.do_get(flight.Ticket(digest), options).read_all(),
            "list_actions": lambda: client.list_actions(options),
            "manifest": lambda: list(
                client.do_action(flight.Action("manifest", b'{"digest": "%s"}' % digest.encode()), options)
            ),
        }
        for call in calls.values():
            with pytest.raises(flight.FlightUnauthorizedError, match="pending") as caught:
                call()
            assert caught.value.extra_info == wire.NOT_APPROVED
        with pytest.raises(pa.ArrowException, match="pending"):  # of this call the library passes on only the text
            client.get_schema(path, options)
        PeerBook(theirs.database).approve(guest.node_id)
        for call in calls.values():
            call()


def test_strangers_in_a_flood_are_written_down_one_after_another(theirs: Registry) -> None:
    book, seconds = PeerBook(theirs.database), [0.0]
    doorman = Doorman(book, open=False, own_id=theirs.identity.id, clock=lambda: seconds[0])
    for number in range(5):
        doorman.check(f"{number:032x}", wire.ACTION_HEALTH)
    assert len(book.peers()) == 1
    seconds[0] += limits.STRANGER_INTERVAL_S
    doorman.check(f"{4:032x}", wire.ACTION_HEALTH)
    assert [peer.node_id for peer in book.peers()] == [f"{0:032x}", f"{4:032x}"]


# Helpers --------------------------------------------------------------------------------------------------------------


def binding_of(credentials: Credentials) -> bytes:
    """The extension's value, copied out of a certificate."""
    at = credentials.certificate.index(credentials.identity.public_key)
    return credentials.certificate[at : at + 96]


@dataclass(frozen=True, kw_only=True)
class Impostor:
    port: int
    heard: list[bytes]


@contextmanager
def impostor(shows: Made) -> Iterator[Impostor]:
    """A Flight server behind any certificate; `heard` are the tokens that it was sent."""
    heard: list[bytes] = []

    class Auth(flight.ServerAuthHandler):  # type: ignore[misc]
        def is_valid(self, token: bytes) -> str:
            heard.append(token)
            return ""

    class Server(flight.FlightServerBase):  # type: ignore[misc]
        def do_action(self, context: Any, action: Any) -> Iterator[bytes]:
            health = {"node_id": "0" * 32, "name": "x", "protocol": wire.PROTOCOL_VERSION, "cards": 0, "state": ""}
            return iter([json.dumps(health | {"index_id": "0" * 32, "last": 0}).encode()])

    server = Server(
        "grpc+tls://127.0.0.1:0",
        auth_handler=Auth(),
        tls_certificates=[(pem_of(shows.certificate), shows.private_key)],
    )
    try:
        yield Impostor(port=server.port, heard=heard)
    finally:
        server.shutdown()


@contextmanager
def eavesdropper(target: int) -> Iterator[tuple[int, list[bytes]]]:
    """A port before `target` that keeps what passes in both directions."""
    heard: list[bytes] = []
    threads: list[threading.Thread] = []

    def pump(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                heard.append(data)
                sink.sendall(data)
        except OSError:
            pass
        finally:
            for end in (source, sink):
                try:
                    end.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue

    def accept() -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            far = stack.enter_context(socket.create_connection(("127.0.0.1", target)))
            stack.enter_context(near)
            for ends in ((near, far), (far, near)):
                threads.append(threading.Thread(target=pump, args=ends, daemon=True))
                threads[-1].start()

    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        accepting = threading.Thread(target=accept, daemon=True)
        accepting.start()
        yield listener.getsockname()[1], heard
        listener.shutdown(socket.SHUT_RDWR)
        accepting.join(5)
    for thread in threads:
        thread.join(5)


@contextmanager
def serving_tls(home: Path) -> Iterator[int]:
    """A process that serves `home` with credentials."""
    script = (
        "import sys; from federation.credentials import Credentials; from federation.server import LoRAFlightServer\n"
        "from registry.store import Registry\n"
        "with Registry.open(sys.argv[1]) as registry, LoRAFlightServer(registry, node_id=registry.identity.id,\n"
        "        name='other', credentials=Credentials.of(registry.identity)) as server:\n"
        "    print(server.port, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(home)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield int(process.stdout.readline())
        process.stdin.close()
        assert process.wait(10) == 0
