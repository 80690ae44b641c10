"""Hostile servers in a sync: each is refused by its own error, within its memory, and an honest peer is synced with."""

from __future__ import annotations

import functools
import itertools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from federation import wire
from federation.admission import Policy
from federation.client import LoRAFlightClient
from federation.credentials import Credentials
from federation.entrance import Entrance
from federation.peer import Peer
from federation.server import LoRAFlightServer
from federation.sync import sync
from registry.card import LoRACard
from registry.digest import digest_of
from registry.identity import Identity
from registry.store import Registry
from tests.federation.behind import Behind
from tests.federation.certificates import made
from tests.federation.hostile_server import Connection, Deed, doing
from tests.federation.liar import Liar, changes_of, entry_of, header, health, tensor_bytes
from tests.registry.cards import small_card

CEILING_MIB = 48
"""What no peer here makes a sync grow by (docs/security.md); an honest one takes 16."""


@pytest.fixture
def honest(server: LoRAFlightServer, theirs: Registry) -> Iterator[Peer]:
    """A good peer; its card has come by the end of the test."""
    theirs.publish(small_card("good"))
    return Peer.at(server.address)


@dataclass(frozen=True, kw_only=True)
class Lie:
    """What a liar changes, and what it is told."""

    told: str
    lie: Callable[[Liar], None]


