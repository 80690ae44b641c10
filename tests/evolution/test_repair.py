"""Repair: a drift is scaled down if that saves the lift, an idle candidate gets no second look."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from evolution.gate import Bars, Results, judge
from evolution.repair import repaired
from tests.evolution.test_gate import drift, results, right

BARS = Bars(alpha=0.01)


class Candidate:
    """A candidate whose right answers and drift are functions of its scale."""

    def __init__(self, right_at: Callable[[float], int], rise_at: Callable[[float], float]) -> None:
        self.right_at = right_at
        self.rise_at = rise_at
        self.probed: list[float] = []

    def __call__(self, scale: float) -> Results:
        self.probed.append(scale)
        exam = results(losses=drift(applied_rise=self.rise_at(scale)))
        return replace(exam, candidate=right(self.right_at(scale)), scale=scale)


def repair(candidate: Candidate, probes: int = 5) -> tuple[str, float]:
    found = repaired(candidate, judge(candidate(1.0), BARS), BARS, probes=probes)
    candidate.probed.remove(1.0)
    assert (found.step == "publish") is found.verdict.accepted
    assert found.verdict.evidence["scale"] == found.scale
    return found.step, found.scale


def test_what_passes_is_published_as_it_is() -> None:
    candidate = Candidate(lambda _: 30, lambda _: 0.0)
    assert repair(candidate) == ("publish", 1.0)
    assert candidate.probed == []


def test_the_largest_scale_that_holds_is_found() -> None:
    candidate = Candidate(lambda scale: 8 + round(30 * scale), lambda scale: 0.16 * scale)
    step, scale = repair(candidate)
    assert step == "publish"
    assert 0.1 / 0.16 - 2**-5 <= scale <= 0.1 / 0.16
    assert len(candidate.probed) == 5


def test_a_drift_without_a_lift_is_rejected_unprobed() -> None:
    candidate = Candidate(lambda _: 10, lambda _: 0.5)
    assert repair(candidate) == ("reject", 1.0)
    assert candidate.probed == []


def test_too_few_items_are_not_probed_either() -> None:
    few = judge(results(0, 8, items=8, losses=drift(applied_rise=0.5)), BARS)
    candidate = Candidate(lambda _: 30, lambda _: 0.0)
    assert repaired(candidate, few, BARS).step == "reject"
    assert candidate.probed == []


def test_a_lift_that_is_lost_before_the_drift_asks_for_replay_and_shows_the_probes() -> None:
    candidate = Candidate(lambda scale: 30 if scale > 0.9 else 8, lambda scale: 0.5 * scale)
    assert repair(candidate) == ("retrain", 1.0)
    found = repaired(candidate, judge(candidate(1.0), BARS), BARS)
    probes = found.verdict.evidence["probes"]
    assert [probe["scale"] for probe in probes] == [1.0, 0.5, 0.25, 0.125]
    assert all(probe["reasons"] for probe in probes)


def test_without_monotony_what_is_returned_has_still_passed() -> None:
    candidate = Candidate(lambda scale: 30 if scale in (0.5, 1.0) else 8, lambda scale: 0.15 * scale)
    assert repair(candidate) == ("publish", 0.5)
    assert candidate.probed[0] == 0.5
