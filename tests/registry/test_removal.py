"""Removal, and no way back: tombstones, hidden cards, epochs. Two nodes here are two registries and no network."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from itertools import permutations
from pathlib import Path

import pytest

from registry.card import LoRACard
from registry.changes import Kind
from registry.entries import CardEntry
from registry.errors import (
    AmbiguousCardError,
    CardFormatError,
    CardIntegrityError,
    LabelTakenError,
    ManifestError,
    RemovedCardError,
    UnknownCardError,
)
from registry.format import LoRAFormat
from registry.identity import Identity, Signature
from registry.manifest import manifest_bytes
from registry.store import Origin, Registry
from registry.tombstones import DOMAIN, MAX_TOMBSTONE_BYTES, Tombstone
from tests.registry.cards import small_card

PEER = Origin(peer_id="0" * 32, address="192.0.2.1:8815")
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)

Open = Callable[[str], Registry]


@pytest.fixture
def open_home(tmp_path: Path) -> Iterator[Open]:
    with ExitStack() as stack:
        yield lambda name: stack.enter_context(Registry.open(tmp_path / name))


@pytest.fixture
def here(open_home: Open) -> Registry:
    return open_home("here")


@pytest.fixture
def there(open_home: Open) -> Registry:
    return open_home("there")


def removed(registry: Registry, ref: str) -> Tombstone:
    """The tombstone that removing a card of the registry's own made."""
    digest = registry.remove(ref).digest
    [tombstone] = [one for one in registry.changes().tombstones if one.digest == digest]
    return tombstone


def files(registry: Registry) -> list[Path]:
    return [path for folder in ("cards", "tmp") for path in (registry.home / folder).rglob("*") if path.is_file()]


# Tombstones ---------------------------------------------------------------------------------------------------------


def test_removing_an_own_card_makes_a_signed_tombstone(here: Registry) -> None:
    entry = here.publish(small_card("poet"))
    tombstone = removed(here, "poet")
    tombstone.verify()
    assert (tombstone.digest, tombstone.label, tombstone.publisher) == (entry.digest, "poet@1", here.identity.id)
    assert json.loads(tombstone.body)["epoch"] == tombstone.epoch == entry.epoch == 1
    assert Tombstone.parse(tombstone.body, Signature.parse(str(tombstone.signature))) == tombstone
    assert (here.digests(), here.hidden(), files(here)) == (set(), [], [])


def test_a_removed_card_comes_back_by_no_way(here: Registry, there: Registry, tmp_path: Path) -> None:
    card = there.get(there.publish(small_card("poet")).digest)
    file = tmp_path / "poet.lora.arrow"
    LoRAFormat.save(card, file)
    here.admit(card, origin=PEER)
    assert here.apply_tombstone(removed(there, "poet"), origin=PEER)
    for registry in (here, there):
        assert registry.refused([(card.digest, there.identity.id)]) == {card.digest}
        for attempt in (
            lambda registry=registry: registry.admit(card, origin=PEER),
            lambda registry=registry: registry.import_file(file),
            lambda registry=registry: registry.publish(card),
        ):
            with pytest.raises(RemovedCardError, match="removed by its publisher") as caught:
                attempt()
            assert "publish the adapter anew" in str(caught.value.hint)
        assert (registry.digests(), files(registry)) == (set(), [])
        assert registry.verify() == []


def test_a_tombstone_that_comes_first_keeps_its_card_out_and_outlives_restarts(
    here: Registry, there: Registry, open_home: Open
) -> None:
    card = there.get(there.publish(small_card("poet")).digest)
    tombstone = removed(there, "poet")
    assert here.apply_tombstone(tombstone, origin=PEER)
    assert not here.apply_tombstone(tombstone, origin=PEER)
    here.close()
    again = open_home("here")
    with pytest.raises(RemovedCardError):
        again.admit(card, origin=PEER)
    assert again.changes().tombstones == (tombstone,), "and is passed on, though the card never was here"


def test_a_removed_adapter_can_be_published_anew(here: Registry) -> None:
    first = here.publish(small_card("poet"))
    here.remove("poet")
    second = here.publish(small_card("poet"))
    assert (second.labels, second.epoch, first.epoch) == (("poet@1",), 2, 1)
    assert second.digest != first.digest


def _forgeries(card: CardEntry, owner: Identity, stranger: Identity) -> dict[str, Tombstone]:
    good = Tombstone.of(card, owner, now=NOON)
    fields = json.loads(good.body)
    as_manifest = Tombstone.parse(good.body, owner.sign(good.body))
    in_another_s_name = Tombstone.parse(good.body, stranger.sign(DOMAIN + good.body))
    changed = manifest_bytes(fields | {"version": "2"})
    another_epoch = manifest_bytes(fields | {"epoch": 9})
    return {
        "without the domain": as_manifest,
        "signed by another": in_another_s_name,
        "changed after signing": Tombstone.parse(changed, good.signature),
        "another's card": Tombstone.of(card, stranger, now=NOON),
        "not what the card says": Tombstone.parse(another_epoch, owner.sign(DOMAIN + another_epoch)),
        "a false value": replace(good, signature=replace(good.signature, value=bytes(64))),
    }