def nan_card(liar: Liar) -> None:
    first, *others = tensor_bytes(liar.card)
    data = np.full(len(first) // 4, np.nan, dtype=np.float32).tobytes()
    offering(liar, with_fields(liar.card, lambda fields: fields["tensors"][0].update(digest=digest_of(data))))
    liar.tensor_bytes = lambda: iter([b"".join([data, *others])])


def with_fields(card: LoRACard, change: Callable[[dict[str, Any]], object]) -> bytes:
    """The card's manifest, changed."""
    fields = json.loads(card.manifest_bytes)
    change(fields)
    return json.dumps(fields, separators=(",", ":"), sort_keys=True).encode()


def offering(liar: Liar, manifest: bytes, *signature: bytes) -> None:
    """Have the liar offer, under a decent entry, the card with that manifest."""
    entry = entry_of(liar.card, digest=digest_of(manifest))
    liar.results[wire.ACTION_CHANGES] = lambda: iter([changes_of([entry])])
    liar.header = lambda: iter([manifest, *signature])


def named(name: str) -> Callable[[Liar], None]:
    """Offer a card whose manifest has that name."""
    return lambda liar: offering(liar, with_fields(liar.card, lambda fields: fields.update(name=name)))


def entered_as(**fields: str) -> Callable[[Liar], None]:
    """Offer the card by an entry that says that."""

    def lie(liar: Liar) -> None:
        page = json.loads(changes_of([entry_of(liar.card)]))
        page["added"][0] |= fields
        liar.results[wire.ACTION_CHANGES] = lambda: iter([json.dumps(page).encode()])

    return lie


def forged_signature(liar: Liar) -> None:
    manifest = with_fields(liar.card, lambda fields: fields.update(publisher="0" * 32))
    offering(liar, manifest, str(Identity.generate().sign(manifest)).encode())


@functools.cache
def zstd_bomb() -> bytes:
    """A record batch of 256 MiB."""
    inflated = pa.record_batch([pa.array([bytes(256 << 20)], pa.large_binary())], names=["data"])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, inflated.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_batch(inflated)
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


LIES = {
    "a forged manifest": Lie(
        told="expected the manifest of card", lie=lambda liar: setattr(liar, "header", lambda: header(small_card("x")))
    ),
    "a wrong digest": Lie(
        told="damaged or forged",
        lie=lambda liar: setattr(liar, "tensor_bytes", lambda: tensor_bytes(small_card("x", modules=3, seed=99))),
    ),
    "another's signature": Lie(told="names publisher", lie=forged_signature),
    "NaN": Lie(told="NaN", lie=nan_card),
    "a name that leads upwards": Lie(told="name", lie=named("../../etc/passwd")),
    "a name that is a link": Lie(told="name", lie=named("evil -> /etc/passwd")),
    "a name with a zero": Lie(told="name", lie=named("evil\0.lora.arrow")),
    "an entry with a path for a name": Lie(told="added.0.name", lie=entered_as(name="../evil")),
    "an entry with a path for a version": Lie(told="added.0.version", lie=entered_as(version="1/../../..")),
    "an entry with a path for a digest": Lie(told="added.0.digest", lie=entered_as(digest="blake3:../../identity.key")),
}


def test_liars_are_named_in_one_sync_with_an_honest_peer(ours: Registry, theirs: Registry, honest: Peer) -> None:
    with ExitStack() as stack:
        liars = []
        for number, lie in enumerate(LIES.values(), start=1):
            liar = Liar(small_card(f"evil-{number}", modules=3, seed=number))
            stack.callback(liar.shutdown)
            liar.results[wire.ACTION_HEALTH] = lambda number=number: iter(  # type: ignore[misc]
                [wire.encode_health(health(node_id=f"{number:032x}"))]
            )
            lie.lie(liar)
            liars.append(Peer.at(liar.address))
        report = sync(ours, [*liars, honest])
    for (what, lie), peer in zip(LIES.items(), report.peers[:-1], strict=True):
        said = [*filter(None, [peer.error]), *(why for _, why in peer.failed)]
        assert any(lie.told in why for why in said), (what, said)
        assert not peer.fetched
    assert report.peers[-1].fetched
    assert ours.digests() == theirs.digests()
    assert {path.name for path in ours.home.rglob("*evil*")} == set()
    assert {path for path in ours.home.rglob("*") if path.is_symlink()} == set()


# Who it is, and what was once true ---

WRONG = {
    "an authority": (made(authority=True), "CA:TRUE"),
    "expired": (made(end=datetime(2020, 1, 1, tzinfo=UTC)), "valid at"),
    "not yet valid": (made(start=datetime(2200, 1, 1, tzinfo=UTC)), "valid at"),
    "without a node": (made(bound=b""), "no node's"),
    "another node than in health": (made(), "calls itself"),
}


def test_impostors_are_named_in_one_sync_with_an_honest_peer(ours: Registry, theirs: Registry) -> None:
    theirs.publish(small_card("good"))
    own = Credentials.of(theirs.identity)
    guest = Credentials.of(ours.identity)

    def serving(credentials: Credentials) -> LoRAFlightServer:
        return LoRAFlightServer(theirs, node_id=theirs.identity.id, name="n", credentials=credentials)

    def connect(peer: Peer, timeout_s: float) -> LoRAFlightClient:
        return LoRAFlightClient(peer.address, credentials=guest, node_id=peer.node_id, timeout_s=timeout_s)

    with ExitStack() as stack:
        peers = []
        for shown, _ in WRONG.values():
            credentials = replace(own, certificate=shown.certificate, private_key=shown.private_key)
            peers.append(Peer.at(stack.enter_context(serving(credentials)).address))
        honest = Peer.at(stack.enter_context(serving(own)).address)
        report = sync(ours, [*peers, replace(honest, node_id="0" * 32), honest], connect=connect)
    *impostors, expected, last = report.peers
    for (what, (_, why)), peer in zip(WRONG.items(), impostors, strict=True):
        assert why in str(peer.error), (what, peer.error)
    assert "expected node 0000-" in str(expected.error)
    assert last.error is None
    assert ours.digests() == theirs.digests()


def test_an_older_card_offered_anew_takes_no_label_back(ours: Registry) -> None:
    publisher = Identity.generate()
    older, newer = (small_card("poet", seed=epoch).describe(epoch=epoch).signed(publisher) for epoch in (1, 2))
    for card, node_id in ((newer, "1" * 32), (older, "2" * 32)):
        with serving_liar(card, node_id=node_id) as liar:
            (report,) = sync(ours, [Peer.at(liar.address)]).peers
        assert [entry.digest for entry in report.fetched] == [card.digest]
        assert ours.entry("poet@1").digest == newer.digest


@pytest.mark.parametrize("hides_the_publisher", [False, True])
def test_a_removed_card_offered_anew_does_not_come_back(
    ours: Registry, theirs: Registry, honest: Peer, hides_the_publisher: bool
) -> None:
    removed = theirs.get(theirs.publish(small_card("poet")).digest)
    theirs.remove(removed.digest)
    sync(ours, [honest])
    with serving_liar(removed) as liar:
        offer = entry_of(removed, publisher=None if hides_the_publisher else theirs.identity.id)
        liar.results[wire.ACTION_CHANGES] = lambda: iter([changes_of([offer])])
        entrance = Entrance(ours, Policy(unknown_publishers="accept"))
        (report,) = sync(ours, [Peer.at(liar.address)], entrance=entrance).peers
    assert report.bytes_moved == 0
    assert bool(report.missing) == hides_the_publisher
    assert all("so it cannot come back" in why for _, why in report.failed)
    assert len(report.failed) == hides_the_publisher
    assert ours.digests() == theirs.digests()


@contextmanager
def serving_liar(card: LoRACard, **told: Any) -> Iterator[Liar]:
    liar = Liar(card)
    liar.results[wire.ACTION_HEALTH] = lambda: iter([wire.encode_health(health(**told))])
    try:
        yield liar
    finally:
        liar.shutdown()


# What a server sends is bounded: by a process of its own, whose memory is read ---

ACTIONS = (wire.ACTION_HEALTH, wire.ACTION_CHANGES, wire.ACTION_MANIFEST, wire.ACTION_TENSORS)
CUT = "sent more than was asked for, so it was cut off"


def check(ours: Registry, honest: Peer, hostile: str, *told: str) -> None:
    """Sync with both in a process of its own: one is refused in one of these words, the other's card comes."""
    command = [sys.executable, "-m", "tests.federation.syncing", str(ours.home), "2", hostile, honest.address]
    said = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    report = json.loads(said)
    liar, other = report["peers"]
    assert any(why in words for why in told for words in filter(None, liar["said"])), said
    assert not liar["fetched"]
    assert len(other["fetched"]) == 1, said
    assert report["grown_mib"] < CEILING_MIB, said
    assert set(other["fetched"]) == ours.digests()


def decent(card: LoRACard) -> dict[str, Deed]:
    """What a server does that answers as it should, and gives no tensors."""
    answers = {
        wire.ACTION_HEALTH: (wire.encode_health(health()),),
        wire.ACTION_CHANGES: (changes_of([entry_of(card)]),),
        wire.ACTION_MANIFEST: tuple(header(card)),
        wire.ACTION_TENSORS: (),
    }
    return {
        action: lambda connection, stream, results=results: connection.answer(stream, *results)  # type: ignore[misc]
        for action, results in answers.items()
    }


def check_doing(ours: Registry, honest: Peer, action: str, deed: Deed, *told: str) -> list[int]:
    """The same with a server that does `deed` when it is asked for `action`; the bytes that it sent by then."""
    sent: list[int] = []
    with Behind(doing(decent(small_card("evil")) | {action: deed}, sent)) as hostile:
        check(ours, honest, f"127.0.0.1:{hostile.target[1]}", *told)
    return sent


@pytest.mark.parametrize("action", ACTIONS)
def test_a_message_of_1_9_gb(ours: Registry, honest: Peer, action: str) -> None:
    sent = check_doing(ours, honest, action, lambda connection, stream: connection.promise(stream, 1_900_000_000), CUT)
    assert 1 << 20 < max(sent) < 64 << 20  # what the sockets on the way took before the line was cut


@pytest.mark.parametrize("action", [wire.ACTION_HEALTH, wire.ACTION_TENSORS])
def test_200_mib_of_metadata(ours: Registry, honest: Peer, action: str) -> None:
    sent = check_doing(
        ours,
        honest,
        action,
        lambda connection, stream: connection.endless_headers(stream, 200 << 20),
        CUT,
        "metadata size exceeds hard limit",
    )
    assert max(sent) < 64 << 20


def random_bytes(line: socket.socket) -> None:
    while True:
        line.sendall(os.urandom(1 << 16))


def silence(line: socket.socket) -> None:
    while line.recv(1 << 16):
        pass


def test_random_bytes(ours: Registry, honest: Peer) -> None:
    with Behind(random_bytes) as hostile:
        check(ours, honest, f"127.0.0.1:{hostile.target[1]}", "Failed parsing HTTP/2", CUT)


def test_a_server_that_says_nothing(ours: Registry, honest: Peer) -> None:
    with Behind(silence) as hostile:
        check(ours, honest, f"127.0.0.1:{hostile.target[1]}", "did not answer in time")


def test_a_stream_that_stalls(ours: Registry, honest: Peer) -> None:
    def stalling(connection: Connection, stream: int) -> None:
        connection.headers(stream)
        silence(connection.line)

    check_doing(ours, honest, wire.ACTION_TENSORS, stalling, "did not answer in time")


@pytest.mark.parametrize(
    ("action", "told"),
    [
        (wire.ACTION_HEALTH, "expected a health answer of at most"),
        (wire.ACTION_CHANGES, "Invalid JSON"),
        (wire.ACTION_MANIFEST, "expected the manifest of card"),
        (wire.ACTION_TENSORS, "more tensor bytes, got"),
    ],
)
def test_a_zstd_bomb(ours: Registry, honest: Peer, liar: Liar, action: str, told: str) -> None:
    liar.results[action] = lambda: iter([zstd_bomb()])
    check(ours, honest, liar.address, told)


def test_an_inventory_without_end(ours: Registry, honest: Peer, liar: Liar) -> None:
    numbers, examples = itertools.count(), ("x" * 50_000,)

    def endless() -> Iterator[bytes]:
        since = json.loads(liar.asked[-1])["since"]
        digests = [digest_of(b"%d" % next(numbers)) for _ in range(20)]
        entries = [entry_of(liar.card, digest=digest, examples=examples) for digest in digests]
        return iter([changes_of(entries, since=since, last=1 << 40)])

    liar.results[wire.ACTION_CHANGES] = endless
    check(ours, honest, liar.address, "so nothing more is read from this peer")


def test_tensors_without_end(ours: Registry, honest: Peer, liar: Liar) -> None:
    liar.tensor_bytes = lambda: itertools.repeat(bytes(1 << 20))
    check(ours, honest, liar.address, CUT, "more tensor bytes, got")
