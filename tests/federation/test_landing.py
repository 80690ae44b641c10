from __future__ import annotations

from dataclasses import dataclass

import pytest

from federation import limits
from federation.board import Job, Task
from federation.landing import Landed, Landing
from registry.arrivals import Arrival
from registry.card import LoRACard
from tests.federation.sources import holder_of, holding, wanted
from tests.registry.cards import module_shapes, small_card


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def landed(card: LoRACard) -> Landed:
    holder = holder_of(holding(card))
    task = Task(job=Job(wanted=wanted(card, holder), holders=[holder]), holder=holder)
    return Landed(task=task, arrival=Arrival(card=card, origin=holder.origin))


def test_small_cards_wait_for_one_another_and_not_long(clock: Clock) -> None:
    landing = Landing(now=clock)
    first, second = landed(small_card(seed=1)), landed(small_card(seed=2))
    landing.add(first)
    clock.now = limits.KEEP_TOGETHER_S * 0.9
    landing.add(second)
    assert landing.due() == []
    clock.now = limits.KEEP_TOGETHER_S * 1.01
    assert landing.due() == [first, second]
    assert landing.all() == []


def test_many_do_not_wait(clock: Clock) -> None:
    landing, one = Landing(now=clock), landed(small_card())
    for _ in range(limits.KEEP_TOGETHER_CARDS - 1):
        landing.add(one)
    assert landing.due() == []
    landing.add(one)
    assert len(landing.due()) == limits.KEEP_TOGETHER_CARDS


def test_a_large_one_does_not_wait(clock: Clock) -> None:
    landing = Landing(now=clock)
    small, large = landed(small_card()), landed(small_card(modules=module_shapes(1, 1 << 18, 1 << 18)))
    landing.add(small)
    landing.add(large)
    assert landing.due() == [small, large]


def test_whoever_has_nothing_else_to_do_takes_all(clock: Clock) -> None:
    landing, one = Landing(now=clock), landed(small_card())
    landing.add(one)
    assert landing.all() == [one]
    assert landing.due() == []
