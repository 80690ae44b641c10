from __future__ import annotations

import json
from base64 import urlsafe_b64encode
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from federation import limits
from federation.circle import Circle, Company, company
from federation.client import LoRAFlightClient
from federation.credentials import Credentials
from federation.errors import CopiedHomeError, FederationError, NotApprovedError, PeerError, PeerUnreachableError
from federation.membership import JoinRequest, JoinToken, decode_roster, encode_join, encode_roster
from federation.peer import Peer
from federation.server import LoRAFlightServer
from federation.sightings import Sightings
from registry.peers import Introduced, KnownPeer, PeerBook, PeerState
from registry.store import Registry
from tests.registry.cards import small_card

TOKEN = JoinToken(node_id="a" * 32, name="anna", addresses=("10.0.0.1:7420",), secret="b" * 32, expires=1_800_000_000)


@dataclass(frozen=True, kw_only=True)
class Node:
    """A registry that is served as on a network, where only approved peers are answered."""

    registry: Registry
    circle: Circle
    server: LoRAFlightServer

    @property
    def id(self) -> str:
        return self.registry.identity.id

    @property
    def book(self) -> PeerBook:
        return self.circle.book

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    def client(self, other: Node) -> LoRAFlightClient:
        return self.circle.connect(replace(Peer.at(other.address), node_id=other.id))

    def invite(self, lasts: timedelta = timedelta(hours=1), *, addresses: tuple[str, ...] = ()) -> JoinToken:
        return self.circle.invite(addresses or (self.address,), lasts=lasts)

    def join(self, token: JoinToken, *, introducer: bool = True) -> None:
        self.circle.join(token, port=self.server.port, introducer=introducer)

    def states(self) -> dict[str, PeerState]:
        return {peer.node_id: peer.state for peer in self.book.peers()}

    def reads(self, other: Node) -> bool:
        """Whether the other one answers this one."""
        try:
            with self.client(other) as client:
                list(client.ask("roster"))
        except NotApprovedError:
            return False
        return True


@pytest.fixture
def node(make_registry: Callable[[str], Registry]) -> Iterator[Callable[[str], Node]]:
    with ExitStack() as stack:

        def start(name: str) -> Node:
            registry = make_registry(name)
            circle = Circle(registry, name=name, open=False)
            server = LoRAFlightServer(
                registry, node_id=registry.identity.id, name=name, host="0.0.0.0", credentials=circle.credentials
            )
            stack.enter_context(server)
            return Node(registry=registry, circle=circle, server=server)

        yield start


def test_a_token_makes_two_strangers_peers(node: Callable[[str], Node]) -> None:
    anna, bert = node("anna"), node("bert")
    entry = anna.registry.publish(small_card("poet"))
    assert not bert.reads(anna)
    bert.join(JoinToken.parse(str(anna.invite())))
    assert bert.reads(anna)
    assert anna.reads(bert)
    with bert.client(anna) as client:
        assert client.fetch_skill(entry.digest).digest == entry.digest
    (guest,) = anna.book.peers()
    assert (guest.node_id, guest.name, guest.address, guest.introducer) == (bert.id, "bert", bert.address, False)
    (host,) = bert.book.peers()
    assert (host.node_id, host.name, host.address, host.introducer) == (anna.id, "anna", anna.address, True)


def test_a_star_of_invitations_becomes_a_mesh(node: Callable[[str], Node]) -> None:
    anna, bert, carl = node("anna"), node("bert"), node("carl")
    bert.join(anna.invite())
    carl.join(anna.invite())
    assert carl.states() == {anna.id: PeerState.APPROVED, bert.id: PeerState.APPROVED}
    assert bert.circle.follow() == (carl.id,)
    assert bert.reads(carl)
    assert carl.reads(bert)
    assert carl.book.find(bert.id) is not None
    assert [peer.address for peer in carl.book.peers() if peer.node_id == bert.id] == [bert.address]


def test_whom_the_introducer_drops_is_dropped(node: Callable[[str], Node]) -> None:
    anna, bert, carl = node("anna"), node("bert"), node("carl")
    bert.join(anna.invite())
    carl.join(anna.invite())
    bert.circle.follow()
    anna.book.block(carl.id)
    bert.circle.follow()
    assert bert.states()[carl.id] is PeerState.PENDING
    assert not carl.reads(bert)
    assert not carl.reads(anna)


def test_a_guest_may_do_without_an_introducer(node: Callable[[str], Node]) -> None:
    anna, bert, carl = node("anna"), node("bert"), node("carl")
    bert.join(anna.invite())
    carl.join(anna.invite(), introducer=False)
    assert carl.states() == {anna.id: PeerState.APPROVED}
    assert carl.circle.follow() == ()
    assert carl.states() == {anna.id: PeerState.APPROVED}


