"""Care: damage is found by reading everything again, and healed by whoever else has the card."""

from __future__ import annotations

import json
import threading
import time
from itertools import islice

import pytest

from federation.care import Scrub, heal
from federation.errors import FederationError
from registry.card import LoRACard
from registry.digest import Digest
from registry.store import Registry
from tests.registry.cards import small_card

NOBODY = "no peer has it"


class Peers:
    """Has the cards it is given, and remembers what was asked for."""

    def __init__(self, *cards: LoRACard) -> None:
        self._cards = {card.digest: card for card in cards}
        self.asked: list[Digest] = []

    def __call__(self, digest: Digest) -> LoRACard:
        self.asked.append(digest)
        if digest not in self._cards:
            raise FederationError(NOBODY)
        return self._cards[digest]


def published(registry: Registry, count: int = 3) -> list[LoRACard]:
    """Copies in memory of the cards that were published, by digest."""
    entries = [registry.publish(small_card(f"card{index}", seed=index)) for index in range(count)]
    cards = [registry.get(entry.digest) for entry in entries]
    whole = [small_card(card.name, seed=index) for index, card in enumerate(cards)]
    pairs = zip(cards, whole, strict=True)
    copies = [LoRACard(**{**vars_of(card), "tensors": copy.tensors}) for card, copy in pairs]
    return sorted(copies, key=lambda card: card.digest)


def vars_of(card: LoRACard) -> dict[str, object]:
    return {"manifest_bytes": card.manifest_bytes, "manifest": card.manifest, "signature": card.signature}


def damage(registry: Registry, digest: Digest) -> None:
    """Turn one bit of the middle of the file, as a disk would, without a word to whoever has it open."""
    path = registry.path_of(digest)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.unlink()
    path.write_bytes(data)


def test_a_damaged_and_a_lost_card_are_healed(ours: Registry) -> None:
    rotten, lost, whole = published(ours)
    damage(ours, rotten.digest)
    ours.path_of(lost.digest).unlink()
    peers = Peers(rotten, lost, whole)
    done = heal(ours, ours.verify(), peers)
    assert [(one.digest, one.ok) for one in done] == [(rotten.digest, True), (lost.digest, True)]
    assert peers.asked == [rotten.digest, lost.digest]
    assert all(report.ok for report in ours.verify())
    assert ours.changes().last == 3  # nobody hears of it: the cards are the same


def test_what_nobody_has_stays_damaged_and_is_told(ours: Registry) -> None:
    [card] = published(ours, 1)
    damage(ours, card.digest)
    [one] = heal(ours, ours.verify(), Peers())
    assert (one.ok, one.error) == (False, NOBODY)
    assert not ours.verify()[0].ok


def test_a_peers_other_card_heals_nothing(ours: Registry) -> None:
    card, other = published(ours, 2)
    damage(ours, card.digest)
    before = ours.path_of(card.digest).read_bytes()
    [one] = heal(ours, ours.verify(), lambda digest: other)
    assert not one.ok
    assert ours.path_of(card.digest).read_bytes() == before


def test_a_file_without_a_row_is_not_fetched(ours: Registry) -> None:
    [card] = published(ours, 1)
    stray = ours.home / "cards" / "ab" / ("ab" + "0" * 62 + ".lora.arrow")
    stray.parent.mkdir(exist_ok=True)
    stray.write_bytes(b"what is this")
    peers = Peers(card)
    assert heal(ours, ours.verify(), peers) == []
    assert peers.asked == []


def test_a_scrub_sees_every_card_once_a_pass(ours: Registry) -> None:
    digests = [card.digest for card in published(ours)]
    scrub = Scrub(ours, bytes_per_s=1e9, fetch=Peers())
    for _ in range(2):
        assert [report.digest for report in scrub.rest_of_pass()] == digests


def test_a_scrub_carries_on_where_it_was(ours: Registry) -> None:
    digests = [card.digest for card in published(ours)]
    reports = Scrub(ours, bytes_per_s=1e9, fetch=Peers()).rest_of_pass()
    assert [report.digest for report in islice(reports, 2)] == digests[:2]
    reports.close()
    again = Scrub(ours, bytes_per_s=1e9, fetch=Peers())
    assert [report.digest for report in again.rest_of_pass()] == digests[2:]
    assert [report.digest for report in again.rest_of_pass()] == digests


@pytest.mark.parametrize("said", ["", "{", "[]", '{"done": 7}', '{"done": "../x"}'])
def test_a_scrub_whose_place_is_lost_begins_anew(ours: Registry, said: str) -> None:
    digests = [card.digest for card in published(ours)]
    (ours.home / "scrub.json").write_text(said)
    assert [report.digest for report in Scrub(ours, bytes_per_s=1e9, fetch=Peers()).rest_of_pass()] == digests


def test_a_scrub_heals_and_says_what_was_wrong(ours: Registry) -> None:
    cards = published(ours)
    damage(ours, cards[1].digest)
    reports = list(Scrub(ours, bytes_per_s=1e9, fetch=Peers(*cards)).rest_of_pass())
    assert [report.ok for report in reports] == [True, False, True]
    assert all(report.ok for report in ours.verify())


def test_a_card_removed_in_the_middle_is_passed_over(ours: Registry) -> None:
    cards = published(ours)
    reports = Scrub(ours, bytes_per_s=1e9, fetch=Peers()).rest_of_pass()
    next(reports)
    ours.remove(cards[1].digest)
    assert [report.digest for report in reports] == [cards[2].digest]


def test_a_scrub_keeps_its_pace_and_stops_when_told(ours: Registry) -> None:
    cards = published(ours)
    stop = threading.Event()
    scrub = Scrub(ours, bytes_per_s=cards[0].nbytes / 0.4, fetch=Peers())
    thread = threading.Thread(target=scrub.run, args=(stop,))
    started = time.monotonic()
    thread.start()
    while not (ours.home / "scrub.json").exists() and time.monotonic() < started + 30:
        time.sleep(0.01)
    elapsed = time.monotonic() - started
    stop.set()
    thread.join(5)
    assert not thread.is_alive()
    assert elapsed >= 1.1  # three cards of 0.4 s each, and the note that the pass is done
    assert json.loads((ours.home / "scrub.json").read_text()) == {"done": ""}
