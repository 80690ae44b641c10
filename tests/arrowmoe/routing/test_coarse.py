"""The shortlist among many cards: it holds the card that an exact look at all of them finds."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from arrowmoe.routing.closed_form import SHORTLIST, ClosedForm, RowScores
from arrowmoe.routing.coarse import CoarseIndex
from arrowmoe.routing.densities import Array
from arrowmoe.routing.statistics import CardStatistics
from tests.arrowmoe.routing.synthetic import card_of, unit

DIMENSION, CARDS, PROMPTS = 48, 300, 1000


@pytest.fixture(scope="module")
def cards() -> dict[str, CardStatistics]:
    """Cards of 1 to 12 intents: some have more prototypes than the index keeps points."""
    random = np.random.default_rng(0)
    return {
        f"card-{index}": card_of(random, DIMENSION, intents=int(random.integers(1, 13)), each=6)
        for index in range(CARDS)
    }


def filled(cards: dict[str, CardStatistics]) -> ClosedForm:
    form = ClosedForm(DIMENSION)
    for key, card in cards.items():
        form.add(key, card)
    return form


def drawn(cards: dict[str, CardStatistics], number: int, seed: int = 0) -> Array:
    """Prompts around prototypes of random cards; one in a hundred is nearer to another card's."""
    random = np.random.default_rng(seed)
    chosen = random.choice(list(cards), number)
    rows = unit(np.stack([random.choice(cards[str(key)].prototypes) for key in chosen]))
    return unit(rows + 0.09 * random.standard_normal(rows.shape)).astype(np.float64)


def best(found: list[RowScores]) -> list[str]:
    return [row.keys[row.values.argmax()] for row in found]


def agreement(form: ClosedForm, x: Array, keys: list[str], mask: list[str] | None = None) -> float:
    """Share of rows whose best card of the shortlist is the best of all `keys`."""
    short = form.score(x, mask)
    assert all(len(row.keys) == SHORTLIST and set(row.keys) <= set(keys) for row in short)
    return float(np.mean([one == other for one, other in zip(best(short), best(form.exact(x, keys)), strict=True)]))


def test_the_shortlist_holds_the_best_card(cards: dict[str, CardStatistics]) -> None:
    assert agreement(filled(cards), drawn(cards, PROMPTS), list(cards)) >= 0.99


def test_the_shortlist_is_of_the_masks_cards(cards: dict[str, CardStatistics]) -> None:
    form, mask = filled(cards), list(cards)[::3]
    assert agreement(form, drawn({key: cards[key] for key in mask}, PROMPTS), mask, mask) >= 0.99


def test_scores_of_the_shortlist_are_exact(cards: dict[str, CardStatistics]) -> None:
    form, x = filled(cards), drawn(cards, 20)
    for row, full in zip(form.score(x), form.exact(x, list(cards)), strict=True):
        assert row.values.tolist() == pytest.approx([full.values[full.keys.index(key)] for key in row.keys])


def test_cards_that_come_and_go_are_found_and_forgotten(cards: dict[str, CardStatistics]) -> None:
    """Between two choices of the directions, and beyond."""
    keys = list(cards)
    present = {key: cards[key] for key in keys[:150]}
    form, random = filled(present), np.random.default_rng(1)
    form.score(drawn(present, 1))
    for step in range(5):
        for key in keys[150 + 30 * step : 180 + 30 * step]:
            gone = str(random.choice(list(present)))
            del present[gone]
            form.remove(gone)
            present[key] = cards[key]
            form.add(key, cards[key])
        for gone in list(present)[:5]:
            del present[gone]
            form.remove(gone)
        assert agreement(form, drawn(present, 200, step), list(present)) >= 0.99


def test_a_replaced_card_is_looked_for_where_it_is_now(cards: dict[str, CardStatistics]) -> None:
    form = filled(cards)
    form.score(drawn(cards, 1))
    first, second = cards["card-0"], card_of(np.random.default_rng(99), DIMENSION, intents=1, each=9)
    assert best(form.score(first.prototypes[:1])) == ["card-0"]
    form.add("card-0", second)
    assert best(form.score(second.prototypes)) == ["card-0"]
    assert "card-0" not in best(form.score(first.prototypes))


def test_rows_of_cards_that_left_are_used_again(cards: dict[str, CardStatistics]) -> None:
    index, x = CoarseIndex(DIMENSION), drawn(cards, 1)
    index.shortlists(x, None, SHORTLIST, cards, np.eye(DIMENSION))
    newcomer = cards["card-0"]
    tracemalloc.start()
    for change in range(4 * CARDS):
        index.add(f"new-{change}", newcomer)
        index.remove(f"new-{change}")
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 4 * CARDS * DIMENSION * 4


def test_fewer_cards_than_the_shortlist_are_all_on_it(cards: dict[str, CardStatistics]) -> None:
    few = {key: cards[key] for key in list(cards)[:5]}
    (found,) = CoarseIndex(DIMENSION).shortlists(drawn(few, 1), None, SHORTLIST, few, np.eye(DIMENSION))
    assert sorted(found) == sorted(few)
