"""A server's proof of who it is, over real TLS on the loopback."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from federation.client import LoRAFlightClient
from federation.credentials import Credentials
from federation.errors import (
    CopiedHomeError,
    FederationError,
    IdentityError,
    PeerError,
    PeerUnreachableError,
    TransportError,
)
from federation.server import LoRAFlightServer
from registry.identity import Identity
from registry.store import Registry
from tests.federation.certificates import Made, made
from tests.federation.secured import (
    binding_of,
    client_of,
    eavesdropper,
    impostor,
    secured,
    serving_tls,
)
from tests.registry.cards import small_card


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
