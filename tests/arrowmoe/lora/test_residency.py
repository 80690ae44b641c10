"""Adapters on a device that has no room for all: the answers stay the same, the bytes stay within the budget."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

from arrowmoe.errors import AdapterMemoryError, UnknownAdapterError
from arrowmoe.lora.manager import LoRAManager
from arrowmoe.lora.slots import Slot
from arrowmoe.routing.gates import Gates
from registry.card import LoRACard
from registry.tensor import Role
from tests.arrowmoe.benches import no_collector
from tests.peft_models import load_peft, make_peft, outputs, tiny_bert, tiny_llama

COUNT = 4
NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root, model = tmp_path_factory.mktemp("adapters"), tiny_llama()
    return [make_peft(model, root / f"a{seed}", seed=seed) for seed in range(COUNT)]


@pytest.fixture(scope="module")
def cards(paths: list[Path]) -> list[LoRACard]:
    return [LoRACard.from_peft(path) for path in paths]


@pytest.fixture(scope="module")
def expected(paths: list[Path]) -> list[torch.Tensor]:
    """What PEFT computes with each adapter."""
    return [outputs(load_peft(tiny_llama(), path)) for path in paths]


def weight_bytes(card: LoRACard) -> int:
    """Bytes of A and B, as the manifest has them."""
    return sum(tensor.nbytes for tensor in card.manifest.tensors if tensor.role in (Role.A, Role.B))


def only(card: LoRACard) -> Gates:
    return Gates.of([{card.digest: 1.0}] * 3, {card.digest: card.name})


def each(cards: Sequence[LoRACard]) -> Gates:
    return Gates.of([{card.digest: 1.0} for card in cards], {card.digest: card.name for card in cards})


def tiers(manager: LoRAManager) -> list[str]:
    return [one.tier for one in manager.residences()]


def holding(cards: Sequence[LoRACard], adapters: int) -> tuple[torch.nn.Module, LoRAManager]:
    """A model with a budget for so many adapters, which knows all of `cards`."""
    model = tiny_llama()
    manager = LoRAManager(model, budget_bytes=adapters * weight_bytes(cards[0]), now=lambda: NOON)
    for card in cards:
        manager.apply_card(card)
    return model, manager


def test_every_adapter_answers_as_peft_does_whoever_had_to_leave(
    cards: list[LoRACard], expected: list[torch.Tensor]
) -> None:
    model, manager = holding(cards, adapters=2)
    assert tiers(manager) == ["file", "file", "device", "device"]
    for turn in (0, 1, 2, 3, 1, 0, 3, 2, 0):
        with manager.gated(only(cards[turn])):
            torch.testing.assert_close(outputs(model), expected[turn], rtol=1e-4, atol=1e-5)
        assert manager.memory().slots == 2 * weight_bytes(cards[0])


def test_the_adapter_that_was_used_the_longest_ago_leaves(cards: list[LoRACard]) -> None:
    _, manager = holding(cards[:3], adapters=2)
    for index in (0, 1, 0, 2):
        with manager.gated(only(cards[index])):
            pass
    assert tiers(manager) == ["device", "file", "device"]


def test_pinned_adapters_and_those_of_higher_priority_stay(cards: list[LoRACard]) -> None:
    _, manager = holding(cards, adapters=3)
    manager.keep(cards[0].digest, pinned=True)
    manager.keep(cards[1].digest, priority=1)
    for index in (2, 3, 2, 3):
        with manager.gated(only(cards[index])):
            pass
    assert tiers(manager) == ["device", "device", "file", "device"]
    manager.keep(cards[0].digest, pinned=False)
    for index in (2, 3):
        with manager.gated(only(cards[index])):
            pass
    assert tiers(manager) == ["file", "device", "device", "device"]


def test_what_a_plan_uses_stays_while_the_plan_lives_and_not_longer(
    cards: list[LoRACard], expected: list[torch.Tensor]
) -> None:
    model, manager = holding(cards, adapters=2)
    with no_collector():
        plan = manager.plan(only(cards[0]))
        for index in (1, 2, 3):
            with manager.gated(only(cards[index])):
                outputs(model)
        assert tiers(manager)[0] == "device"
        assert manager.residences()[0].in_flight == 1
        with pytest.raises(AdapterMemoryError, match="in flight") as refused:
            manager.plan(each(cards[1:3]))
        assert refused.value.later
        with manager.running(plan):
            torch.testing.assert_close(outputs(model), expected[0], rtol=1e-4, atol=1e-5)
        del plan
        assert manager.residences()[0].in_flight == 0
        assert manager.plan(each(cards[1:3])) is not None


def test_an_adapter_that_leaves_frees_its_memory_at_once(cards: list[LoRACard]) -> None:
    model, manager = holding(cards, adapters=2)
    with no_collector():
        with manager.gated(each(cards[2:])):
            outputs(model, {"input_ids": torch.tensor([[5, 6], [7, 8]])})
        held = [weakref.ref(slot.low_rank.a) for slot in manager.slots(cards[3].digest).values() if slot.low_rank]
        assert all(tensor() is not None for tensor in held)
        for index in (0, 1):
            with manager.gated(only(cards[index])):
                outputs(model)
        assert [tensor() for tensor in held] == [None] * len(held)


def test_a_batch_that_never_fits_is_refused_before_anyone_leaves(cards: list[LoRACard]) -> None:
    _, manager = holding(cards, adapters=2)
    before, one = tiers(manager), weight_bytes(cards[0])
    with pytest.raises(AdapterMemoryError, match=f"room for {3 * one} bytes .* got {2 * one}: of") as refused:
        manager.plan(each(cards[:3]))
    assert not refused.value.later
    assert tiers(manager) == before


def test_bytes_are_those_of_the_tensors_and_of_the_layouts(cards: list[LoRACard]) -> None:
    model, manager = holding(cards, adapters=3)
    assert manager.memory().slots == 3 * weight_bytes(cards[0])
    assert manager.memory().layouts == 0
    with no_collector():
        plan = manager.plan(each(cards[1:]))
        with manager.running(plan):
            outputs(model, {"input_ids": torch.randint(3, 60, (3, 1))})
        # Three rows of one adapter each, by row or one after another: each adapter is copied once.
        assert manager.memory().layouts == 3 * weight_bytes(cards[0])
        del plan
        assert manager.memory().layouts == 0


def test_uses_and_the_last_use_are_told(cards: list[LoRACard]) -> None:
    _, manager = holding(cards[:2], adapters=2)
    for _ in range(3):
        with manager.gated(only(cards[0])):
            pass
    first, second = manager.residences()
    assert (first.uses, first.used_at, second.uses, second.used_at) == (3, NOON, 0, None)


def test_an_adapter_removed_in_flight_finishes_and_takes_its_wrappers_along(
    cards: list[LoRACard], expected: list[torch.Tensor]
) -> None:
    model = tiny_llama()
    modules = dict(model.named_modules())
    manager = LoRAManager(model)
    manager.apply_card(cards[0])
    plan = manager.plan(only(cards[0]))
    assert manager.remove_card(cards[0].digest)
    assert (cards[0].digest in manager, manager.loaded()) == (False, [])
    assert [one.leaving for one in manager.residences()] == [True]
    with manager.running(plan):
        torch.testing.assert_close(outputs(model), expected[0], rtol=1e-4, atol=1e-5)
    del plan
    assert manager.residences() == []
    assert dict(model.named_modules()) == modules
    with pytest.raises(UnknownAdapterError):
        manager.plan(only(cards[0]))


def test_an_adapter_that_comes_back_while_it_leaves_stays(cards: list[LoRACard], expected: list[torch.Tensor]) -> None:
    model = tiny_llama()
    manager = LoRAManager(model)
    manager.apply_card(cards[0])
    plan = manager.plan(only(cards[0]))
    manager.remove_card(cards[0].digest)
    manager.apply_card(cards[0])
    del plan
    assert [one.leaving for one in manager.residences()] == [False]
    with manager.gated(only(cards[0])):
        torch.testing.assert_close(outputs(model), expected[0], rtol=1e-4, atol=1e-5)


def test_removing_all_gives_the_base_back_whether_they_were_on_the_device_or_not(cards: list[LoRACard]) -> None:
    model, manager = holding(cards, adapters=2)
    for card in cards:
        assert manager.remove_card(card.digest)
    assert dict(model.named_modules()).keys() == dict(tiny_llama().named_modules()).keys()
    assert torch.equal(outputs(model), outputs(tiny_llama()))


def test_slots_that_were_trained_never_leave(cards: list[LoRACard]) -> None:
    _, manager = holding(cards, adapters=2)
    trained: dict[str, Slot] = manager.slots(cards[0].digest)
    manager.replace_slots(cards[0].digest, trained)
    for index in (1, 2, 3):
        with manager.gated(only(cards[index])):
            pass
    assert manager.slots(cards[0].digest) == trained


def test_a_card_whose_file_is_gone_is_an_error_and_the_others_are_served(
    cards: list[LoRACard], expected: list[torch.Tensor]
) -> None:
    store: dict[str, LoRACard] = {card.digest: card for card in cards}
    model = tiny_llama()
    manager = LoRAManager(model, budget_bytes=weight_bytes(cards[0]), find=store.__getitem__)
    for card in cards[:2]:
        manager.apply_card(card)
    del store[cards[0].digest]
    with pytest.raises(KeyError):
        manager.plan(only(cards[0]))
    with manager.gated(only(cards[1])):
        torch.testing.assert_close(outputs(model), expected[1], rtol=1e-4, atol=1e-5)


def test_dora_and_biases_come_back_as_they_were(tmp_path: Path) -> None:
    paths = [make_peft(tiny_bert(), tmp_path / f"d{seed}", seed=seed, use_dora=True) for seed in range(2)]
    paths.append(make_peft(tiny_bert(), tmp_path / "bias", seed=2, bias="lora_only"))
    cards = [LoRACard.from_peft(path) for path in paths]
    model = tiny_bert()
    sizes = [LoRAManager(tiny_bert()).apply_card(card).nbytes for card in cards]
    manager = LoRAManager(model, budget_bytes=max(sizes))
    for card in cards:
        manager.apply_card(card)
    for _ in range(2):
        for path, card in zip(paths, cards, strict=True):
            with manager.gated(only(card)):
                torch.testing.assert_close(outputs(model), outputs(load_peft(tiny_bert(), path)), rtol=1e-4, atol=1e-5)
            assert manager.memory().slots <= max(sizes)