def test_a_token_is_for_one_node_and_for_a_while(node: Callable[[str], Node]) -> None:
    anna, bert, carl = node("anna"), node("bert"), node("carl")
    token = anna.invite()
    bert.join(token)
    with pytest.raises(PeerError, match="another node"):
        carl.join(token)
    with pytest.raises(PeerError, match="expired"):
        carl.join(anna.invite(timedelta(seconds=-1)))
    with pytest.raises(PeerError, match="unknown here"):
        carl.join(replace(token, secret="0" * 32))
    assert carl.book.peers() == []
    assert anna.states().get(carl.id) is not PeerState.APPROVED


def test_a_token_leads_to_the_node_that_made_it_and_to_no_other(node: Callable[[str], Node]) -> None:
    anna, bert, eve = node("anna"), node("bert"), node("eve")
    token = anna.invite(addresses=(eve.address,))
    with pytest.raises(PeerError, match="expected node"):
        bert.join(token)
    assert eve.book.peers() == []  # it was told nothing, least of all the secret
    assert bert.book.peers() == []


def test_the_addresses_of_a_token_are_tried_in_turn(node: Callable[[str], Node]) -> None:
    anna, bert = node("anna"), node("bert")
    bert.join(anna.invite(addresses=("127.0.0.1:1", anna.address)))
    assert bert.reads(anna)
    with pytest.raises(PeerUnreachableError):
        bert.join(anna.invite(addresses=("127.0.0.1:1",)))


def test_nobody_joins_by_a_plaintext_line(server: LoRAFlightServer) -> None:
    with LoRAFlightClient(server.address) as client, pytest.raises(PeerError, match="unknown"):
        list(client.ask("join", encode_join(JoinRequest(secret="0" * 32, name="eve"))))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b'{"secret": "0", "name": "x"}',
        b'{"secret": "%s", "name": "\\u001b[2J"}' % (b"0" * 32),
        b'{"secret": "%s", "name": "%s"}' % (b"0" * 32, b"x" * 65),
        b'{"secret": "%s", "name": "x", "port": 0}' % (b"0" * 32),
        b"x" * 5000,
    ],
)
def test_a_request_that_is_none_is_refused(node: Callable[[str], Node], body: bytes) -> None:
    anna, bert = node("anna"), node("bert")
    with bert.client(anna) as client, pytest.raises(PeerError, match="a request to join"):
        list(client.ask("join", body))


def test_a_waiting_node_is_called_on_so_that_its_owner_sees_who_waits(node: Callable[[str], Node]) -> None:
    anna, bert = node("anna"), node("bert")
    anna.circle.greet([replace(Peer.at(bert.address), node_id=bert.id), Peer.at("127.0.0.1:1")])
    assert bert.states() == {anna.id: PeerState.PENDING}


# Whom to ask ----------------------------------------------------------------------------------------------------------

NOW = datetime(2026, 11, 21, tzinfo=UTC)
APPROVED = KnownPeer(node_id="a" * 32, address="10.0.0.1:1", state=PeerState.APPROVED, first_seen=NOW)
PENDING = KnownPeer(node_id="b" * 32, address="10.0.0.2:1", state=PeerState.PENDING, first_seen=NOW)
BLOCKED = KnownPeer(node_id="c" * 32, address="10.0.0.3:1", state=PeerState.BLOCKED, first_seen=NOW)
BOOK = [APPROVED, PENDING, BLOCKED]


def found(host: str, letter: str) -> Peer:
    return Peer(host=host, port=1, node_id=letter * 32, source="mdns")


def asked(company: Company) -> list[tuple[str, str]]:
    return [(peer.address, peer.node_id[:1]) for peer in company.asked]


def test_the_book_says_who_is_asked() -> None:
    sorted_ = company([], [found("10.0.0.2", "b"), found("10.0.0.3", "c"), found("10.0.0.4", "d")], BOOK, open=False)
    assert asked(sorted_) == [("10.0.0.1:1", "a")]
    assert [peer.node_id[:1] for peer in sorted_.waiting] == ["b", "d"]


def test_an_open_node_asks_everyone_but_the_blocked() -> None:
    sorted_ = company([], [found("10.0.0.2", "b"), found("10.0.0.3", "c"), found("10.0.0.4", "d")], BOOK, open=True)
    assert asked(sorted_) == [("10.0.0.1:1", "a"), ("10.0.0.2:1", "b"), ("10.0.0.4:1", "d")]
    assert sorted_.waiting == ()


