"""The sum over cards: scores against a plain formula over the pooled statistics, exact however cards come and go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from arrowmoe.errors import RoutingError
from arrowmoe.routing.closed_form import ClosedForm
from arrowmoe.routing.densities import Array
from arrowmoe.routing.statistics import MOST_PROMPTS, CardStatistics
from tests.arrowmoe.routing.synthetic import card_of, log_mixture, log_normal, unit

DIMENSION = 12


def some(number: int, seed: int = 0, **options: int) -> dict[str, CardStatistics]:
    random = np.random.default_rng(seed)
    return {f"card-{index}": card_of(random, DIMENSION, **options) for index in range(number)}


def rows(number: int, seed: int = 0) -> Array:
    return unit(np.random.default_rng(seed).standard_normal((number, DIMENSION))).astype(np.float64)


def fitted(cards: Mapping[str, CardStatistics]) -> ClosedForm:
    form = ClosedForm(DIMENSION)
    for key, card in cards.items():
        form.add(key, card)
    return form


def scores(form: ClosedForm, x: Array, keys: list[str]) -> Array:
    """(rows, keys)."""
    found = form.exact(x, keys)
    assert all(row.keys == tuple(keys) for row in found)
    return np.stack([row.values for row in found])


def plain_scores(cards: Mapping[str, CardStatistics], x: Array) -> Array:
    """The score of every card, from sums over all prototypes of all cards."""
    prompts = sum(card.counts.sum() for card in cards.values())
    within = sum(card.counts.sum() * card.sketch.T @ card.sketch for card in cards.values()) / prompts
    behind = [(n, mu) for card in cards.values() for n, mu in zip(card.counts, card.prototypes, strict=True)]
    mean = sum(n * mu for n, mu in behind) / prompts
    between = sum(n * np.outer(mu - mean, mu - mean) for n, mu in behind) / prompts
    floor = min(10.0, max(0.6, (100 / (prompts / len(cards))) ** 2)) / DIMENSION * np.eye(DIMENSION)
    share = min(0.5, max(0.3, 0.3 * (1000 / (prompts / len(cards))) ** 0.25))
    outside = log_normal(x, mean, within + between + 1.5 * floor)
    columns = []
    for card in cards.values():
        own = share * card.sketch.T @ card.sketch + (1 - share) * within if len(card.sketch) else within
        inside = log_mixture(x, card.counts / card.counts.sum(), card.prototypes, own + floor)
        columns.append(inside - outside)
    return np.array(columns).T


@pytest.mark.parametrize("each", [3, 30, 60, 200, 600])
def test_scores_are_the_plain_formula(each: int) -> None:
    random, cards = np.random.default_rng(1), some(5, intents=3, each=each)
    cards["bare"] = card_of(random, DIMENSION, intents=2, each=each, rank=0)
    cards["one"] = card_of(random, DIMENSION, intents=1, each=2 * each)
    x = rows(30)
    found = scores(fitted(cards), x, list(cards))
    assert found == pytest.approx(plain_scores(cards, x), abs=1e-8)


def test_the_nearest_prototype_is_named() -> None:
    cards = some(3, intents=4, each=30, rank=0)
    x = cards["card-1"].prototypes
    row = fitted(cards).exact(x, ["card-2", "card-1"])
    assert [one.nearest[1] for one in row] == [0, 1, 2, 3]


def test_a_prompt_goes_to_the_card_it_was_drawn_from() -> None:
    cards = some(6, intents=2, each=40)
    x, owners = np.concatenate([card.prototypes for card in cards.values()]), np.repeat(list(cards), 2)
    found = fitted(cards).score(x)
    assert [row.keys[row.values.argmax()] for row in found] == owners.tolist()


@pytest.mark.parametrize("seed", range(3))
def test_three_hundred_changes_leave_what_a_fit_from_scratch_gives(seed: int) -> None:
    random, pool, x = np.random.default_rng(seed), some(40, seed), rows(10)
    form, present = ClosedForm(DIMENSION), dict[str, CardStatistics]()
    for change in range(1, 301):
        key = str(random.choice(list(pool)))
        if key in present and random.random() < 0.7:
            del present[key]
            assert form.remove(key)
        else:
            # A card that is there is replaced by what another key has now.
            present[key] = pool[str(random.choice(list(pool)))]
            form.add(key, present[key])
        assert (len(form), key in form) == (len(present), key in present)
        form.score(x[:1])  # Whatever is kept between changes is there to go stale.
        if change % 30 == 0 and present:
            order = [str(key) for key in random.permutation(list(present))]
            expected = scores(fitted({key: present[key] for key in order}), x, list(present))
            assert scores(form, x, list(present)) == pytest.approx(expected, rel=1e-6)


def test_a_card_of_the_most_prompts_takes_nothing_along_when_it_leaves() -> None:
    cards, x = some(5), rows(10)
    heavy = replace(cards["card-0"], counts=np.full(3, MOST_PROMPTS / 3))
    form = fitted(cards)
    for _ in range(20):
        form.add("heavy", heavy)
        form.remove("heavy")
    assert scores(form, x, list(cards)) == pytest.approx(scores(fitted(cards), x, list(cards)), rel=1e-6)


def test_the_last_card_leaves_nothing_behind() -> None:
    cards, x = some(3), rows(4)
    form = fitted(cards)
    for key in cards:
        assert form.remove(key)
    assert [row.keys for row in form.score(x)] == [()] * 4
    form.add("new", cards["card-1"])
    assert np.array_equal(scores(form, x, ["new"]), scores(fitted({"new": cards["card-1"]}), x, ["new"]))


def test_one_card_of_one_public_text_can_be_scored() -> None:
    card = replace(card_of(np.random.default_rng(0), DIMENSION, intents=1, each=3, rank=0), counts=np.ones(1))
    assert np.isfinite(scores(fitted({"only": card}), rows(3), ["only"])).all()


def test_an_unknown_card_is_not_removed_and_changes_nothing() -> None:
    cards, x = some(3), rows(2)
    form = fitted(cards | {"gone": cards["card-0"]})
    scores(form, x, list(cards))
    assert form.remove("gone")
    before = scores(form, x, list(cards))
    assert before == pytest.approx(scores(fitted(cards), x, list(cards)))
    assert not form.remove("nobody")
    assert np.array_equal(scores(form, x, list(cards)), before)


def test_a_card_of_another_dimension_is_refused_and_changes_nothing() -> None:
    cards, x = some(3), rows(2)
    form = fitted(cards)
    before = scores(form, x, list(cards))
    with pytest.raises(RoutingError, match="expected statistics of dimension 12, got 5"):
        form.add("card-0", card_of(np.random.default_rng(0), 5))
    assert np.array_equal(scores(form, x, list(cards)), before)


def test_only_cards_of_the_mask_are_scored_and_they_score_as_ever() -> None:
    cards, x = some(6), rows(3)
    form = fitted(cards)
    whole = form.score(x)
    for mask in ({"card-4", "card-1"}, ["card-1", "card-4", "nobody"], {"nobody"}, ()):
        for row, full in zip(form.score(x, mask), whole, strict=True):
            assert set(row.keys) == set(mask) - {"nobody"}
            expected = [full.values[full.keys.index(key)] for key in row.keys]
            assert row.values.tolist() == pytest.approx(expected, rel=1e-12)


def test_what_was_added_can_be_read_back() -> None:
    cards = some(2)
    assert fitted(cards).statistics("card-1") is cards["card-1"]
