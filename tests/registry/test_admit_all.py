"""Many cards that come in together: as if each had come alone, and none falls with another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest

from registry.arrivals import Arrival
from registry.blobs import FileBlobStore
from registry.card import LoRACard
from registry.catalog import Catalog
from registry.entries import CardEntry
from registry.errors import CardIntegrityError, NoSpaceError, RegistryError, RemovedCardError
from registry.identity import Identity
from registry.store import Origin, Registry
from tests.registry.cards import small_card

PEER = Origin(peer_id="0" * 32, address="192.0.2.1:8815")
AUTHOR = Identity.generate()

Open = Callable[[str], Registry]


@pytest.fixture
def open_home(tmp_path: Path) -> Iterator[Open]:
    with ExitStack() as stack:
        yield lambda name: stack.enter_context(Registry.open(tmp_path / name))


@pytest.fixture
def here(tmp_path: Path, new_catalog_url: str) -> Iterator[Registry]:
    with Registry.open(tmp_path / "here", catalog_url=new_catalog_url) as registry:
        yield registry


def signed(name: str = "sample", *, seed: int = 0, epoch: int = 1) -> LoRACard:
    return small_card(name, seed=seed).describe(epoch=epoch).signed(AUTHOR)


def arrivals(registry: Registry, *cards: LoRACard) -> list[Arrival]:
    """The cards, each in a draft of its own."""
    return [Arrival(card=card, origin=PEER, draft=drafted(registry, card)) for card in cards]


def drafted(registry: Registry, card: LoRACard) -> Path:
    with registry.drafts.open(replace(card, tensors=())) as draft:
        data = memoryview(b"".join(tensor.data for tensor in card.tensors))
        for start, end in draft.gaps():  # of one that came before nothing is missing
            draft.write(start, data[start:end])
        draft.finish()
        return draft.path


def told(registry: Registry) -> list[tuple[object, ...]]:
    """All that an entry says but when it came."""
    return [
        (entry.digest, entry.labels, entry.origin, entry.superseded, entry.epoch, entry.quarantined)
        for entry in registry.list(quarantined=True)
    ]


def test_cards_that_come_together_are_there_as_if_each_had_come_alone(here: Registry, open_home: Open) -> None:
    cards = [small_card(f"card-{seed}", seed=seed) for seed in range(3)] + [signed("mine", seed=9)]
    alone = open_home("alone")
    for arrival in arrivals(alone, *cards):
        alone.admit(arrival.card, origin=PEER, draft=arrival.draft)
    kept = here.admit_all(arrivals(here, *cards))
    assert [entry.digest for entry in kept if isinstance(entry, CardEntry)] == [card.digest for card in cards]
    assert told(here) == told(alone)
    assert [change.sequence for change in here.changes().entries] == [1, 2, 3, 4]
    assert all(report.ok for report in here.verify())
    assert [*(here.home / "tmp").iterdir()] == []


@pytest.mark.parametrize("order", [*permutations(range(3))])
def test_of_editions_that_come_together_the_latest_has_the_label(here: Registry, order: tuple[int, ...]) -> None:
    editions = [signed(seed=epoch, epoch=epoch) for epoch in (1, 2, 3)]
    first, *_ = here.admit_all(arrivals(here, signed(seed=7, epoch=2)))
    assert isinstance(first, CardEntry)
    assert first.labels == ("sample@1",)
    here.admit_all(arrivals(here, *(editions[index] for index in order)))
    assert here.get("sample@1") == editions[2]
    assert [entry.digest for entry in here.list() if entry.labels] == [editions[2].digest]


def test_one_that_may_not_come_stops_no_other(here: Registry) -> None:
    mine = here.publish(small_card("mine", seed=1))
    buried = here.get(mine.digest)
    buried = replace(buried, tensors=tuple(replace(t, data=memoryview(bytes(t.data))) for t in buried.tensors))
    here.remove(mine.digest)
    hidden = signed("hidden", seed=2)
    here.admit_all(arrivals(here, hidden))
    here.remove(hidden.digest)
    false = replace(signed("false", seed=3), signature=signed("other").signature)
    good = [signed(f"good-{seed}", seed=seed) for seed in (4, 5)]
    kept = here.admit_all(arrivals(here, good[0], buried, hidden, false, good[1]))
    kinds = [type(one) for one in kept]
    assert kinds == [CardEntry, RemovedCardError, RemovedCardError, CardIntegrityError, CardEntry]
    assert here.digests() == {card.digest for card in good}
    assert all(report.ok for report in here.verify())  # nor is there a file of one that was refused


def test_a_file_that_cannot_be_written_stops_no_other(here: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = signed("good", seed=1), signed("bad", seed=2)
    adopt = FileBlobStore.adopt

    def full(store: FileBlobStore, card: LoRACard, file: Path) -> None:
        if card.digest == bad.digest:
            raise OSError(28, "No space left on device")
        adopt(store, card, file)

    monkeypatch.setattr(FileBlobStore, "adopt", full)
    kept = here.admit_all(arrivals(here, bad, good))
    assert [type(one) for one in kept] == [NoSpaceError, CardEntry]
    assert here.digests() == {good.digest}


def test_rows_that_cannot_be_written_leave_no_card(here: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RegistryError("the catalog failed")

    cards = [signed(f"card-{seed}", seed=seed) for seed in range(3)]
    with monkeypatch.context() as patch:
        patch.setattr(Catalog, "add_all", broken)
        assert [type(one) for one in here.admit_all(arrivals(here, *cards))] == [RegistryError] * 3
    here.recover()
    assert here.verify() == []
    assert all(isinstance(one, CardEntry) for one in here.admit_all(arrivals(here, *cards)))
    assert all(report.ok for report in here.verify())


def test_one_that_is_here_is_told_again(here: Registry) -> None:
    card, other = signed("one", seed=1), signed("two", seed=2)
    [first] = here.admit_all(arrivals(here, card))
    again, _ = here.admit_all([Arrival(card=card, origin=PEER), *arrivals(here, other)])
    assert again == first
    assert len(here.changes().entries) == 2


def test_quarantine_holds_for_each_alone(here: Registry) -> None:
    suspect, good = arrivals(here, signed("suspect", seed=1), signed("good", seed=2))
    held, free = here.admit_all([replace(suspect, quarantine_for="unknown publisher"), good])
    assert isinstance(held, CardEntry)
    assert isinstance(free, CardEntry)
    assert (held.quarantined, free.quarantined) == ("unknown publisher", None)
    assert here.digests() == {free.digest}
    assert [change.digest for change in here.changes().entries] == [free.digest]
    here.release(held.digest)
    assert here.get("suspect").digest == held.digest
