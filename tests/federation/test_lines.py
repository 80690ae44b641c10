"""Connections that are kept between calls: how many a server sees, and what ends them."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from federation import limits
from federation.circle import Circle
from federation.credentials import Credentials
from federation.errors import IdentityError, PeerUnreachableError
from federation.peer import Peer
from federation.server import LoRAFlightServer
from registry.store import Registry
from tests.federation.proxy import Proxy

pytestmark = pytest.mark.usefixtures("no_leaked_threads")


@pytest.fixture
def registries(tmp_path: Path) -> Iterator[tuple[Registry, Registry]]:
    with Registry.open(tmp_path / "here") as here, Registry.open(tmp_path / "there") as there:
        yield here, there


def served(registry: Registry, port: int = 0) -> LoRAFlightServer:
    return LoRAFlightServer(
        registry, node_id=registry.identity.id, name="there", port=port, credentials=Credentials.of(registry.identity)
    )


@pytest.fixture
def circle(registries: tuple[Registry, Registry]) -> Iterator[Circle]:
    with Circle(registries[0], name="here", open=True) as circle:
        yield circle


def ask(circle: Circle, peer: Peer) -> str:
    with circle.connect(peer) as client:
        return client.health().node_id


@pytest.fixture
def handshakes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The ports of the servers that were asked for their certificates, which each new connection begins with."""
    asked: list[int] = []
    create = socket.create_connection

    def counted(address: tuple[str, int], *args: object) -> socket.socket:
        asked.append(address[1])
        return create(address, *args)  # type: ignore[arg-type]

    monkeypatch.setattr("federation.handshake.socket.create_connection", counted)
    return asked


def test_many_calls_take_one_connection_and_outlast_what_a_caller_may_send(
    registries: tuple[Registry, Registry], circle: Circle, handshakes: list[int]
) -> None:
    with served(registries[1]) as server:
        peer = Peer.at(server.address)
        for _ in range(limits.LINE_CALLS):
            assert ask(circle, peer) == registries[1].identity.id
        assert len(handshakes) == 1
        for _ in range(5 * limits.LINE_CALLS):
            ask(circle, peer)
        assert len(handshakes) == 6, "renewed before the server cuts it"


def test_without_being_opened_a_circle_keeps_nothing(
    registries: tuple[Registry, Registry], handshakes: list[int]
) -> None:
    circle = Circle(registries[0], name="here", open=True)
    with served(registries[1]) as server:
        for _ in range(2):
            ask(circle, Peer.at(server.address))
    assert len(handshakes) == 2


def test_threads_share_a_line_and_its_answers_stay_apart(
    registries: tuple[Registry, Registry], circle: Circle, handshakes: list[int]
) -> None:
    with served(registries[1]) as server, ThreadPoolExecutor(8) as pool:
        peer = Peer.at(server.address)
        asked = [*pool.map(lambda _: ask(circle, peer), range(200))]
    assert set(asked) == {registries[1].identity.id}
    assert len(handshakes) < 200 / 8


def test_a_peer_that_was_started_again_is_reached_at_once(
    registries: tuple[Registry, Registry], circle: Circle
) -> None:
    with served(registries[1]) as server:
        peer, port = Peer.at(server.address), server.port
        ask(circle, peer)
    with pytest.raises(PeerUnreachableError):
        ask(circle, peer)
    with served(registries[1], port):
        ask(circle, peer)
    with served(registries[1], port):
        assert ask(circle, peer) == registries[1].identity.id, "by the first call, on the line of another process"


def test_a_line_that_was_cut_is_made_anew_by_the_next_call(
    registries: tuple[Registry, Registry], circle: Circle
) -> None:
    with served(registries[1]) as server, Proxy(server.port) as proxy:
        peer = Peer.at(proxy.address)
        ask(circle, peer)
        proxy.reset()
        assert ask(circle, peer) == registries[1].identity.id


def test_no_line_is_kept_to_a_blocked_node_nor_to_another_than_expected(
    registries: tuple[Registry, Registry], circle: Circle, handshakes: list[int]
) -> None:
    node_id = registries[1].identity.id
    with served(registries[1]) as server:
        peer = replace(Peer.at(server.address), node_id=node_id)
        ask(circle, peer)
        circle.book.meet(node_id, most_pending=8)
        circle.book.block(node_id)
        assert circle.blocked() == {node_id}
        ask(circle, peer)
        assert len(handshakes) == 2
        with pytest.raises(IdentityError):
            ask(circle, replace(peer, node_id="0" * 32))


def test_beyond_the_limit_each_call_has_a_line_of_its_own(
    registries: tuple[Registry, Registry], circle: Circle, handshakes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_KEPT_LINES", 1)
    with served(registries[1]) as server:
        kept, other = Peer.at(server.address), replace(Peer.at(server.address), node_id=registries[1].identity.id)
        for peer in (kept, other, kept, other):
            ask(circle, peer)
    assert len(handshakes) == 3


def test_closing_ends_the_calls_of_clients_that_are_left(registries: tuple[Registry, Registry]) -> None:
    begun = threading.Event()

    def call_for_ever(circle: Circle, peer: Peer) -> None:
        with circle.connect(peer) as client:
            while True:
                client.health()
                begun.set()

    with served(registries[1]) as server, ThreadPoolExecutor(1) as pool:
        with Circle(registries[0], name="here", open=True) as circle:
            calling = pool.submit(call_for_ever, circle, Peer.at(server.address))
            assert begun.wait(10)
        with pytest.raises(PeerUnreachableError):
            calling.result(20)
