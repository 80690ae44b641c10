"""The figures against formulas written with loops, cases small enough for paper, and laws they must keep."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arrowmoe.errors import RoutingError
from arrowmoe.routing.metrics import (
    NOBODY,
    Proportion,
    accuracy,
    auroc,
    calibration,
    confusion_matrix,
    coverage,
    evaluate,
    gate_entropy,
    histogram,
    marginal_use,
    performance_against_compute,
    recall_at_false_rejection,
    risk_coverage,
)

coarse = st.integers(-5, 5).map(float)
samples = st.lists(coarse, min_size=1, max_size=30).map(np.array)


def by_pairs(inside: np.ndarray, outside: np.ndarray) -> float:
    """Mann and Whitney's U over all pairs, ties half."""
    won = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a in inside for b in outside)
    return won / (len(inside) * len(outside))


@given(samples, samples)
def test_auroc_is_the_share_of_pairs_won(inside: np.ndarray, outside: np.ndarray) -> None:
    assert auroc(inside, outside) == pytest.approx(by_pairs(inside, outside))


@given(samples, samples)
def test_auroc_sees_only_the_order(inside: np.ndarray, outside: np.ndarray) -> None:
    assert auroc(np.exp(inside), np.exp(outside)) == pytest.approx(auroc(inside, outside))
    assert auroc(outside, inside) == pytest.approx(1 - auroc(inside, outside))


def test_auroc_by_hand() -> None:
    assert auroc(np.array([3.0, 2.0]), np.array([1.0, 2.0])) == pytest.approx(3.5 / 4)
    assert auroc(np.array([3.0]), np.array([])) is None


def test_recall_at_false_rejection_by_hand() -> None:
    inside, outside = np.arange(20.0), np.array([-1.0, 0.5, 1.0, 7.0])
    found = recall_at_false_rejection(inside, outside, 0.05)
    assert found is not None
    assert (found.threshold, found.recall) == (1.0, 0.5)
    assert (inside < found.threshold).mean() == 0.05


@given(samples, samples, st.floats(0, 0.99))
def test_no_threshold_that_keeps_the_rate_catches_more(inside: np.ndarray, outside: np.ndarray, rate: float) -> None:
    found = recall_at_false_rejection(inside, outside, rate)
    assert found is not None
    assert (inside < found.threshold).mean() <= rate + 1e-9
    others = np.concatenate([inside, outside, outside + 0.5])
    assert all((outside < t).mean() <= found.recall for t in others if (inside < t).mean() <= rate)


def test_a_rate_outside_its_range_is_refused() -> None:
    with pytest.raises(RoutingError, match="rate of false rejections"):
        recall_at_false_rejection(np.ones(2), np.ones(2), 1.0)


def test_wilson_interval_against_published_values() -> None:
    share = Proportion.of([True] * 81 + [False] * 182)  # Newcombe 1998, table I: 0.2553 to 0.3662
    assert share is not None
    assert (share.count, share.total) == (81, 263)
    assert (round(share.low, 4), round(share.high, 4)) == (0.2553, 0.3662)
    none = Proportion.of([False] * 20)  # the same table: 0 of 20, 0 to 0.1611
    assert none is not None
    assert (none.low, round(none.high, 4)) == (0.0, 0.1611)
    assert Proportion.of([]) is None


def test_accuracy_counts_what_is_in_scope() -> None:
    share = accuracy(np.array([0, 1, NOBODY, 0]), np.array([0, 0, 1, NOBODY]))
    assert share is not None
    assert (share.count, share.total) == (1, 3)


def test_entropy_by_hand() -> None:
    even, hard, nothing = [0.5, 0.5], [1.0, 0.0], [0.0, 0.0]
    assert gate_entropy(np.array([even])) == pytest.approx(math.log(2))
    assert gate_entropy(np.array([even, hard, nothing, [3.0, 3.0]])) == pytest.approx(math.log(2) / 2)


def test_marginal_use_by_hand() -> None:
    use = marginal_use(np.array([[1.0, 0.0], [0.25, 0.75], [0.0, 0.0], [2.0, 2.0]]))
    assert use.tolist() == pytest.approx([1.75 / 4, 1.25 / 4, 1 / 4])


