"""The gate: what passes, what does not and why, and how often it is wrong when it is asked many times."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from evolution.errors import EvolutionError
from evolution.gate import AlphaSpending, Anchored, Bars, Bools, Losses, Results, Verdict, judge

BARS = Bars(alpha=0.01)
ITEMS = 40


def right(count: int, items: int = ITEMS) -> Bools:
    return np.arange(items) < count


def anchored(before: int = 30, after: int = 30, *, applied: int | None = None, items: int = 60) -> Anchored:
    was, served = right(before, items), right(after, items)
    return Anchored(base=was, today=was, served=served, applied=served if applied is None else right(applied, items))


def drift(
    served_rise: float = 0.0, applied_rise: float = 0.0, kl: float = 0.0, texts: int = 30, spread: float = 0.0
) -> Losses:
    base = 2 + np.linspace(-1, 1, texts)
    wobble = spread * np.sin(np.arange(texts))
    return Losses(
        base=base,
        today=base,
        served=base + served_rise + wobble,
        applied=base + applied_rise + wobble,
        kl=np.full(texts, kl),
    )


HELD = drift()


def results(
    base: int = 8,
    candidate: int = 30,
    *,
    incumbent: int | None = None,
    items: int = ITEMS,
    anchors: dict[str, Anchored] | None = None,
    losses: Losses | None = HELD,
) -> Results:
    return Results(
        base=right(base, items),
        incumbent=right(base if incumbent is None else incumbent, items),
        candidate=right(candidate, items),
        routed=right(items, items),
        anchors={"capitals": anchored(), "additions": anchored(9, 9)} if anchors is None else anchors,
        losses=losses,
    )


def test_a_candidate_that_lifts_and_holds_passes_and_its_evidence_is_json() -> None:
    verdict = judge(results(), BARS)
    assert verdict.accepted
    assert verdict.tested
    assert verdict.reasons == ()
    evidence = json.loads(json.dumps(verdict.to_json(), allow_nan=False))
    assert evidence["accepted"] is True
    assert evidence["reasons"] == []
    assert evidence["accuracy"] == {"base": 0.2, "candidate": 0.75}
    assert evidence["against"].keys() == {"base"}
    assert evidence["against"]["base"]["gains"] == 22
    assert evidence["against"]["base"]["p_value"] == pytest.approx(
        stats.binomtest(22, 22, alternative="greater").pvalue
    )
    assert evidence["bars"]["alpha"] == 0.01
    assert evidence["anchors"]["served"]["sets"]["capitals"] == {"items": 60, "before": 0.5, "after": 0.5}


def test_beating_the_base_is_not_enough_where_the_router_serves_something_better() -> None:
    verdict = judge(results(8, 30, incumbent=29), BARS)
    assert {reason.split(":")[0] for reason in verdict.no_lift} == {"against incumbent"}
    assert set(verdict.evidence["against"]) == {"base", "incumbent"}
    assert not verdict.repairable


def test_a_significant_lift_below_the_least_one_is_named() -> None:
    verdict = judge(results(400, 412, items=1_000), BARS)
    assert [reason for reason in verdict.no_lift if "1.2 points, below the least of 5" in reason]
    assert not [reason for reason in verdict.no_lift if "chance" in reason]


def test_a_candidate_that_the_router_would_not_give_its_own_items_is_rejected() -> None:
    verdict = judge(replace(results(), routed=right(12)), BARS)
    assert verdict.reasons == ("the router gives it only 30% of its own held-out items, below 50%",)


@pytest.mark.parametrize(
    ("exam", "what"),
    [
        (results(0, 8, items=8), "20 held-out items, got 8"),
        (results(anchors={}), "52 anchors, got 0"),
        (results(anchors={"capitals": anchored(items=40)}), "52 anchors, got 40"),
        (results(losses=drift(texts=3)), "20 texts, got 3"),
        (results(losses=drift(texts=0)), "20 texts, got 0"),
    ],
)
def test_what_is_too_small_is_not_judged(exam: Results, what: str) -> None:
    verdict = judge(exam, BARS)
    assert not verdict.accepted
    assert not verdict.tested
    assert not verdict.repairable
    assert [reason for reason in verdict.too_few if f"{what}, so it is too few to tell" in reason]
    json.dumps(verdict.to_json(), allow_nan=False)


def test_an_alpha_that_no_outcome_could_reach_asks_for_more_items() -> None:
    assert (
        "expected at least 30 held-out items, got 25"
        in judge(results(2, 25, items=25), Bars(alpha=2.0**-30)).reasons[0]
    )


@pytest.mark.parametrize(
    ("anchors", "reason"),
    [
        ({"a": anchored(30, 26), "b": anchored(30, 34)}, "anchor a, served: fell by 6.7 points, the margin is 5"),
        ({"a": anchored(30, 28), "b": anchored(30, 28)}, "anchors, served: 0 gained and 4 lost of 120"),
        (
            {"a": anchored(40, 40, applied=30), "b": anchored()},
            "anchor a, applied: fell by 16.7 points, the margin is 15",
        ),
    ],
)
def test_a_fall_on_anchors_is_a_drift_that_may_be_repaired(anchors: dict[str, Anchored], reason: str) -> None:
    verdict = judge(results(anchors=anchors), BARS)
    assert [found for found in verdict.drift if found.startswith(reason)]
    assert verdict.repairable


@pytest.mark.parametrize(
    ("losses", "accepted"),
    [
        (drift(served_rise=0.019, applied_rise=0.09, kl=0.19), True),
        (drift(served_rise=0.021), False),
        (drift(served_rise=0.015, spread=0.05), False),
        (drift(applied_rise=0.11), False),
        (drift(kl=0.21), False),
        (drift(kl=float("inf")), False),
        (drift(applied_rise=float("nan")), False),
    ],
)
def test_losses_are_bounded_by_what_cannot_be_ruled_out(losses: Losses, accepted: bool) -> None:
    verdict = judge(results(losses=losses), BARS)
    assert verdict.accepted is accepted
    assert bool(verdict.drift) is not accepted
    json.dumps(verdict.to_json(), allow_nan=False)


def test_an_encoder_has_no_losses_to_hold() -> None:
    assert judge(results(losses=None), BARS).accepted


def test_an_encoder_that_nobody_gave_anchors_is_judged_by_its_lift() -> None:
    assert judge(replace(results(losses=None), anchors={}), BARS).accepted


def test_figures_that_do_not_fit_each_other_and_impossible_levels_are_refused() -> None:
    with pytest.raises(EvolutionError, match="one value per item"):
        replace(results(), candidate=right(3, 39))
    with pytest.raises(EvolutionError, match="one value per item"):
        replace(drift(), kl=np.zeros(2))
    with pytest.raises(EvolutionError, match="alpha between 0 and 1"):
        Bars(alpha=0.0)


def simulated(rng: np.random.Generator, base: float, candidate: float, items: int = 60) -> Results:
    answers: npt.NDArray[np.float64] = rng.random((2, items))
    return replace(
        results(items=items), base=answers[0] < base, incumbent=answers[0] < base, candidate=answers[1] < candidate
    )


def acceptance(base: float, candidate: float, *, alpha: float, items: int = 60, runs: int = 400) -> float:
    rng, bars = np.random.default_rng(3), Bars(alpha=alpha, draws=400)
    return float(np.mean([judge(simulated(rng, base, candidate, items), bars).accepted for _ in range(runs)]))


@pytest.mark.parametrize("level", [0.1, 0.5])
def test_an_idle_candidate_passes_no_more_often_than_alpha(level: float) -> None:
    assert acceptance(level, level, alpha=0.05, runs=1_000) <= 0.05


def test_a_real_lift_is_seen() -> None:
    """Power at the first night's alpha: 20 % to 60 % is seen on 40 items, 40 % to 65 % mostly on 120."""
    alpha = AlphaSpending().tonight
    assert acceptance(0.2, 0.6, alpha=alpha, items=40) > 0.85
    assert acceptance(0.4, 0.65, alpha=alpha, items=120) > 0.85