_FORGERIES = (
    "without the domain",
    "signed by another",
    "changed after signing",
    "another's card",
    "not what the card says",
    "a false value",
)


@pytest.mark.parametrize("how", _FORGERIES)
def test_a_forged_tombstone_removes_nothing(how: str, here: Registry) -> None:
    owner, stranger = Identity.generate(), Identity.generate()
    entry = here.admit(small_card("poet", epoch=3).signed(owner), origin=PEER)
    before = here.changes()
    with pytest.raises(CardIntegrityError, match="so the card stays"):
        here.apply_tombstone(_forgeries(entry, owner, stranger)[how], origin=PEER)
    assert (here.digests(), here.changes()) == ({entry.digest}, before)
    assert here.verify()[0].ok


def test_a_stranger_s_tombstone_keeps_nobody_else_s_card_out(here: Registry, there: Registry) -> None:
    entry = there.publish(small_card("poet"))
    card = there.get(entry.digest)
    stranger = Identity.generate()
    here.apply_tombstone(Tombstone.of(entry, stranger, now=NOON), origin=PEER)
    assert here.refused([(card.digest, there.identity.id)]) == set()
    here.admit(card, origin=PEER)
    assert here.apply_tombstone(removed(there, "poet"), origin=PEER)
    assert here.digests() == set()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"\xff",
        b"[" * 1500,
        b'{"digest": 1}',
        b" " * (MAX_TOMBSTONE_BYTES + 1),
    ],
)
def test_what_is_no_tombstone_is_refused(body: bytes) -> None:
    with pytest.raises(CardFormatError):
        Tombstone.parse(body, Identity.generate().sign(body))


def test_a_tombstone_has_one_form(here: Registry) -> None:
    tombstone = Tombstone.of(here.publish(small_card()), here.identity, now=NOON)
    fields = json.loads(tombstone.body)
    for body in (json.dumps(fields).encode(), tombstone.body + b"\n", tombstone.body[:-1] + b',"epoch":1}'):
        with pytest.raises(CardFormatError):
            Tombstone.parse(body, tombstone.signature)
    for wrong in ({"epoch": -1}, {"digest": "blake3:00"}, {"name": "../x"}, {"publisher": "me"}):
        with pytest.raises(CardFormatError):
            Tombstone.parse(manifest_bytes(fields | wrong), tombstone.signature)
    later = manifest_bytes(fields | {"why": "a field of a later version"})
    Tombstone.parse(later, here.identity.sign(DOMAIN + later)).verify()


# Hidden cards -------------------------------------------------------------------------------------------------------


def test_another_s_card_is_hidden_here_until_it_may_come_back(here: Registry) -> None:
    card = small_card("poet").signed(Identity.generate())
    here.admit(card, origin=PEER)
    here.remove("poet")
    assert [(one.digest, one.name, one.version) for one in here.hidden()] == [(card.digest, "poet", "1")]
    assert here.refused([(card.digest, card.manifest.publisher)]) == {card.digest}
    [change] = here.changes().entries
    assert (change.kind, change.tombstone) == (Kind.GONE, None)
    with pytest.raises(RemovedCardError) as caught:
        here.admit(card, origin=PEER)
    assert "skills unhide" in str(caught.value.hint)
    assert files(here) == []
    assert here.unhide(card.digest[:20]).digest == card.digest
    assert (here.hidden(), here.admit(card, origin=PEER).digest) == ([], card.digest)


def test_importing_by_hand_brings_a_hidden_card_back(here: Registry, tmp_path: Path) -> None:
    card = small_card("poet").signed(Identity.generate())
    LoRAFormat.save(card, tmp_path / "poet.lora.arrow")
    here.admit(card, origin=PEER)
    here.remove("poet")
    here.import_file(tmp_path / "poet.lora.arrow")
    assert (here.hidden(), here.digests()) == ([], {card.digest})
    assert [change.kind for change in here.changes().entries] == [Kind.ADDED]


def test_a_reference_to_a_hidden_card_must_mean_one(here: Registry) -> None:
    for seed in range(2):
        here.admit(small_card("poet", seed=seed).signed(Identity.generate()), origin=PEER)
        here.remove("poet")
    with pytest.raises(AmbiguousCardError):
        here.unhide("poet@1")
    with pytest.raises(UnknownCardError) as caught:
        here.unhide("nobody")
    assert "poet@1" in str(caught.value.hint)


def test_a_hidden_card_that_its_publisher_removes_is_hidden_no_more_and_gone_for_good(
    here: Registry, there: Registry
) -> None:
    card = there.get(there.publish(small_card("poet")).digest)
    here.admit(card, origin=PEER)
    here.remove("poet")
    here.apply_tombstone(removed(there, "poet"), origin=PEER)
    assert here.hidden() == []
    assert [change.kind for change in here.changes().entries] == [Kind.REMOVED]


# Epochs -------------------------------------------------------------------------------------------------------------


