"""The combiner: the fit is scikit-learn's, its figures are honest, and too few labels change nothing."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from evolution.combiner import LEAST_LABELS, RIDGE, auroc, calibration_error, fit, kept, refit
from evolution.dissonance import dissonance, fisher
from evolution.errors import SignalError
from evolution.protocols import Floats
from evolution.signals import Signal
from evolution.tables import NoteRow
from registry.database import Database
from tests.evolution.test_dissonance import pairs_auroc, simulated


@pytest.fixture
def database(catalog_url: str) -> Iterator[Database]:
    database = Database(catalog_url)
    yield database
    database.close()


def drawn(count: int, seed: int = 0) -> tuple[Floats, list[bool]]:
    """Features of which the router's tells most, with labels drawn from a logistic model of them."""
    rng = np.random.default_rng(seed)
    table = np.column_stack([rng.random((count, 4)), rng.random(count) < 0.5]).astype(np.float64)
    logits = -2.0 * np.log(table[:, 0]) - 0.5 * np.log(table[:, 1]) - 2.5
    return table, [bool(value) for value in rng.random(count) < 1 / (1 + np.exp(-logits))]


def test_the_fit_is_ridge_regression_towards_platts_targets() -> None:
    table, bad = drawn(200)
    table[3, 0] = np.nan
    labels = np.array(bad)
    inputs = np.column_stack([-np.log(table[:, :4]), table[:, 4]])
    inputs[3, 0] = 1.0
    good, wrong = (~labels).sum(), labels.sum()
    targets = np.where(labels, (wrong + 1) / (wrong + 2), 1 / (good + 2))
    reference = LogisticRegression(C=1 / RIDGE, tol=1e-10, max_iter=10_000).fit(
        np.vstack([inputs, inputs]),
        np.repeat([1, 0], len(labels)),
        sample_weight=np.concatenate([targets, 1 - targets]),
    )
    combiner = fit(table, bad)
    assert [*combiner.weights, combiner.bias] == pytest.approx([*reference.coef_[0], reference.intercept_[0]], abs=1e-4)
    assert combiner(table) == pytest.approx(reference.predict_proba(inputs)[:, 1], abs=1e-4)


def test_its_figures_are_those_of_rows_it_has_not_seen() -> None:
    table, bad = drawn(400)
    combiner = fit(table, bad)
    fresh, truth = drawn(3000, seed=1)
    assert combiner.auroc == pytest.approx(pairs_auroc(combiner(fresh[:600]), truth[:600]), abs=0.06)
    assert calibration_error(combiner(fresh), truth) < 0.05
    rng = np.random.default_rng(2)
    nonsense = [bool(value) for value in rng.random(400) < 0.5]
    assert 0.4 < fit(table, nonsense).auroc < 0.6


def test_it_beats_the_default_where_one_feature_says_nothing() -> None:
    table, bad = drawn(400)
    fresh, truth = drawn(400, seed=1)
    assert auroc(fit(table, bad)(fresh), truth) > auroc(fisher(fresh), truth) + 0.02


def test_figures_by_their_plain_formulas() -> None:
    rng = np.random.default_rng(0)
    scores, bad = rng.integers(0, 5, 60) / 5, [bool(value) for value in rng.random(60) < 0.4]
    assert auroc(scores, bad) == pytest.approx(pairs_auroc(scores, bad))
    assert calibration_error(np.array([0.05, 0.05, 0.95, 1.0]), [False, True, True, True]) == pytest.approx(
        (2 * abs(0.5 - 0.05) + 2 * abs(1 - 0.975)) / 4
    )


def test_too_few_of_one_class_fit_nothing() -> None:
    table, _ = drawn(50)
    with pytest.raises(SignalError, match=f"{LEAST_LABELS} good and bad answers"):
        fit(table, [True] * (LEAST_LABELS - 1) + [False] * 41)


def labelled(count: int, seed: int = 1) -> list[Signal]:
    made, bad = simulated(np.random.default_rng(seed), count)
    return [
        Signal(**{**vars(each), "feedback": "bad" if wrong else "good"}) for each, wrong in zip(made, bad, strict=True)
    ]


def test_a_refit_is_kept_for_its_base(database: Database) -> None:
    made = labelled(200)
    combiner = refit(database, "tiny", made)
    assert combiner is not None
    assert kept(database, "tiny") == combiner
    assert kept(database, "other") is None
    assert combiner.auroc >= 0.85
    assert len(dissonance(made, combine=combiner)) == 200


def test_with_too_few_labels_the_one_before_stays(database: Database) -> None:
    assert refit(database, "tiny", labelled(20)[:5]) is None
    before = refit(database, "tiny", labelled(200))
    assert refit(database, "tiny", labelled(200, seed=2)[:5]) == before


def test_what_a_published_card_has_learnt_is_a_label(database: Database) -> None:
    made, bad = simulated(np.random.default_rng(3), 300)
    learnt = {each.id for each, wrong in zip(made, bad, strict=True) if wrong}
    known = [
        each if wrong else Signal(**{**vars(each), "feedback": "good"}) for each, wrong in zip(made, bad, strict=True)
    ]
    combiner = refit(database, "tiny", known, learnt=learnt)
    assert combiner is not None
    assert (combiner.bad, combiner.good) == (len(learnt), 300 - len(learnt))


def test_agreement_that_labels_a_signal_is_no_feature_of_it(database: Database) -> None:
    rng = np.random.default_rng(4)
    made = [
        Signal(base="tiny", prompt="?", accepted=True, p_value=float(p), agreement=float(a))
        for p, a in zip(rng.random(300), rng.choice([0.05, 0.95], 300), strict=True)
    ]
    combiner = refit(database, "tiny", made)
    assert combiner is not None
    assert 0.4 < combiner.auroc < 0.6  # it would be 1 if the agreement were shown


def test_one_of_other_features_is_not_used(database: Database) -> None:
    refit(database, "tiny", labelled(200))
    with database.writing() as session:
        note = session.get_one(NoteRow, "combiner:tiny")
        note.value = {**note.value, "features": ["entropy"]}
    assert kept(database, "tiny") is None