def test_shuffled_labels_are_rejected_nineteen_times_of_twenty() -> None:
    """An expert trained on shuffled answers is right by chance, and the base, which knows no label, hardly ever."""
    rng, labels = np.random.default_rng(11), 15
    rejected = 0
    for _ in range(100):
        wanted, guessed = rng.integers(0, labels, (2, 60))
        exam = replace(results(items=60), candidate=wanted == guessed, base=rng.random(60) < 0.05)
        rejected += not judge(replace(exam, incumbent=exam.base), Bars(alpha=0.02)).accepted
    assert rejected >= 95


def verdict(accepted: bool = True, *, tested: bool = True) -> Verdict:
    no_lift = () if accepted else ("no",)
    return Verdict(too_few=() if tested else ("few",), no_lift=no_lift, drift=(), evidence={})


@given(st.lists(st.booleans(), max_size=60), st.floats(0.001, 0.2))
def test_alphas_together_never_exceed_their_share_of_what_was_published(passes: list[bool], alpha: float) -> None:
    """The estimate that LORD++ keeps below alpha after every test (Ramdas et al. 2017, eq. 7)."""
    spending, spent = AlphaSpending(alpha=alpha), 0.0
    for passed in passes:
        spent += spending.tonight
        spending = spending.after(verdict(passed))
        assert spent <= alpha * max(1, len(spending.passed)) + 1e-12
    assert spending.tests == len(passes)


def test_alpha_shrinks_by_rejection_and_comes_back_with_a_pass() -> None:
    fresh = AlphaSpending()
    poor = fresh.after(verdict(False)).after(verdict(False))
    assert poor.tonight < fresh.after(verdict(False)).tonight < fresh.tonight < fresh.alpha
    assert poor.after(verdict()).tonight > poor.tonight
    assert poor.after(verdict(tested=False)) == poor


def test_spending_survives_json() -> None:
    spending = AlphaSpending().after(verdict()).after(verdict(False)).after(verdict())
    assert AlphaSpending.from_json(json.loads(json.dumps(spending.to_json()))) == spending
    assert spending.passed == (1, 3)


def test_of_the_published_at_most_alpha_are_idle() -> None:
    rng, published, idle = np.random.default_rng(9), 0, 0
    for _ in range(300):
        spending = AlphaSpending(alpha=0.1)
        for _ in range(20):
            null = rng.random() < 0.7
            p_value = rng.random() if null else float(stats.norm.sf(rng.normal(3.0)))
            passed = p_value <= spending.tonight
            published, idle = published + passed, idle + (passed and null)
            spending = spending.after(verdict(passed))
    assert published > 300
    assert idle / published <= 0.1
