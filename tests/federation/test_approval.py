"""Who is answered: strangers wait, decisions act at once, in every call."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import flight

from federation import handshake, limits, wire
from federation.access import Doorman
from federation.credentials import Credentials, pem_of
from federation.errors import (
    NotApprovedError,
)
from federation.server import LoRAFlightServer
from registry.peers import PeerBook, PeerState
from registry.store import Registry
from tests.federation.secured import (
    ANYWHERE,
    client_of,
    secured,
)
from tests.registry.cards import small_card


@pytest.fixture
def strict(theirs: Registry) -> Iterator[LoRAFlightServer]:
    """As on a network: only approved peers are answered."""
    with secured(theirs, host=ANYWHERE) as server:
        yield server


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
