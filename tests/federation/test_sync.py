from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from federation.diff import SyncFilter
from federation.limits import STREAMS_PER_PEER
from federation.peer import Peer
from federation.server import LoRAFlightServer
from federation.sync import PeerReport, SyncProgress, SyncReport, sync
from registry.blobs import FileBlobStore
from registry.digest import Digest, digest_of
from registry.drafts import BLOCK_BYTES
from registry.store import Registry
from tests.federation.conftest import serving
from tests.federation.liar import Liar, changes_of, entry_of
from tests.federation.proxy import Proxy
from tests.registry.cards import module_shapes, small_card


@pytest.fixture
def peer(server: LoRAFlightServer) -> Peer:
    return Peer.at(server.address)


@pytest.fixture
def serve(make_registry: Callable[[str], Registry]) -> Iterator[Callable[[str], tuple[Registry, Peer]]]:
    """Opens a registry by name, and serves it."""
    with ExitStack() as stack:

        def start(name: str) -> tuple[Registry, Peer]:
            registry = make_registry(name)
            server = LoRAFlightServer(registry, node_id=registry.identity.id, name=name)
            stack.enter_context(server)
            return registry, Peer.at(server.address)

        yield start


def only_peer(report: SyncReport) -> PeerReport:
    (peer,) = report.peers
    return peer


def remove_for_now(registry: Registry, digest: Digest) -> None:
    """As if it had never come."""
    registry.remove(digest)
    registry.unhide(digest)


def files(registry: Registry) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(registry.home.rglob("*.lora.arrow"))}


def test_what_is_missing_comes_as_it_was_signed(ours: Registry, theirs: Registry, peer: Peer) -> None:
    entries = [theirs.publish(small_card(name, seed=seed)) for seed, name in enumerate(["a", "b", "c"])]
    report = only_peer(sync(ours, [peer]))
    assert report.error is None
    assert report.failed == ()
    assert (report.peer.name, report.peer.node_id) == ("theirs", theirs.identity.id)
    assert report.offered == len(report.missing) == 3
    assert ours.digests() == theirs.digests() == {entry.digest for entry in report.fetched}
    assert report.bytes_moved == sum(entry.nbytes for entry in entries)
    assert report.tensors_verified == 12
    for entry in entries:
        here, there = ours.get(entry.digest, verify=True), theirs.get(entry.digest)
        assert here.manifest_bytes == there.manifest_bytes
        assert here.signature == there.signature
        assert here.manifest.publisher == theirs.identity.id
        origin = ours.entry(entry.digest).origin
        assert origin is not None
        assert (origin.peer_id, origin.address) == (theirs.identity.id, peer.address)


def test_cards_pass_on_through_a_node_that_did_not_publish_them(
    ours: Registry, theirs: Registry, peer: Peer, serve: Callable[[str], tuple[Registry, Peer]]
) -> None:
    theirs.publish(small_card("a"))
    middle, middle_peer = serve("middle")
    sync(middle, [peer])
    sync(ours, [middle_peer])
    (entry,) = ours.list()
    assert entry.publisher == theirs.identity.id
    assert entry.origin is not None
    assert entry.origin.peer_id == middle.identity.id


def test_a_dry_run_says_what_it_would_fetch_and_moves_nothing(ours: Registry, theirs: Registry, peer: Peer) -> None:
    entry = theirs.publish(small_card("a"))
    report = sync(ours, [peer], dry_run=True)
    assert [missing.digest for missing in report.lacking] == [entry.digest]
    assert report.fetched == ()
    assert report.bytes_moved == 0
    assert ours.digests() == set()


def test_only_what_was_asked_for(ours: Registry, theirs: Registry, peer: Peer) -> None:
    entries = {name: theirs.publish(small_card(name, version="2")) for name in ("a", "b", "c", "d")}
    sync(ours, [peer], wanted=SyncFilter(names=("a", "b@2", entries["c"].digest, "nobody")))
    assert {entry.name for entry in ours.list()} == {"a", "b", "c"}


def test_a_card_that_is_not_what_was_offered_does_not_pass_the_filter(ours: Registry, liar: Liar) -> None:
    liar.results["changes"] = lambda: iter([changes_of([entry_of(liar.card, base_name="wanted", nbytes=1)])])
    for wanted in (SyncFilter(bases=("wanted",)), SyncFilter(max_bytes=liar.card.nbytes - 1)):
        ((_, reason),) = only_peer(sync(ours, [Peer.at(liar.address)], wanted=wanted)).failed
        assert "not wanted" in reason
    assert ours.digests() == set()


