"""Quarantine: a card that is here and is as good as unknown until its owner lets it in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from registry.card import LoRACard
from registry.catalog import Catalog
from registry.changes import Kind
from registry.database import Database
from registry.entries import Holding, Origin
from registry.errors import (
    AmbiguousCardError,
    CardIntegrityError,
    LabelTakenError,
    QuarantinedCardError,
    RemovedCardError,
    UnknownCardError,
)
from registry.format import LoRAFormat
from registry.identity import Identity
from registry.listing import of_name
from registry.store import Registry
from registry.tombstones import Tombstone
from tests.registry.cards import small_card

PEER = Origin(peer_id="0" * 32, address="192.0.2.1:8815")
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
WHY = "its publisher is not known here"


@pytest.fixture
def catalog(database: Database) -> Catalog:
    return Catalog(database)


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry.open(tmp_path / "home") as registry:
        yield registry


def stranger(name: str = "poet", *, version: str = "1", epoch: int = 1, seed: int = 0) -> LoRACard:
    return small_card(name, version=version, epoch=epoch, seed=seed).signed(Identity.generate())


# The catalog --------------------------------------------------------------------------------------------------------


def test_a_card_in_quarantine_is_listed_to_who_asks_and_to_nobody_else(catalog: Catalog) -> None:
    card = stranger()
    entry = catalog.add(card, tags=["new"], origin=PEER, quarantine_for=WHY)
    assert (entry.quarantined, entry.labels) == (WHY, ())
    assert catalog.list() == catalog.list(of_name("poet")) == catalog.search("poet") == catalog.search("new") == []
    assert catalog.digests() == set()
    assert (catalog.changes().last, catalog.changes().entries) == (0, ())
    assert catalog.list(quarantined=True) == [entry]
    assert catalog.digests(quarantined=True) == {card.digest}
    assert (catalog.holds(card.digest), catalog.is_admitted(card.digest)) == (True, False)


@pytest.mark.parametrize("ref", ["poet", "poet@1", "digest", "prefix"])
def test_a_card_in_quarantine_is_found_by_who_asks_only(catalog: Catalog, ref: str) -> None:
    card = stranger()
    catalog.add(card, origin=PEER, quarantine_for=WHY)
    ref = {"digest": card.digest, "prefix": card.digest[7:19]}.get(ref, ref)
    with pytest.raises(QuarantinedCardError, match="in quarantine") as caught:
        catalog.resolve(ref)
    assert caught.value.hint is not None
    assert f"arrowmoe skills admit {card.digest}" in caught.value.hint
    assert catalog.resolve(ref, quarantined=True) == catalog.entry(ref, quarantined=True).digest == card.digest


def test_a_card_in_quarantine_takes_no_name_from_another(catalog: Catalog) -> None:
    author = Identity.generate()
    old = small_card("poet", epoch=1).signed(author)
    catalog.add(old)
    catalog.add(stranger(version="99", seed=1), origin=PEER, quarantine_for=WHY)
    catalog.add(small_card("poet", epoch=2, seed=2).signed(author), origin=PEER, quarantine_for="too strong")
    assert catalog.resolve("poet") == catalog.resolve("poet@1") == old.digest
    assert not catalog.entry("poet").superseded
    assert catalog.next_version("poet") == "2"
    catalog.add(stranger(version="99", seed=3), origin=PEER, quarantine_for=WHY)
    with pytest.raises(AmbiguousCardError, match="several cards in quarantine"):
        catalog.resolve("poet@99")


def test_an_admitted_card_gets_its_label_and_its_number(catalog: Catalog) -> None:
    author = Identity.generate()
    old, new = (small_card("poet", epoch=epoch, seed=epoch).signed(author) for epoch in (1, 2))
    catalog.add(old, origin=PEER)
    catalog.add(new, origin=PEER, quarantine_for=WHY)
    entry = catalog.admit(new.digest)
    assert (entry.quarantined, entry.labels, entry.origin) == (None, ("poet@1",), PEER)
    assert catalog.resolve("poet") == new.digest
    assert catalog.entry(old.digest).superseded
    assert [(one.digest, one.kind) for one in catalog.changes().entries] == [
        (old.digest, Kind.ADDED),
        (new.digest, Kind.ADDED),
    ]
    last = catalog.changes().last
    assert catalog.admit(new.digest) == entry
    assert catalog.changes().last == last


def test_an_old_card_admitted_late_stays_without_its_label(catalog: Catalog) -> None:
    author = Identity.generate()
    old, new = (small_card("poet", epoch=epoch, seed=epoch).signed(author) for epoch in (1, 2))
    catalog.add(old, origin=PEER, quarantine_for=WHY)
    catalog.add(new, origin=PEER)
    entry = catalog.admit(old.digest)
    assert (entry.labels, entry.superseded) == ((), True)
    assert catalog.resolve("poet") == new.digest


def test_a_card_in_quarantine_comes_out_by_hand_and_not_by_a_sync(catalog: Catalog) -> None:
    card = stranger()
    catalog.add(card, origin=PEER, quarantine_for=WHY)
    assert catalog.refused([(card.digest, card.manifest.publisher)]) == {card.digest}
    assert catalog.add(card, origin=PEER).quarantined == WHY
    assert catalog.add(card).quarantined is None
    assert catalog.resolve("poet") == card.digest
    assert catalog.refused([(card.digest, card.manifest.publisher)]) == set()


def test_a_known_card_does_not_go_back_into_quarantine(catalog: Catalog) -> None:
    card = stranger()
    catalog.add(card)
    assert catalog.add(card, origin=PEER, quarantine_for=WHY).quarantined is None


def test_a_card_in_quarantine_can_be_removed_and_then_is_hidden(catalog: Catalog) -> None:
    card = stranger()
    catalog.add(card, origin=PEER, quarantine_for=WHY)
    catalog.remove(card.digest)
    assert catalog.digests(quarantined=True) == set()
    assert [one.digest for one in catalog.hidden()] == [card.digest]
    assert catalog.changes().last == 0  # nobody was told that it came
    with pytest.raises(RemovedCardError):
        catalog.add(card, origin=PEER, quarantine_for=WHY)


def test_a_tombstone_reaches_into_quarantine(catalog: Catalog) -> None:
    author = Identity.generate()
    card = small_card("poet", epoch=1).signed(author)
    entry = catalog.add(card, origin=PEER, quarantine_for=WHY)
    assert catalog.bury(Tombstone.of(entry, author, now=NOON))
    assert catalog.digests(quarantined=True) == set()
    with pytest.raises(UnknownCardError):
        catalog.admit(card.digest)


def test_how_much_came_from_a_peer(catalog: Catalog) -> None:
    one, two, other = stranger(seed=1), stranger(seed=2), stranger(seed=3)
    assert catalog.held_from(PEER.peer_id) == Holding(cards=0, nbytes=0)
    catalog.add(one, origin=PEER)
    catalog.add(two, origin=PEER, quarantine_for=WHY)
    catalog.add(other, origin=Origin(peer_id="1" * 32, address="192.0.2.2:1"))
    assert catalog.held_from(PEER.peer_id) == Holding(cards=2, nbytes=one.nbytes + two.nbytes)


# The registry -------------------------------------------------------------------------------------------------------


def test_a_card_in_quarantine_is_neither_used_nor_served(registry: Registry) -> None:
    card = stranger()
    registry.admit(card, origin=PEER, quarantine_for=WHY)
    assert (registry.digests(), registry.list(), registry.newest()) == (set(), [], [])
    uses: list[Callable[[], object]] = [
        lambda: registry.get("poet"),
        lambda: registry.get(card.digest),
        lambda: registry.export("poet", registry.home / "out"),
        lambda: registry.tag("poet", "good"),
        lambda: registry.label("poet", "better", "1"),
    ]
    for use in uses:
        with pytest.raises(QuarantinedCardError):
            use()
    with pytest.raises(UnknownCardError):
        registry.path_of(card.digest)
    assert registry.get("poet", verify=True, quarantined=True) == card
    assert [(report.ok, report.digest) for report in registry.verify()] == [(True, card.digest)]
    assert registry.release("poet").quarantined is None
    assert registry.get("poet") == card


def test_publishing_under_the_name_of_a_card_in_quarantine_works(registry: Registry) -> None:
    registry.admit(stranger(), origin=PEER, quarantine_for=WHY)
    mine = registry.publish(small_card("poet", seed=7))
    assert registry.entry("poet") == mine
    assert len(registry.list(quarantined=True)) == 2


def test_a_card_in_quarantine_whose_label_is_taken_survives_that_it_is_published(registry: Registry) -> None:
    registry.publish(small_card("poet", seed=7))
    card = stranger()
    registry.admit(card, origin=PEER, quarantine_for=WHY)
    with pytest.raises(LabelTakenError):
        registry.publish(card)
    assert registry.entry(card.digest, quarantined=True).quarantined == WHY
    assert registry.verify(card.digest)[0].ok


def test_an_import_by_hand_releases(registry: Registry, tmp_path: Path) -> None:
    card = stranger()
    registry.admit(card, origin=PEER, quarantine_for=WHY)
    LoRAFormat.save(card, tmp_path / "poet.lora.arrow")
    assert registry.import_file(tmp_path / "poet.lora.arrow").quarantined is None
    assert registry.digests() == {card.digest}


def test_removing_a_card_in_quarantine_removes_its_file(registry: Registry) -> None:
    card = stranger()
    registry.admit(card, origin=PEER, quarantine_for=WHY)
    registry.remove("poet")
    assert registry.verify() == []
    assert not list((registry.home / "cards").rglob("*.arrow"))


# Restoring ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["damaged", "gone"])
def test_a_lost_or_damaged_file_is_written_anew(registry: Registry, loss: str) -> None:
    card = stranger()
    registry.admit(card, origin=PEER)
    path = registry.path_of(card.digest)
    if loss == "gone":
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    assert not registry.verify(card.digest)[0].ok
    registry.restore(card)
    assert registry.verify(card.digest)[0].ok
    assert not list((registry.home / "tmp").iterdir())


def test_only_the_card_itself_restores_a_card_that_is_here(registry: Registry) -> None:
    card = stranger()
    with pytest.raises(UnknownCardError):
        registry.restore(card)
    assert not list((registry.home / "cards").rglob("*.arrow"))
    other = stranger(seed=1)
    with pytest.raises(CardIntegrityError):
        registry.restore(LoRACard(manifest_bytes=card.manifest_bytes, manifest=card.manifest, tensors=other.tensors))
