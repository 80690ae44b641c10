"""A caller's proof of who asks: for one server process, and worth nothing elsewhere."""

from __future__ import annotations

import pytest
from pyarrow import flight

from federation import handshake, limits
from federation.credentials import Credentials, pem_of
from federation.errors import (
    IdentityError,
)
from registry.identity import Identity
from registry.store import Registry
from tests.federation.secured import (
    raw_client,
    secured,
)


def len_of(token: bytes | None) -> str:
    return "none" if token is None else f"{token[:1]!r} x {len(token)}"


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
