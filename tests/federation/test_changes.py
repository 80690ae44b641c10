"""What a sync keeps of its peers between one time and the next, over real connections."""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from federation import limits, wire
from federation.client import LoRAFlightClient
from federation.peer import Peer
from federation.server import LoRAFlightServer
from federation.sync import PeerReport, sync
from registry.changes import Position
from registry.digest import digest_of
from registry.format import LoRAFormat
from registry.inventories import Inventories
from registry.store import Registry
from registry.tombstones import DOMAIN, Tombstone
from tests.federation.liar import INDEX_ID, NODE_ID, Liar, changes_of, entry_of, health
from tests.registry.cards import small_card

_NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


@pytest.fixture
def peer(server: LoRAFlightServer) -> Peer:
    return Peer.at(server.address)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each action was asked of any peer."""
    count: Counter[str] = Counter()
    original = LoRAFlightClient.ask

    def counted(self: LoRAFlightClient, action: str, body: bytes = b"") -> Iterator[bytes]:
        count[action] += 1
        return original(self, action, body)

    monkeypatch.setattr(LoRAFlightClient, "ask", counted)
    return count


@pytest.fixture
def serve(make_registry: Callable[[str], Registry]) -> Iterator[Callable[[str], tuple[Registry, Peer]]]:
    with ExitStack() as stack:

        def start(name: str) -> tuple[Registry, Peer]:
            registry = make_registry(name)
            server = stack.enter_context(LoRAFlightServer(registry, node_id=registry.identity.id, name=name))
            return registry, Peer.at(server.address)

        yield start


def heard(ours: Registry, peer: Peer) -> PeerReport:
    (report,) = sync(ours, [peer]).peers
    assert report.error is None
    return report


def test_only_what_changed_is_asked_for_and_a_restart_forgets_nothing(
    ours: Registry, theirs: Registry, peer: Peer, asked: Counter[str]
) -> None:
    theirs.publish(small_card("a"))
    assert heard(ours, peer).offered == 1
    assert asked == {"health": 1, "changes": 1}
    with Registry.open(ours.home) as restarted:
        assert heard(restarted, peer).offered == 1
        assert asked == {"health": 2, "changes": 1}, "nothing new: one round trip"
        theirs.publish(small_card("b"))
        assert [entry.name for entry in heard(restarted, peer).missing] == ["b"]
        assert asked == {"health": 3, "changes": 2}


def test_what_one_side_published_costs_the_other_no_inventory(
    ours: Registry, theirs: Registry, peer: Peer, asked: Counter[str]
) -> None:
    theirs.publish(small_card("a"))
    heard(ours, peer)
    ours.publish(small_card("own"))
    heard(ours, peer)
    assert asked["changes"] == 1


def test_many_changes_come_in_pages(
    ours: Registry, theirs: Registry, peer: Peer, asked: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_PAGE_CHANGES", 2)
    for number in range(5):
        theirs.publish(small_card(f"card-{number}"))
    assert len(heard(ours, peer).fetched) == 5
    assert asked["changes"] == 3
    with LoRAFlightClient(peer.address) as client:
        assert {entry.digest for entry in client.list_remote_skills()} == theirs.digests()


def test_a_sync_that_is_cut_reads_on_where_it_was(
    ours: Registry, theirs: Registry, peer: Peer, asked: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_PAGE_CHANGES", 2)
    monkeypatch.setattr(limits, "MAX_PAGES", 2)
    for number in range(5):
        theirs.publish(small_card(f"card-{number}"))
    assert len(heard(ours, peer).fetched) == 4
    assert len(heard(ours, peer).fetched) == 1
    assert asked["changes"] == 3


def test_a_catalog_that_was_made_anew_is_read_anew(ours: Registry, liar: Liar) -> None:
    old, new = (entry_of(small_card(name)) for name in ("old", "new"))
    page = {"now": changes_of([old])}
    liar.results["changes"] = lambda: iter([page["now"]])
    peer = Peer.at(liar.address)
    assert [entry.name for entry in sync(ours, [peer], dry_run=True).lacking] == ["old"]
    index_id = "9" * 32
    page["now"] = changes_of([new]).replace(INDEX_ID.encode(), index_id.encode())
    liar.results["health"] = lambda: iter([wire.encode_health(health(index_id=index_id))])
    assert [entry.name for entry in sync(ours, [peer], dry_run=True).lacking] == ["new"]
    assert json.loads(liar.asked[-1]) == {"index_id": INDEX_ID, "since": 1}
    assert Inventories(ours.database).position(NODE_ID) == Position(index_id=index_id, upto=1)


def test_a_node_answers_from_the_beginning_who_knows_another_catalog_or_more_than_there_is(
    theirs: Registry, peer: Peer
) -> None:
    entries = [theirs.publish(small_card(name)) for name in ("a", "b")]
    index_id = theirs.changes().index_id
    with LoRAFlightClient(peer.address) as client:
        for known in (Position(index_id="0" * 32, upto=1), Position(index_id=index_id, upto=9)):
            page = client.changes(known)
            assert (page.since, len(page.added)) == (0, 2)
        page = client.changes(Position(index_id=index_id, upto=1))
        assert (page.since, [entry.digest for entry in page.added]) == (1, [entries[1].digest])
        assert client.changes(page.position).added == ()


def test_removal_travels_through_a_node_that_never_had_the_card(
    ours: Registry, theirs: Registry, peer: Peer, serve: Callable[[str], tuple[Registry, Peer]]
) -> None:
    entry = theirs.publish(small_card("a"))
    heard(ours, peer)
    theirs.remove("a")
    middle, at_middle = serve("middle")
    assert [stone.digest for stone in heard(middle, peer).removed] == [entry.digest]
    assert [stone.label for stone in heard(ours, at_middle).removed] == ["a@1"]
    assert ours.digests() == set()
    late, at_late = serve("late")
    kept = small_card("a").describe(epoch=entry.epoch).signed(theirs.identity)
    assert kept.digest == entry.digest
    LoRAFormat.save(kept, late.home / "kept.lora.arrow")
    late.import_file(late.home / "kept.lora.arrow")
    assert heard(ours, at_late).missing == (), "a copy that somebody kept does not bring it back"
    assert [stone.digest for stone in heard(late, at_middle).removed] == [entry.digest]


def test_a_dry_run_heeds_removals(ours: Registry, theirs: Registry, peer: Peer) -> None:
    theirs.publish(small_card("a"))
    heard(ours, peer)
    theirs.remove("a")
    assert sync(ours, [peer], dry_run=True).peers[0].removed
    assert ours.digests() == set()


def test_a_wrong_tombstone_removes_nothing_and_stops_nothing(ours: Registry, theirs: Registry, liar: Liar) -> None:
    mine = ours.publish(small_card("mine"))
    true = Tombstone.of(mine, theirs.identity, now=_NOON)  # well signed, by somebody else than its publisher
    forged_body = true.body.replace(theirs.identity.id.encode(), ours.identity.id.encode())
    forged = Tombstone.parse(forged_body, theirs.identity.sign(DOMAIN + forged_body))
    page = json.loads(changes_of([entry_of(liar.card)]))
    page["tombstones"] = [{"body": stone.body.decode(), "signature": str(stone.signature)} for stone in (true, forged)]
    liar.results["changes"] = lambda: iter([json.dumps(page).encode()])
    report = heard(ours, Peer.at(liar.address))
    assert [digest for digest, _ in report.failed] == [mine.digest] * 2
    assert report.removed == ()
    assert [entry.digest for entry in report.fetched] == [liar.card.digest]
    assert mine.digest in ours.digests()


def test_a_peer_that_never_ends_is_left_with_what_it_said(
    ours: Registry, liar: Liar, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_PAGES", 3)
    numbers = itertools.count()

    def endless() -> Iterator[bytes]:
        since = json.loads(liar.asked[-1])["since"]
        entry = entry_of(liar.card, digest=digest_of(b"%d" % next(numbers)))
        return iter([changes_of([entry], since=since, last=1 << 40)])

    liar.results["changes"] = endless
    assert sync(ours, [Peer.at(liar.address)], dry_run=True).peers[0].offered == 3
    monkeypatch.setattr(limits, "MAX_INVENTORY_ENTRIES", 4)
    (report,) = sync(ours, [Peer.at(liar.address)], dry_run=True).peers
    assert report.error is not None
    assert "at most 4 cards" in report.error
    assert Inventories(ours.database).count(NODE_ID) == 4


def test_an_inventory_is_bounded_in_characters(ours: Registry, liar: Liar, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_INVENTORY_CHARS", 1000)
    liar.results["changes"] = lambda: iter([changes_of([entry_of(liar.card, examples=("x" * 1000,))])])
    (report,) = sync(ours, [Peer.at(liar.address)]).peers
    assert report.error is not None
    assert "1000 characters" in report.error
    assert Inventories(ours.database).count(NODE_ID) == 0


def test_a_peer_that_is_silent_delays_no_other(ours: Registry, theirs: Registry, peer: Peer, liar: Liar) -> None:
    order: list[str] = []

    def late() -> Iterator[bytes]:
        while "theirs" not in order:
            order.extend(["theirs"] if Inventories(ours.database).position(theirs.identity.id).upto else [])
        return iter([wire.encode_health(health())])

    theirs.publish(small_card("a"))
    liar.results["health"] = late
    report = sync(ours, [Peer.at(liar.address), peer], timeout_s=20)
    assert report.ok
    assert len(report.fetched) == 2


def test_both_cards_of_one_label_stay_and_both_nodes_choose_the_same(
    serve: Callable[[str], tuple[Registry, Peer]],
) -> None:
    (one, at_one), (two, at_two) = serve("one"), serve("two")
    for seed, registry in enumerate((one, two)):
        registry.publish(small_card("poet", seed=seed))
    heard(one, at_two)
    heard(two, at_one)
    assert [entry.labels for entry in one.list()] == [entry.labels for entry in two.list()] == [("poet@1",)] * 2
    assert one.entry("poet").digest == two.entry("poet").digest == max(one.digests())


def test_twenty_thousand_cards_stream(
    ours: Registry, liar: Liar, record_property: Callable[[str, object], None]
) -> None:
    sample = entry_of(liar.card, description="about as long as such a text mostly is " * 3)

    def page() -> Iterator[bytes]:
        since = json.loads(liar.asked[-1])["since"]
        numbers = range(since, since + limits.MAX_PAGE_CHANGES)
        entries = [replace(sample, digest=digest_of(b"%d" % number)) for number in numbers]
        return iter([changes_of(entries, since=since, last=20_000)])

    liar.results["changes"] = page
    liar.results["health"] = lambda: iter([wire.encode_health(health(last=20_000))])
    started = time.monotonic()
    (report,) = sync(ours, [Peer.at(liar.address)], dry_run=True).peers
    record_property("seconds", time.monotonic() - started)
    assert (report.error, report.offered, len(report.missing)) == (None, 20_000, 20_000)