def test_epochs_count_what_a_publisher_published_under_a_name(here: Registry) -> None:
    assert [here.publish(small_card("poet", version=v)).epoch for v in ("1", "2")] == [1, 2]
    assert here.publish(small_card("other")).epoch == 1
    here.remove("poet@2")
    assert here.publish(small_card("poet", version="3")).epoch == 3
    assert here.publish(small_card("poet", version="3", created="2026-02-02T00:00:00+00:00")).epoch == 3
    assert here.get("poet").manifest.epoch == 3


def test_no_two_cards_of_a_name_get_one_epoch_however_many_publish_at_once(open_home: Open) -> None:
    registries = [open_home("here") for _ in range(4)]
    versions = [[f"{number}.{part}" for part in range(5)] for number in range(4)]

    def publish(registry: Registry, own: list[str]) -> list[int]:
        return [registry.publish(small_card("poet", version=version)).epoch for version in own]

    with ThreadPoolExecutor(4) as pool:
        epochs = [epoch for own in pool.map(publish, registries, versions) for epoch in own]
    assert sorted(epochs) == list(range(1, 21))
    assert all(report.ok for report in registries[0].verify())
    assert [path.suffix for path in files(registries[0])] == [".arrow"] * 20


def test_a_card_of_before_has_epoch_zero_and_an_odd_one_is_refused() -> None:
    assert small_card().manifest.epoch == 0
    for epoch in (-1, 1 << 53, "1", 1.0):
        with pytest.raises(ManifestError):
            small_card(epoch=epoch)


def test_a_replayed_older_card_never_gets_the_label_back(here: Registry, there: Registry) -> None:
    """Its publisher's clock went back, and the tombstone of the older card is withheld."""
    old = there.get(there.publish(small_card("poet", seed=1, created="2026-06-06T00:00:00+00:00")).digest)
    removed(there, "poet")
    new = there.get(there.publish(small_card("poet", seed=2, created="2026-01-01T00:00:00+00:00")).digest)
    here.admit(new, origin=PEER)
    replayed = here.admit(old, origin=PEER)
    assert (replayed.labels, replayed.superseded) == ((), True)
    assert here.get("poet") == here.get("poet@1") == new
    assert here.get(old.digest) == old
    assert [entry.digest for entry in here.newest()] == [new.digest]
    assert [entry.digest for entry in here.list()] == [new.digest, old.digest]


def test_the_order_of_arrival_does_not_matter(open_home: Open, there: Registry) -> None:
    cards: list[LoRACard] = []
    for seed in range(3):
        cards.append(there.get(there.publish(small_card("poet", seed=seed)).digest))
        tombstone = removed(there, "poet")
    steps: list[LoRACard | Tombstone] = [*cards[:2], tombstone]
    found = set()
    for number, order in enumerate(permutations(steps)):
        registry = open_home(f"node-{number}")
        for step in order:
            if isinstance(step, Tombstone):
                registry.apply_tombstone(step, origin=PEER)
            else:
                registry.admit(step, origin=PEER)
        found.add(tuple((entry.digest, entry.labels, entry.superseded) for entry in registry.list()))
        with pytest.raises(UnknownCardError):
            registry.get("poet")
        assert registry.newest() == []
    assert len(found) == 1, "the latest was removed, and neither of the older ones steps in"


def test_an_older_version_is_an_older_version(here: Registry, there: Registry) -> None:
    cards = [there.get(there.publish(small_card("poet", version=version)).digest) for version in "12"]
    for card in reversed(cards):
        here.admit(card, origin=PEER)
    assert [here.get(ref) for ref in ("poet@1", "poet@2", "poet")] == [cards[0], cards[1], cards[1]]
    assert not any(entry.superseded for entry in here.list())


def test_epochs_of_one_publisher_say_nothing_of_another_s(here: Registry) -> None:
    small, large = Identity.generate(), Identity.generate()
    ours = small_card("poet", epoch=1, created="2026-02-02T00:00:00+00:00").signed(small)
    theirs = small_card("poet", epoch=99, created="2026-01-01T00:00:00+00:00").signed(large)
    for card in (ours, theirs):
        assert here.admit(card, origin=PEER).labels == ("poet@1",)
    assert here.get("poet") == ours
    unsigned = small_card("poet", epoch=500, description="anybody's")
    assert here.publish(unsigned.describe(version="2")).epoch == 1


def test_a_card_signed_before_its_successor_cannot_be_published_under_the_label(here: Registry) -> None:
    author = Identity.generate()
    here.publish(small_card("poet", epoch=2).signed(author))
    here.remove("poet")
    with pytest.raises(LabelTakenError, match="anew"):
        here.publish(small_card("poet", epoch=1).signed(author))
    assert files(here) == []


def test_a_lost_file_is_healed_by_publishing_the_same_card(here: Registry) -> None:
    here.publish(small_card("poet"))
    here.remove("poet")
    entry = here.publish(small_card("poet"))
    here.path_of(entry.digest).unlink()
    assert here.publish(small_card("poet")) == entry
    assert here.verify()[0].ok