@given(st.lists(st.tuples(st.integers(-1, 2), st.integers(-1, 2)), min_size=1, max_size=40))
def test_confusion_counts_each_row_once(rows: list[tuple[int, int]]) -> None:
    labels, chosen = (np.array(column) for column in zip(*rows, strict=True))
    expected = [[0] * 4 for _ in range(4)]
    for label, card in rows:
        expected[3 if label == NOBODY else label][3 if card == NOBODY else card] += 1
    assert confusion_matrix(labels, chosen, 3).tolist() == expected


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60), st.integers(1, 20))
def test_calibration_error_with_loops(rows: list[tuple[float, bool]], bins: int) -> None:
    confidences, correct = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    error = 0.0
    for at in range(bins):
        members = [row for row in rows if min(max(math.ceil(row[0] * bins) - 1, 0), bins - 1) == at]
        if members:
            gap = sum(right for _, right in members) / len(members) - sum(sure for sure, _ in members) / len(members)
            error += len(members) / len(rows) * abs(gap)
    found = calibration(confidences, correct, bins)
    assert found.ece == pytest.approx(error)
    assert sum(part.count for part in found.bins) == len(rows)


def test_calibration_by_hand() -> None:
    found = calibration(np.array([0.1, 0.1, 0.9, 0.9]), np.array([False, False, True, False]), bins=2)
    assert found.ece == pytest.approx(0.5 * 0.1 + 0.5 * 0.4)
    assert [(part.low, part.high, part.accuracy) for part in found.bins] == [(0, 0.5, 0), (0.5, 1, 0.5)]
    edge = calibration(np.array([0.5]), np.array([True]), bins=2)
    assert [(part.low, part.high) for part in edge.bins] == [(0, 0.5)], "an upper edge belongs to its bin"
    with pytest.raises(RoutingError, match="confidences in"):
        calibration(np.array([1.5]), np.array([True]))


def test_coverage_of_alpha_is_counted_by_card() -> None:
    found = coverage(np.array([0.01, 0.05, 0.04, 0.9, 0.001]), np.array([0, 0, 1, 1, NOBODY]), 3, 0.05)
    assert found is not None
    assert (found.overall.count, found.overall.total) == (2, 4)
    assert [share and share.value for share in found.by_card] == [0.5, 0.5, None]
    assert coverage(np.array([0.5]), np.array([NOBODY]), 3, 0.05) is None


def test_uniform_p_values_reject_alpha() -> None:
    p_values = np.random.default_rng(0).uniform(size=20_000)
    for alpha in (0.01, 0.05, 0.10):
        found = coverage(p_values, np.zeros(len(p_values), dtype=np.intp), 1, alpha)
        assert found is not None
        assert found.overall.low <= alpha <= found.overall.high


def test_risk_coverage_by_hand() -> None:
    found = risk_coverage(np.array([4.0, 3.0, 2.0, 1.0]), np.array([True, False, True, False]))
    assert found.coverages == (0.25, 0.5, 0.75, 1.0)
    assert found.risks == pytest.approx((0, 1 / 2, 1 / 3, 1 / 2))
    assert found.aurc == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 2) / 4)


@given(st.permutations([(1.0, True), (1.0, False), (1.0, False), (2.0, True), (0.0, False), (0.0, True)]))
def test_risk_coverage_does_not_depend_on_the_order_of_rows(rows: list[tuple[float, bool]]) -> None:
    found = risk_coverage(np.array([row[0] for row in rows]), np.array([row[1] for row in rows]))
    third = 2 / 3
    losses = np.cumsum([0, third, third, third, 0.5, 0.5])
    assert found.aurc == pytest.approx((losses / np.arange(1, 7)).mean())


@given(st.lists(st.booleans(), min_size=1, max_size=400), st.randoms())
def test_a_long_curve_is_thinned_but_its_ends_and_area_stay(correct: list[bool], random: object) -> None:
    scores = np.arange(len(correct), 0, -1.0)
    found = risk_coverage(scores, np.array(correct), points=11)
    assert len(found.risks) <= 11
    assert found.coverages[-1] == 1.0
    assert found.risks[-1] == pytest.approx(1 - sum(correct) / len(correct))
    assert found.aurc == pytest.approx(np.mean([1 - np.mean(correct[: k + 1]) for k in range(len(correct))]))


