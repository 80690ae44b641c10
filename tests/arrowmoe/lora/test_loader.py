"""Adapters that are loaded while others are answered: nobody waits for a card of somebody else's."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from arrowmoe.batching import Batching, BatchLimits
from arrowmoe.errors import UnknownAdapterError
from arrowmoe.lora.loader import Loader, Loads
from arrowmoe.lora.manager import LoRAManager
from registry.card import LoRACard
from registry.errors import CardIntegrityError
from tests.arrowmoe.benches import Bench, bench, finished

PATIENCE_S = 60.0


class Shelf:
    """Where cards come from: `held` has it wait, `broken` cards cannot be read."""

    def __init__(self, cards: list[LoRACard]) -> None:
        self.cards = {card.digest: card for card in cards}
        self.free = threading.Event()
        self.free.set()
        self.broken: set[str] = set()
        self.found: list[str] = []

    def find(self, digest: str) -> LoRACard:
        self.found.append(digest)
        assert self.free.wait(PATIENCE_S)
        if digest in self.broken:
            raise CardIntegrityError(f"card {digest} is damaged")
        return self.cards[digest]


def shelved(path: Path, *, room: int = 1, room_bytes: int = 1 << 20) -> tuple[Bench, Shelf, Loader]:
    """A bench whose adapters are on a shelf, with room for so many of them on the device."""
    found = bench(path=path)
    loaded = found.manager.loaded()
    for one in loaded:
        found.manager.remove_card(one.digest)
    shelf = Shelf(found.cards)
    size = room * max(one.nbytes for one in loaded)
    found.manager = LoRAManager(found.tiny.model, budget_bytes=size, find=shelf.find)
    for card in found.cards:
        found.manager.apply_card(card)
    loader = Loader(found.manager, room_bytes=room_bytes)
    found.batching = engine_like(found, loader)
    return found, shelf, loader


def engine_like(found: Bench, loader: Loader) -> Batching:
    """A scheduler that brings adapters as the engine does."""
    manager = found.manager
    return Batching(
        found.tiny,
        plan=lambda gates, after=None: manager.plan(gates, loader.bring(gates.adapters), after=after),
        running=manager.running,
        loader=loader,
        limits=BatchLimits(prompt_tokens=4),
        now=lambda: found.now_s,
    )


def settled(loader: Loader, digests: list[str]) -> None:
    """Wait until none of them is loading."""
    deadline = time.monotonic() + PATIENCE_S
    while loader.is_loading(digests):
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture
def at_work(tmp_path: Path, no_leaked_threads: None) -> Iterator[tuple[Bench, Shelf, Loader]]:
    found, shelf, loader = shelved(tmp_path)
    yield found, shelf, loader
    shelf.free.set()


def test_what_was_loaded_ahead_is_not_loaded_again(at_work: tuple[Bench, Shelf, Loader]) -> None:
    found, shelf, loader = at_work
    digests = [card.digest for card in found.cards]
    loader.ask(digests)
    settled(loader, digests)
    assert sorted(shelf.found) == sorted(found.manager.missing(digests)) != []
    assert [one.entry.digest for one in loader.bring(digests[:1])] == digests[:1]
    assert len(shelf.found) == len(set(shelf.found))
    assert loader.loads() == Loads(ahead=2, stalls=0, stalled_s=0.0)


def test_others_are_answered_while_a_card_is_loaded(at_work: tuple[Bench, Shelf, Loader]) -> None:
    found, shelf, loader = at_work
    shelf.free.clear()
    expected = [found.alone("w30", None, 60), found.alone("w8 w9", 0, 6)]
    found.passes.clear()
    waiting = found.cards[0].digest
    during: list[bool] = []

    def watch(*_: object) -> None:
        during.append(loader.is_loading([waiting]))
        if len(during) == 10:
            shelf.free.set()
            settled(loader, [waiting])

    first = found.stream("w30", max_new_tokens=60)
    next(first)
    hook = found.tiny.model.register_forward_hook(watch)
    late = finished(found.stream("w8 w9", 0))
    hook.remove()
    assert during[:10] == [True] * 10
    assert list(late.tokens) == expected[1]
    assert list(finished(first).tokens) == expected[0]
    assert (loader.loads().ahead, loader.loads().stalls) == (1, 0)


def test_on_an_idle_engine_a_card_is_waited_for(at_work: tuple[Bench, Shelf, Loader]) -> None:
    found, shelf, _ = at_work
    expected = found.alone("w8 w9", 0, 6)
    assert list(finished(found.stream("w8 w9", 0)).tokens) == expected
    assert shelf.found == [found.cards[0].digest]
    assert found.manager.missing([found.cards[0].digest]) == []


def test_a_card_that_cannot_be_read_is_its_own_requests_error(at_work: tuple[Bench, Shelf, Loader]) -> None:
    found, shelf, _ = at_work
    expected = [found.alone("w30", None, 20), found.alone("w8 w9", 0, 6)]
    shelf.broken.add(found.cards[0].digest)
    first = found.stream("w30", max_new_tokens=20)
    next(first)
    with pytest.raises(CardIntegrityError, match="damaged"):
        finished(found.stream("w8 w9", 0))
    shelf.broken.clear()
    assert list(finished(found.stream("w8 w9", 0)).tokens) == expected[1]
    assert list(finished(first).tokens) == expected[0]


def test_an_adapter_that_is_removed_while_it_is_loaded_is_unknown(at_work: tuple[Bench, Shelf, Loader]) -> None:
    found, shelf, _ = at_work
    shelf.free.clear()
    first = found.stream("w30", max_new_tokens=60)
    next(first)
    removed = found.cards[0].digest

    def remove(*_: object) -> None:
        if removed in found.manager:
            found.manager.remove_card(removed)
            shelf.free.set()

    hook = found.tiny.model.register_forward_hook(remove)
    with pytest.raises(UnknownAdapterError):
        finished(found.stream("w8 w9", 0))
    hook.remove()
    assert finished(first).text


def test_a_request_that_is_given_up_leaves_nothing_prepared(at_work: tuple[Bench, Shelf, Loader]) -> None:
    found, shelf, loader = at_work
    digests = [found.cards[0].digest]
    loader.ask(digests)
    settled(loader, digests)
    loader.ask([])
    loader.bring(digests)
    assert (shelf.found, loader.loads().stalls) == (digests * 2, 1)


def test_no_more_is_prepared_than_there_is_room_for(tmp_path: Path, no_leaked_threads: None) -> None:
    found, shelf, loader = shelved(tmp_path, room_bytes=1)
    digests = found.manager.missing([card.digest for card in found.cards])
    loader.ask(digests)
    settled(loader, digests[:1])
    loader.ask(digests)
    assert shelf.found == digests[:1]
    assert loader.is_loading(digests[1:])
    loader.ask(digests[1:])
    settled(loader, digests[1:])
    assert shelf.found == digests


def test_threads_with_room_for_one_adapter_all_get_their_own_answers(tmp_path: Path, no_leaked_threads: None) -> None:
    found, _, loader = shelved(tmp_path)
    expected = [found.alone("w8 w9", adapter, 8) for adapter in range(3)]
    wrong: list[object] = []

    def work(seed: int) -> None:
        for turn in range(4):
            adapter = (seed + turn) % 3
            tokens = list(finished(found.stream("w8 w9", adapter, max_new_tokens=8)).tokens)
            wrong.extend([] if tokens == expected[adapter] else [tokens])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []
    assert loader.loads().ahead > 0