def test_progress_ends_at_the_total(ours: Registry, theirs: Registry, peer: Peer) -> None:
    total = sum(theirs.publish(small_card(name)).nbytes for name in ("a", "b"))
    seen: list[SyncProgress] = []
    sync(ours, [peer], on_progress=seen.append)
    assert {(event.bytes_total, event.cards_total) for event in seen} == {(total, 2)}
    assert [event.bytes_done for event in seen] == sorted(event.bytes_done for event in seen)
    assert (seen[0].bytes_done, seen[0].cards_done) == (0, 0)
    assert (seen[-1].bytes_done, seen[-1].cards_done) == (total, 2)
    assert {event.card for event in seen} == {"a@1", "b@1"}


def test_one_peer_that_is_not_there_stops_nobody(ours: Registry, theirs: Registry, peer: Peer) -> None:
    theirs.publish(small_card("a"))
    report = sync(ours, [Peer(host="127.0.0.1", port=1), peer], timeout_s=2)
    assert report.peers[0].error is not None
    assert "not available" in report.peers[0].error
    assert [entry.name for entry in report.peers[1].fetched] == ["a"]
    assert not report.ok


def test_a_card_that_two_peers_hold_is_fetched_once(
    ours: Registry, serve: Callable[[str], tuple[Registry, Peer]]
) -> None:
    (one, at_one), (two, at_two) = serve("one"), serve("two")
    one.publish(small_card("a"))
    sync(two, [at_one])
    report = sync(ours, [at_one, at_two])
    assert [len(peer.fetched) for peer in report.peers] == [1, 0]
    assert report.bytes_moved == small_card("a").nbytes
    assert report.ok


def test_a_card_that_the_first_peer_cannot_give_comes_from_the_next(
    ours: Registry, theirs: Registry, peer: Peer, liar: Liar
) -> None:
    theirs.publish(small_card("good"))
    (digest,) = theirs.digests()
    liar.card = theirs.get(digest)
    liar.results["changes"] = lambda: iter([changes_of([entry_of(liar.card)])])
    liar.tensor_bytes = lambda: iter([])
    report = sync(ours, [Peer.at(liar.address), peer])
    assert [failed for failed, _ in report.peers[0].failed] == [digest]
    assert [entry.digest for entry in report.peers[1].fetched] == [digest]
    assert ours.digests() == {digest}
    assert report.ok


def test_one_bad_card_stops_no_other(ours: Registry, theirs: Registry, peer: Peer) -> None:
    entries = [theirs.publish(small_card(name)) for name in ("a", "b", "c")]
    path = theirs.path_of(entries[1].digest)
    path.chmod(0o600)
    path.write_bytes(b"damaged")
    report = only_peer(sync(ours, [peer]))
    assert {entry.name for entry in report.fetched} == {"a", "c"}
    ((digest, reason),) = report.failed
    assert digest == entries[1].digest
    assert "damaged or gone" in reason


def test_a_peer_of_another_id_than_announced_is_not_believed(ours: Registry, server: LoRAFlightServer) -> None:
    peer = Peer(host="127.0.0.1", port=server.port, node_id="f" * 32, source="mdns")
    error = only_peer(sync(ours, [peer])).error
    assert error is not None
    assert "expected node ffff" in error


def test_a_node_does_not_sync_with_itself(theirs: Registry, peer: Peer) -> None:
    error = only_peer(sync(theirs, [peer])).error
    assert error is not None
    assert "itself" in error


def test_the_same_label_on_two_nodes_keeps_both_cards(ours: Registry, theirs: Registry, peer: Peer) -> None:
    ours.publish(small_card("a", seed=1))
    theirs.publish(small_card("a", seed=2))
    assert only_peer(sync(ours, [peer])).error is None
    assert len(ours.digests()) == 2


def test_what_was_removed_here_is_not_fetched_again_until_it_may_come(
    ours: Registry, theirs: Registry, peer: Peer
) -> None:
    entry = theirs.publish(small_card("a"))
    assert sync(ours, [peer]).fetched
    ours.remove("a")
    for _ in range(2):
        report = only_peer(sync(ours, [peer]))
        assert (report.missing, report.failed, report.bytes_moved) == ((), (), 0)
    ours.unhide("a")
    assert [found.digest for found in sync(ours, [peer]).fetched] == [entry.digest]


def test_what_failed_is_tried_again_though_nothing_changed(ours: Registry, liar: Liar) -> None:
    honest, liar.tensor_bytes = liar.tensor_bytes, lambda: iter([])
    peer = Peer.at(liar.address)
    assert only_peer(sync(ours, [peer])).failed
    assert only_peer(sync(ours, [peer], wanted=SyncFilter(names=("else",)))).failed == ()
    liar.tensor_bytes = honest
    assert len(only_peer(sync(ours, [peer])).fetched) == 1


