"""Following peers: what comes by itself and how soon, what does not, and what becomes of what fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from arrowmoe.following import Follower, wanted_of
from arrowmoe.node import Node
from arrowmoe.settings import SyncSettings
from federation import limits
from federation.diff import SyncFilter, entry_of
from federation.errors import FederationError
from federation.peer import Peer
from federation.sync import PeerReport, SyncReport
from registry.digest import Digest
from registry.errors import RegistryError
from tests.arrowmoe.test_node import DEAD, eventually, settings
from tests.registry.cards import small_card

pytestmark = pytest.mark.usefixtures("no_leaked_threads")
GOOD, BAD = entry_of(small_card("good")), entry_of(small_card("bad", seed=1))


class Recorded:
    """A sync that brings nothing, and in which the cards `failing` fail."""

    def __init__(self, *failing: Digest, error: Exception | None = None) -> None:
        self.failing, self.error = failing, error
        self.asked: list[set[str]] = []

    def __call__(self, peers: list[Peer], *, wanted: SyncFilter, cancelled: threading.Event) -> SyncReport:
        tried = [entry for entry in (GOOD, BAD) if wanted.wants(entry)]
        self.asked.append({entry.name for entry in tried})
        if self.error is not None:
            raise self.error
        failed = tuple((entry.digest, "the weights are NaN") for entry in tried if entry.digest in self.failing)
        return SyncReport(peers=tuple(PeerReport(peer=peer, failed=failed) for peer in peers))


def look(*entries: Any) -> SyncReport:
    return SyncReport(peers=(PeerReport(peer=Peer.at(DEAD), missing=entries),))


def test_a_card_that_fails_is_tried_later_and_later_and_keeps_no_other_waiting(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now_s, fetch = [0.0], Recorded(BAD.digest)
    follower = Follower(fetch, SyncFilter(), clock=lambda: now_s[0])
    found = look(GOOD, BAD)
    follower.follow(found)
    assert "card_backed_off" in caplog.text
    assert "the weights are NaN" in caplog.text
    follower.follow(found)
    assert fetch.asked == [{"good", "bad"}, {"good"}]
    now_s[0] += limits.FIRST_CARD_BACKOFF_S
    follower.follow(found)
    assert fetch.asked[2] == {"good", "bad"}
    now_s[0] += limits.FIRST_CARD_BACKOFF_S * 0.99
    follower.follow(look(BAD))
    assert len(fetch.asked) == 3, "twice as long now, of which chance takes at most a half"


def test_nothing_missing_or_wanted_asks_nobody() -> None:
    fetch = Recorded()
    follower = Follower(fetch, SyncFilter(names=("b*",)))
    assert follower.follow(look()) is None
    assert follower.follow(look(GOOD)) is None
    follower.follow(look(GOOD, BAD))
    assert fetch.asked == [{"bad"}]


@pytest.mark.parametrize("error", [RegistryError("the catalog is locked"), ValueError("a bug")])
def test_a_round_that_fails_is_told_and_the_next_one_comes(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    fetch = Recorded(error=error)
    follower = Follower(fetch, SyncFilter())
    thread = threading.Thread(target=follower.run)
    thread.start()
    for count in (1, 2):
        follower.heard(look(GOOD))
        eventually(lambda count=count: len(fetch.asked) == count)  # type: ignore[misc]
    follower.end()
    thread.join(5)
    assert not thread.is_alive()
    assert caplog.text.count("peers_not_followed") == 2


def test_the_settings_say_what_is_wanted() -> None:
    node_id = "-".join(["abcd"] * 8)
    wanted = wanted_of(SyncSettings(names=("po*",), publishers=(node_id,), max_mib=0.5))
    assert wanted == SyncFilter(names=("po*",), publishers=("abcd" * 8,), max_bytes=1 << 19)
    with pytest.raises(FederationError, match="node id"):
        wanted_of(SyncSettings(publishers=("anna",)))


def test_a_card_published_on_a_peer_arrives_within_seconds_at_the_default_interval(
    make_home: Callable[[str], Path],
) -> None:
    auto = {"sync": SyncSettings(auto=True, names=("po*",)), "peer_interval_s": 5.0}
    with Node(settings(make_home("giver"))) as giver:
        first = giver.registry.publish(small_card("poet"))
        with Node(settings(make_home("taker"), peers=(DEAD, giver.record.address), **auto)) as taker:
            eventually(lambda: taker.registry.digests() == {first.digest})
            giver.registry.publish(small_card("other", seed=1))
            second = giver.registry.publish(small_card("potter", seed=2))
            started_s = time.monotonic()
            eventually(lambda: taker.registry.digests() == {first.digest, second.digest})
            assert time.monotonic() - started_s < 8.0
            giver.registry.remove("potter")
            eventually(lambda: taker.registry.digests() == {first.digest})


def test_without_it_cards_stay_where_they_are(make_home: Callable[[str], Path]) -> None:
    with Node(settings(make_home("giver"))) as giver:
        giver.registry.publish(small_card())
        with Node(settings(make_home("taker"), peers=(giver.record.address,))) as taker:
            eventually(lambda: len(taker.swarm.offers) == 1)
            taker.peers()
            assert taker.registry.digests() == set()


def test_a_node_ends_while_it_fetches_and_goes_on_at_the_next_start(make_home: Callable[[str], Path]) -> None:
    slow = SyncSettings(auto=True, mib_per_s=0.25)
    card = small_card("large", modules={f"m{n}": (512, 512) for n in range(64)}, rank=16)
    with Node(settings(make_home("giver"))) as giver:
        digest = giver.registry.publish(card).digest
        taking = settings(make_home("taker"), peers=(giver.record.address,), sync=slow)
        with Node(taking) as taker:
            drafts = taker.settings.home / "drafts"
            eventually(lambda: bool([*drafts.glob("*")]))
            assert taker.registry.digests(quarantined=True) == set()
            started_s = time.monotonic()
        assert time.monotonic() - started_s < 8.0
        fast = taking.model_copy(update={"sync": SyncSettings(auto=True)})
        with Node(fast) as taker:
            eventually(lambda: taker.registry.digests(quarantined=True) == {digest})


def test_a_peer_that_does_not_answer_is_asked_less_and_less_by_itself_and_at_once_on_request(
    make_home: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    with Node(settings(make_home("alone"), peers=(DEAD,), peer_interval_s=0.1)) as node:
        eventually(lambda: caplog.text.count("peer_backed_off") >= 1)
        node.swarm._backoff.failed(f"{DEAD} ", time.monotonic() + 60)
        assert node.swarm.look(everyone=False).peers == ()
        assert [peer.error is None for peer in node.peers()] == [False]
