"""Pushes over real TLS, to servers in this process and in others, some of which are killed."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from federation import limits
from federation.admission import Policy
from federation.client import LoRAFlightClient
from federation.credentials import Credentials
from federation.entrance import Entrance
from federation.errors import NotApprovedError, PeerUnreachableError, PushRefusedError
from federation.pushing import Pushed, PushProgress, push
from federation.server import LoRAFlightServer
from federation.uploads import ACTION_PUSH, ACTION_PUT, APPROVED, Uploads, accepting
from registry.card import LoRACard
from registry.format import LoRAFormat
from registry.identity import Identity
from registry.peers import PeerBook
from registry.store import Registry
from tests.federation.proxy import Proxy
from tests.registry.cards import module_shapes, small_card

MIB = 1 << 20
ANYWHERE = "0.0.0.0"
ACCEPTING = Policy(unknown_publishers="accept", max_norm=1e9)


@pytest.fixture(scope="module")
def large() -> LoRACard:
    """Six tensors of 4 MiB."""
    return small_card("large", modules=module_shapes(3, 1 << 18, 1 << 18)).signed(Identity.generate())


@contextmanager
def taking(registry: Registry, *names: str, host: str = "127.0.0.1") -> Iterator[LoRAFlightServer]:
    """A server that lets the nodes of these names push."""
    uploads = Uploads(registry, Entrance(registry, ACCEPTING), accepts=accepting(names, PeerBook(registry.database)))
    with LoRAFlightServer(
        registry,
        node_id=registry.identity.id,
        name="theirs",
        host=host,
        credentials=Credentials.of(registry.identity),
        uploads=uploads,
    ) as server:
        yield server


def client_of(port: int, guest: Credentials) -> LoRAFlightClient:
    return LoRAFlightClient(f"127.0.0.1:{port}", credentials=guest)


@pytest.fixture
def guest() -> Credentials:
    return Credentials.of(Identity.generate())


def sizes(card: LoRACard) -> int:
    return card.nbytes + len(card.manifest_bytes)


def test_cards_go_to_a_peer_that_lets_this_node_push(theirs: Registry, guest: Credentials, large: LoRACard) -> None:
    small = [small_card(f"card-{number}", seed=number) for number in range(120)]
    with taking(theirs, guest.node_id) as server, client_of(server.port, guest) as client:
        pushed = push(client, [large, *small])
        assert [one.error for one in pushed] == [None] * 121
        assert pushed[0].bytes_moved == sizes(large)
        origin = theirs.entry(large.digest).origin
        assert origin is not None
        assert (origin.peer_id, origin.address) == (guest.node_id, "127.0.0.1")
        assert sum(one.bytes_moved for one in push(client, [large, *small])) == 0
    assert theirs.digests() == {card.digest for card in (large, *small)}
    assert all(report.ok for report in theirs.verify())


def test_a_peer_that_fetches_only_says_so(theirs: Registry, guest: Credentials, large: LoRACard) -> None:
    PeerBook(theirs.database).approve(guest.node_id)
    with taking(theirs, host=ANYWHERE) as server, client_of(server.port, guest) as client:
        with pytest.raises(PushRefusedError, match="takes no cards from node") as caught:
            push(client, [large])
        assert "skills sync" in str(caught.value.hint)
        with pytest.raises(PushRefusedError):
            next(client.ask(ACTION_PUT, b'{"digest":"' + large.digest.encode() + b'","part":"tensors","offset":0}\nx'))
        assert client.health().name == "theirs"
    assert theirs.list() == []


def test_a_server_that_knows_no_pushes_refuses_them(theirs: Registry, guest: Credentials, large: LoRACard) -> None:
    credentials = Credentials.of(theirs.identity)
    with (
        LoRAFlightServer(theirs, node_id=theirs.identity.id, name="old", credentials=credentials) as server,
        client_of(server.port, guest) as client,
    ):
        (pushed,) = push(client, [large])
    assert "'push' is unknown" in str(pushed.error)


def test_approval_and_blocking_act_at_once(theirs: Registry, guest: Credentials, large: LoRACard) -> None:
    book = PeerBook(theirs.database)
    with taking(theirs, APPROVED, host=ANYWHERE) as server, client_of(server.port, guest) as client:
        with pytest.raises(NotApprovedError):
            push(client, [large])
        book.approve(guest.node_id)
        (pushed,) = push(client, [small_card("before")])
        assert pushed.error is None

        def block(done: PushProgress) -> None:
            if done.bytes_done >= 5 * MIB:
                book.block(guest.node_id)

        with pytest.raises(NotApprovedError, match="blocked"):
            push(client, [large], on_progress=block)
    assert [entry.name for entry in theirs.list()] == ["before"]


def test_who_may_not_push_gets_no_bytes_past_the_turnstile(theirs: Registry, guest: Credentials) -> None:
    with taking(theirs) as server, client_of(server.port, guest) as client:
        client.health()
        with pytest.raises(PeerUnreachableError):
            next(client.ask(ACTION_PUT, b"{}\n" + bytes(256 << 10)))
        assert client.health().name == "theirs"


def test_one_that_may_push_and_sends_more_than_it_may_is_cut(
    theirs: Registry, guest: Credentials, large: LoRACard
) -> None:
    with taking(theirs, guest.node_id) as server, client_of(server.port, guest) as client:
        next(client.ask(ACTION_PUSH, b'{"digest":"%b","manifest_bytes":9}' % large.digest.encode()))
        with pytest.raises(PeerUnreachableError):
            next(client.ask(ACTION_PUT, b"{}\n" + bytes(2 * MIB)))
        (pushed,) = push(client, [large])
        assert pushed.error is None


@pytest.mark.parametrize("cut_at", [1, 40_000, 300_000, 3 * MIB, 20 * MIB])
def test_a_cut_line_costs_at_most_a_chunk(theirs: Registry, guest: Credentials, large: LoRACard, cut_at: int) -> None:
    with taking(theirs, guest.node_id) as server, Proxy(server.port) as proxy, client_of(proxy.port, guest) as client:
        client.health()
        done = proxy.bytes_there

        def cut(progress: PushProgress) -> None:
            nonlocal done
            if proxy.bytes_there - done >= cut_at:
                done = 1 << 40
                proxy.part()
                proxy.heal()

        (pushed,) = push(client, [large], on_progress=cut)
    assert pushed.error is None
    assert pushed.bytes_moved <= sizes(large) + len(large.manifest_bytes) + limits.UPLOAD_CHUNK_BYTES
    assert [report.ok for report in theirs.verify()] == [True]


@contextmanager
def receiver(home: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that takes pushes and may be killed, and its port."""
    command = [sys.executable, "-m", "tests.federation.serve", str(home), "--secured", "--takes-pushes"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, json.loads(process.stdout.readline())["port"]
        process.kill()


def test_a_killed_receiver_shows_nothing_and_goes_on_where_it_was(
    theirs: Registry, guest: Credentials, large: LoRACard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "RETRY_DELAY_S", 0.01)
    moved, kills = 0, 0
    for kill_at in (1, 3 * MIB, 8 * MIB + 1, 20 * MIB, None):
        with receiver(theirs.home) as (process, port), client_of(port, guest) as client:
            pushed = pushed_until(client, large, process, kill_at)
        moved += pushed.bytes_moved
        theirs.recover()
        assert all(report.ok for report in theirs.verify())
        if pushed.error is None:
            break
        kills += 1
        assert theirs.list(quarantined=True) == []
    assert (pushed.error, kills) == (None, 4)
    assert moved <= large.nbytes + (kills + 1) * len(large.manifest_bytes) + kills * (MIB + limits.UPLOAD_CHUNK_BYTES)
    assert [*theirs.home.glob("drafts/*")] == []


def pushed_until(
    client: LoRAFlightClient, card: LoRACard, process: subprocess.Popen[str], kill_at: int | None
) -> Pushed:
    def kill(progress: PushProgress) -> None:
        if kill_at is not None and progress.bytes_done >= kill_at:
            process.kill()

    (pushed,) = push(client, [card], on_progress=kill)
    return pushed


def test_a_killed_pusher_leaves_nothing_visible_and_another_goes_on(
    theirs: Registry, ours: Registry, large: LoRACard
) -> None:
    guest = Credentials.of(ours.identity)
    ours.import_file(saved(ours, large))
    rng = random.Random(20261121)
    with taking(theirs, guest.node_id) as server:
        for _ in range(3):
            command = [sys.executable, "-m", "tests.federation.pusher", str(ours.home), server.address, large.digest]
            with subprocess.Popen([*command, str(16 * MIB)], stdout=subprocess.PIPE, text=True) as process:
                assert process.stdout is not None
                assert process.stdout.readline() == "begun\n"
                time.sleep(rng.uniform(0.1, 0.4))
                process.kill()
            assert theirs.list(quarantined=True) == []
        with client_of(server.port, guest) as client:
            (pushed,) = push(client, [large])
    assert pushed.error is None
    assert len(large.manifest_bytes) < pushed.bytes_moved + 1 <= sizes(large)
    assert [report.ok for report in theirs.verify()] == [True]


def saved(registry: Registry, card: LoRACard) -> Path:
    path = registry.home / "card.lora.arrow"
    LoRAFormat.save(card, path)
    return path