def test_performance_against_compute_by_hand() -> None:
    scores, experts = np.array([0.9, 0.8, 0.3, 0.1]), np.array([2, 1, 1, 1])
    chosen, labels = np.array([0, 1, 0, 1]), np.array([0, 1, NOBODY, 0])
    points = performance_against_compute(scores, experts, chosen, labels, points=4)
    assert [(p.threshold, p.accuracy, p.experts, p.routed) for p in points[:-1]] == [
        (0.1, 0.5, 1.25, 1.0),
        (0.3, 0.5, 1.0, 0.75),
        (0.8, 0.75, 0.75, 0.5),
        (0.9, 0.5, 0.5, 0.25),
    ]
    assert (points[-1].accuracy, points[-1].experts, points[-1].routed) == (0.25, 0.0, 0.0)


@given(samples, samples)
def test_a_histogram_counts_every_score(inside: np.ndarray, outside: np.ndarray) -> None:
    found = histogram(inside, outside)
    assert (sum(found.in_scope), sum(found.out_of_scope)) == (len(inside), len(outside))
    assert len(found.edges) == len(found.in_scope) + 1


def test_an_evaluation_holds_all_figures_and_is_json() -> None:
    weights = [[0.8, 0.2], [0.4, 0.6], [0.0, 0.0], [0.0, 0.0]]
    found = evaluate(
        ["a", "b"], weights, [4, 3, 2, 1], [0.9, 0.8, 0.02, 0.01], [0, 0, 1, NOBODY], best=[0, 1, 1, 0], seconds=0.4
    )
    assert (found.accuracy, found.routed_accuracy) == (Proportion.of([1, 0, 1]), Proportion.of([1, 0, 0]))
    assert (found.false_rejection, found.out_of_scope_rejection) == (Proportion.of([0, 0, 1]), Proportion.of([1]))
    assert found.auroc == 1.0
    assert [(at.rate, at.recall) for at in found.rejections] == [(0.01, 1.0), (0.05, 1.0), (0.10, 1.0)]
    assert [at.overall.count for at in found.coverage] == [0, 1, 1]
    assert found.confusion == ((1, 1, 0), (0, 0, 1), (0, 0, 1))
    assert found.risk_coverage.aurc == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 2) / 4)
    assert found.seconds_per_decision == pytest.approx(0.1)
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["confusion"] == [[1, 1, 0], [0, 0, 1], [0, 0, 1]]


def test_what_the_data_cannot_give_is_none() -> None:
    hard = evaluate(["a"], [[1.0], [1.0]], [1, 2], None, [0, 0])
    assert (hard.auroc, hard.out_of_scope_rejection, hard.calibration, hard.seconds_per_decision) == (None,) * 4
    assert (hard.rejections, hard.coverage) == ((), ())
    strangers = evaluate(["a"], [[0.5], [0.4]], [1, 2], [0.1, 0.2], [NOBODY, NOBODY])
    assert (strangers.accuracy, strangers.false_rejection, strangers.calibration) == (None,) * 3
    json.dumps(strangers.to_json(), allow_nan=False)


def test_answering_what_no_card_is_for_is_a_risk_also_where_the_router_would_abstain() -> None:
    found = evaluate(["a"], [[1.0], [0.0]], [2, 1], None, [0, NOBODY])
    assert found.risk_coverage.risks == (0.0, 0.5)


def test_soft_gates_are_the_confidences_unless_others_are_given() -> None:
    soft = evaluate(["a", "b"], [[0.75, 0.25]], [1], None, [0])
    assert soft.calibration is not None
    assert soft.calibration.ece == pytest.approx(0.25)
    rejecting = evaluate(["a", "b"], [[0.75, 0.25], [0, 0]], [2, 1], None, [0, 0], best=[0, 0])
    assert rejecting.calibration == soft.calibration, "a gate of zero is no confidence"
    told = evaluate(["a", "b"], [[1.0, 0.0]], [1], None, [0], confidences=[0.6])
    assert told.calibration is not None
    assert told.calibration.ece == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"weights": [[1.0]]}, "finite weights"),
        ({"weights": [[math.nan, 1.0]]}, "finite weights"),
        ({"scores": [math.inf]}, "finite scores"),
        ({"p_values": [0.1, 0.2]}, "finite p_values"),
        ({"labels": [2]}, "labels in"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(change: dict[str, object], says: str) -> None:
    good = {"weights": [[1.0, 0.0]], "scores": [1.0], "p_values": [0.5], "labels": [0]}
    with pytest.raises(RoutingError, match=says):
        evaluate(["a", "b"], **{**good, **change})