def test_whom_the_owner_named_is_asked_and_no_announcement_takes_its_place() -> None:
    sorted_ = company([Peer.at("10.0.0.9:1")], [found("10.0.0.9", "e")], [], open=False)
    assert (asked(sorted_), sorted_.waiting) == ([("10.0.0.9:1", "")], ())


def test_a_false_announcement_does_not_hide_where_a_peer_was_last_seen() -> None:
    assert asked(company([], [found("10.0.0.66", "a")], BOOK, open=False)) == [
        ("10.0.0.1:1", "a"),
        ("10.0.0.66:1", "a"),
    ]
    assert asked(company([], [found("10.0.0.1", "a")], BOOK, open=False)) == [("10.0.0.1:1", "a")]


# Copied homes ---------------------------------------------------------------------------------------------------------


def test_a_node_that_starts_anew_is_no_copy_and_one_with_two_addresses_neither() -> None:
    sightings = Sightings()
    for certificate, address in ((b"1", "lan"), (b"1", "vpn"), (b"2", "lan"), (b"2", "lan"), (b"3", "vpn")):
        sightings.note("a" * 32, certificate, address)


def test_two_processes_of_one_home_are_noticed() -> None:
    sightings = Sightings()
    sightings.note("a" * 32, b"original", "lan")
    sightings.note("b" * 32, b"another node", "lan")
    sightings.note("a" * 32, b"copy", "vpn")
    with pytest.raises(CopiedHomeError, match="copied"):
        sightings.note("a" * 32, b"original", "lan")


def test_a_copied_home_that_serves_beside_the_original_is_refused(
    node: Callable[[str], Node],
) -> None:
    anna, bert = node("anna"), node("bert")
    bert.join(anna.invite())
    copy = LoRAFlightServer(
        anna.registry, node_id=anna.id, name="copy", credentials=Credentials.of(anna.registry.identity)
    )
    with copy:
        for _ in range(2):
            with bert.circle.connect(replace(Peer.at(copy.address), node_id=anna.id)) as client:
                client.health()
        with bert.client(anna) as client, pytest.raises(CopiedHomeError):
            client.health()


# Forms ----------------------------------------------------------------------------------------------------------------


def test_a_token_survives_being_printed_and_pasted() -> None:
    text = str(TOKEN)
    assert text.startswith("arrowmoe-")
    assert text.isascii()
    assert JoinToken.parse(f"  {text[:40]}\n{text[40:]}\n") == TOKEN
    assert TOKEN.until == datetime(2027, 1, 15, 8, 0, tzinfo=UTC)


def token_of(**changes: Any) -> str:
    fields = {
        "node_id": "a" * 32,
        "name": "anna",
        "addresses": ["10.0.0.1:7420"],
        "secret": "b" * 32,
        "expires": 1_800_000_000,
    }
    return "arrowmoe-" + urlsafe_b64encode(json.dumps(fields | changes).encode()).decode()


def test_a_token_of_another_implementation_is_read() -> None:
    assert JoinToken.parse(token_of()) == TOKEN


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hello",
        "arrowmoe-",
        "arrowmoe-!!!!",
        "arrowmoe-" + "A" * 5000,
        str(TOKEN)[:-9],
        token_of(node_id="x"),
        token_of(addresses=[]),
        token_of(addresses=["nowhere"]),
        token_of(addresses=["10.0.0.1:1"] * 17),
        token_of(secret="0"),
        token_of(name="\x1b[2J"),
        token_of(expires="soon"),
        token_of(expires=1 << 60),
    ],
)
def test_what_is_no_token_is_refused(text: str) -> None:
    with pytest.raises(FederationError):
        JoinToken.parse(text)


def test_a_roster_is_cut_at_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    peers = [Introduced(node_id=f"{number:032x}", name="x" * 64, address="10.0.0.1:1") for number in range(2000)]
    told = decode_roster(encode_roster(peers))
    assert told == tuple(peers[: len(told)])
    assert 200 < len(told) <= limits.MAX_ROSTER_PEERS
    assert len(encode_roster(peers)) <= limits.MAX_ROSTER_BYTES


def test_an_address_in_a_roster_that_cannot_be_one_is_left_out() -> None:
    data = json.dumps({"peers": [{"node_id": "a" * 32, "name": "eve", "address": "file:///etc/passwd"}]}).encode()
    assert decode_roster(data) == (Introduced(node_id="a" * 32, name="eve", address=None),)


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b'{"peers": [{"node_id": "x"}]}', json.dumps({"peers": [{"node_id": "a" * 32}] * 300}).encode()],
)
def test_a_roster_that_is_none_is_refused(data: bytes) -> None:
    with pytest.raises(PeerError, match="a roster"):
        decode_roster(data)
