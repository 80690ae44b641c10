"""A card's fit against a plain formula, and its p-values against what conformal prediction promises."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from arrowmoe.features import Vectors
from arrowmoe.routing.acceptance import CALIBRATION_VALUES, Acceptance, Prompts, conformal, describe
from arrowmoe.routing.densities import Array
from arrowmoe.routing.probe import Probe
from arrowmoe.routing.statistics import CardStatistics, summarise
from registry.format import LoRAFormat
from tests.arrowmoe.routing.synthetic import (
    EMBEDDER,
    PROBE_DIGEST,
    card_of,
    centres,
    log_mixture,
    log_normal,
    probe,
    prompts,
    unit,
)
from tests.registry.cards import small_card

DIMENSION = 8
CARDS, TESTED = 60, 400


def described(given: Prompts, on: Probe, *, min_prompts: int = 3, budget_bytes: int = 64 << 10) -> CardStatistics:
    return describe(given, on, min_prompts=min_prompts, budget_bytes=budget_bytes)


def plain_fit(x: Array, card: CardStatistics, on: Probe, variance: float) -> Array:
    """log p(x | card) − log N(x; moments of half the card and half the probe), with dense matrices."""
    floor = variance * np.eye(card.dimension)
    weights = card.counts / card.counts.sum()
    mean = sum(weight * prototype for weight, prototype in zip(weights, card.prototypes, strict=True))
    own = card.sketch.T @ card.sketch
    between = sum(
        weight * np.outer(prototype - mean, prototype - mean)
        for weight, prototype in zip(weights, card.prototypes, strict=True)
    )
    apart = mean - on.mean
    halves = (own + between) / 2 + on.covariance / 2 + np.outer(apart, apart) / 4
    inside = log_mixture(x, weights, card.prototypes, own + floor)
    return inside - log_normal(x, (mean + on.mean) / 2, halves + 2 * floor)


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize(("each", "floor"), [(200, 1.5), (60, 3.0), (30, 6.0), (3, 12.0)])
def test_the_fit_is_the_plain_formula(each: int, floor: float, rank: int) -> None:
    """`floor` in units of 1 / d: 500 / n between 1.5 and 12, rounded up to 1.5 times a power of two."""
    random, on = np.random.default_rng(each), probe(DIMENSION)
    card = card_of(random, DIMENSION, intents=3, each=each, rank=rank)
    x = unit(random.standard_normal((20, DIMENSION))).astype(np.float64)
    assert len(card.sketch) == min(rank, (each - 1) // 3)
    assert Acceptance(card, on).fit(x) == pytest.approx(plain_fit(x, card, on, floor / DIMENSION), abs=1e-9)


def test_a_cards_own_prompts_fit_better_than_others() -> None:
    random, on = np.random.default_rng(0), probe(DIMENSION)
    places = centres(random, 3, DIMENSION)
    acceptance = Acceptance(described(Prompts(vectors=prompts(random, places, 40)[0]), on), on)
    own = acceptance.fit(prompts(random, places, 20)[0].astype(np.float64))
    other = acceptance.fit(unit(random.standard_normal((60, DIMENSION))).astype(np.float64))
    assert np.median(own) > np.quantile(other, 0.9)


def test_a_p_value_counts_the_calibration_fits_that_are_no_better() -> None:
    random = np.random.default_rng(0)
    calibration, fits = np.sort(random.integers(0, 30, 50).astype(np.float64)), random.integers(-5, 35, 40) * 1.0
    expected = [(1 + sum(value <= fit for value in calibration)) / 51 for fit in fits]
    assert conformal(fits, calibration, 50) == pytest.approx(expected)


def test_quantiles_stand_for_all_calibration_fits() -> None:
    random = np.random.default_rng(0)
    fits, x = np.sort(random.standard_normal(5000)), random.standard_normal(200)
    quantiles = np.quantile(fits, np.linspace(0, 1, CALIBRATION_VALUES))
    assert conformal(x, quantiles, 5000) == pytest.approx(conformal(x, fits, 5000), abs=1 / CALIBRATION_VALUES)
    beyond = conformal(np.array([fits[0] - 1, fits[-1] + 1]), quantiles, 5000)
    assert beyond.tolist() == [1 / 5001, 1.0]


def rejections(train: int, held_out: int, alphas: Array) -> Array:
    """Share of new prompts of a card that its p-values reject, over many cards."""
    random, on, p_values = np.random.default_rng(train + held_out), probe(DIMENSION), []

    def drawn(places: Array, number: int) -> Vectors:
        rows = places[random.integers(0, len(places), number)]
        return unit(rows + 0.3 * random.standard_normal(rows.shape))

    for _ in range(CARDS):
        places = centres(random, 3, DIMENSION)
        card = described(
            Prompts(vectors=drawn(places, train), held_out=drawn(places, held_out) if held_out else None), on
        )
        found = Acceptance(card, on).p_values(drawn(places, TESTED).astype(np.float64))
        assert found is not None
        p_values.append(found)
    return np.array([(np.array(p_values) < alpha).mean() for alpha in alphas])


@pytest.mark.parametrize(("train", "held_out"), [(60, 199), (60, 999), (100, 0), (40, 0)])
def test_as_many_good_prompts_are_rejected_as_was_asked_for(train: int, held_out: int) -> None:
    """Held out, whole or as quantiles; cross-fitted in folds; one left out."""
    alphas, calibrators = np.array([0.01, 0.05, 0.1, 0.5]), held_out or train
    found = rejections(train, held_out, alphas)
    # Calibration and test prompts both vary; a p-value comes in steps of 1 / (n + 1), or of a quantile.
    deviation = np.sqrt(alphas * (1 - alphas) * (1 / calibrators + 1 / TESTED) / CARDS)
    steps = max(1 / (calibrators + 1), 1 / CALIBRATION_VALUES if calibrators > CALIBRATION_VALUES else 0)
    assert np.all(np.abs(found - alphas) <= 4 * deviation + steps), found


def test_few_prompts_give_no_p_values_and_eight_do() -> None:
    random, on = np.random.default_rng(0), probe(DIMENSION)
    x = unit(random.standard_normal((12, DIMENSION)))
    for given, calibrated in [
        (Prompts(vectors=x[:7]), 0),
        (Prompts(vectors=x[:8]), 8),
        (Prompts(vectors=x[:8], held_out=x[:7]), 0),
        (Prompts(vectors=x[:4], held_out=x[4:]), 8),
        (Prompts(vectors=x[:0], public=x[:2], held_out=x[:9]), 9),
    ]:
        found = described(given, on)
        assert found.calibrated == calibrated
        assert (Acceptance(found, on).p_values(x.astype(np.float64)) is None) == (calibrated == 0)
    assert described(Prompts(vectors=x), on, min_prompts=7).calibrated == 0


def test_labels_keep_their_prompts_through_cross_fitting() -> None:
    """Two far labels, interleaved: if a fold lost the order, its prototypes would be in the middle and fit nobody."""
    random, on = np.random.default_rng(0), probe(DIMENSION)
    rows, names = prompts(random, np.eye(DIMENSION)[:2] * [[1.0], [-1.0]], 50, spread=0.05)
    order = random.permutation(100)
    found = described(Prompts(vectors=rows[order], labels=[names[index] for index in order]), on)
    assert found.calibrated == 100
    own = Acceptance(found, on).fit(rows.astype(np.float64))
    assert np.median(found.calibration) == pytest.approx(np.median(own), abs=0.2)


def test_description_is_the_summary_with_room_for_calibration() -> None:
    random, on = np.random.default_rng(0), probe(DIMENSION)
    rows, names = prompts(random, centres(random, 2, DIMENSION), 150)
    found = described(Prompts(vectors=rows, labels=names), on, budget_bytes=1200)
    expected = summarise(
        rows, embedder=EMBEDDER, probe=PROBE_DIGEST, labels=names, budget_bytes=1200, calibration_values=256
    )
    assert np.array_equal(found.prototypes, expected.prototypes)
    assert np.array_equal(found.sketch, expected.sketch)
    assert (found.check, len(found.calibration), found.calibrated) == (on.check, 256, 300)
    assert found.nbytes <= 1200


def test_p_values_are_the_same_on_another_node(tmp_path: Path) -> None:
    random, on = np.random.default_rng(0), probe(DIMENSION)
    found = described(Prompts(vectors=prompts(random, centres(random, 2, DIMENSION), 30)[0]), on)
    LoRAFormat.save(found.put_into(small_card()), tmp_path / "card.lora.arrow")
    card = LoRAFormat.load(tmp_path / "card.lora.arrow")
    assert card.manifest.routing is not None
    there = Acceptance(CardStatistics.of(card.manifest.routing, card.statistics), probe(DIMENSION))
    x = unit(random.standard_normal((50, DIMENSION))).astype(np.float64)
    here = Acceptance(found, on).p_values(x)
    assert here is not None
    assert len(set(here)) > 5
    assert np.array_equal(here, there.p_values(x))