def test_a_registry_that_cannot_write_is_reported_not_raised(
    ours: Registry, theirs: Registry, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    theirs.publish(small_card("a"))
    monkeypatch.setattr(FileBlobStore, "adopt", full)
    ((_, reason),) = only_peer(sync(ours, [peer])).failed
    assert "expected room for" in reason


def test_200_cards_between_two_processes_and_a_second_sync_moves_nothing(
    ours: Registry, theirs: Registry, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    for index in range(200):
        theirs.publish(small_card(f"card-{index:03}", seed=index, modules=2))
    with serving(tmp_path / "theirs") as other, Proxy(other.port) as proxy:
        started = time.monotonic()
        first = sync(ours, [Peer.at(proxy.address)])
        record_property("seconds", time.monotonic() - started)
        assert first.ok
        assert len(first.fetched) == 200
        assert ours.digests() == theirs.digests()
        assert proxy.bytes_back > first.bytes_moved
        proxy.reset()
        before = files(ours)
        second = sync(ours, [Peer.at(proxy.address)])
        assert second.ok
        assert (second.fetched, second.lacking, second.bytes_moved) == ((), (), 0)
        assert proxy.bytes_back + proxy.bytes_there < 4096  # one small round trip; the inventory alone is 60 KiB
        assert files(ours) == before
    assert all(report.ok for report in ours.verify())


LARGE = module_shapes(16, d_in=1 << 16, d_out=8)


def test_a_cut_in_the_middle_leaves_nothing_and_the_next_sync_completes(
    ours: Registry, theirs: Registry, server: LoRAFlightServer
) -> None:
    theirs.publish(small_card("large", modules=LARGE))
    (digest,) = theirs.digests()
    size = theirs.path_of(digest).stat().st_size
    moved = 0
    with Proxy(server.port) as proxy:
        for share in (0.02, 0.2, 0.4):
            proxy.reset()
            proxy.cut_after = int(size * share)
            report = only_peer(sync(ours, [Peer.at(proxy.address)]))
            ((failed, reason),) = report.failed
            assert failed == digest
            assert "is not available" in reason or "failed" in reason  # the line's fault, not the peer's
            moved += report.bytes_moved
            assert ours.digests() == set()
            assert files(ours) == {}
        proxy.reset()
        report = sync(ours, [Peer.at(proxy.address)])
        assert report.ok
    assert report.bytes_moved < size, "what came before the cuts did not come again"
    assert moved + report.bytes_moved < size + 3 * STREAMS_PER_PEER * BLOCK_BYTES
    assert ours.digests() == {digest}
    assert ours.get(digest, verify=True) == theirs.get(digest)


def test_a_flipped_bit_on_the_wire_is_never_stored(ours: Registry, theirs: Registry, server: LoRAFlightServer) -> None:
    theirs.publish(small_card("a", modules=8))
    (digest,) = theirs.digests()
    with Proxy(server.port) as proxy:
        sync(ours, [Peer.at(proxy.address)])
        total = proxy.bytes_back
        remove_for_now(ours, digest)
        outcomes = []
        for position in range(0, total, total // 40):
            proxy.reset()
            proxy.flip_at = position
            report = only_peer(sync(ours, [Peer.at(proxy.address)], timeout_s=1.0))
            outcomes.append(bool(report.failed or report.error))
            for entry in report.fetched:
                assert ours.get(entry.digest, verify=True).digest == digest
                remove_for_now(ours, entry.digest)
            assert ours.digests() == set()
        assert sum(outcomes) > len(outcomes) // 2


def test_a_slow_line_is_waited_for(ours: Registry, theirs: Registry, server: LoRAFlightServer) -> None:
    theirs.publish(small_card("a"))
    with Proxy(server.port) as proxy:
        proxy.delay_s = 0.05
        assert sync(ours, [Peer.at(proxy.address)]).ok


def test_a_peer_that_goes_silent_in_the_middle_is_given_up(
    ours: Registry, theirs: Registry, server: LoRAFlightServer
) -> None:
    theirs.publish(small_card("a"))
    started = time.monotonic()
    with Proxy(server.port) as proxy:
        proxy.delay_s = 1.5
        report = only_peer(sync(ours, [Peer.at(proxy.address)], timeout_s=0.5))
    assert report.error is not None
    assert "in time" in report.error
    assert time.monotonic() - started < 6


def test_nothing_is_asked_of_nobody(ours: Registry) -> None:
    report = sync(ours, [])
    assert report.ok
    assert report.fetched == ()
    assert digest_of(b"") not in ours.digests()
