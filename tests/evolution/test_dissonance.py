"""Dissonance: features are p-values by the plain formula, their combination is Fisher's, and it finds bad answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scipy.stats import combine_pvalues

from evolution.dissonance import ABSTAINED_P, LEAST_REFERENCE, agreement, dissonance, features, fisher, worst
from evolution.protocols import Floats, Reply
from evolution.signals import Signal

NAN = math.nan


def signal(*, accepted: bool = True, **fields: Any) -> Signal:
    return Signal(base="tiny", prompt="?", accepted=accepted, **fields)


def answers(nats: Sequence[float], **fields: Any) -> list[Signal]:
    return [signal(sequence_nats=each, tokens=fields.get("tokens", 4), card=fields.get("card", "a")) for each in nats]


def pairs_auroc(scores: Floats, bad: Sequence[bool]) -> float:
    wins = [
        (high > low) + (high == low) / 2
        for high, is_bad in zip(scores, bad, strict=True)
        if is_bad
        for low, also_bad in zip(scores, bad, strict=True)
        if not also_bad
    ]
    return float(np.mean(wins))


def test_a_tail_is_the_conformal_p_value_among_the_others_of_its_reference() -> None:
    nats = [float(value) for value in np.random.default_rng(0).integers(1, 9, 30)]
    odd = signal(accepted=False, sequence_nats=6.0, tokens=4, card="a", p_value=0.02)
    table = features([*answers(nats), odd])
    for at, value in enumerate(nats):
        others = nats[:at] + nats[at + 1 :]
        assert table[at, 1] == pytest.approx((1 + sum(each >= value for each in others)) / (1 + len(others)))
    expected = (1 + sum(each >= 6 for each in nats)) / (1 + len(nats))
    assert table[-1].tolist() == pytest.approx([0.02, expected, expected, NAN, 1], nan_ok=True)


def test_an_answer_is_measured_against_its_own_card_and_length_where_there_are_enough() -> None:
    short, long = answers([1.0] * LEAST_REFERENCE), answers([50.0] * LEAST_REFERENCE, tokens=32)
    calm = answers([0.5] * LEAST_REFERENCE, card="b")
    assert features([*short, *long, *calm])[:, 1].tolist() == [1.0] * 3 * LEAST_REFERENCE
    few = features([*short, *long[:1]])  # too few long ones: all of the base are the reference
    assert few[-1, 1] == pytest.approx(1 / (LEAST_REFERENCE + 1))


def test_bad_answers_are_no_reference_and_another_base_says_nothing() -> None:
    bad = [signal(sequence_nats=99.0, tokens=4, card="a", feedback="bad") for _ in range(40)]
    high = answers([10.0])
    table = features([*answers([1.0] * 20), *bad, *high])
    assert table[-1, 1] == pytest.approx(1 / 21)
    foreign = Signal(base="other", prompt="?", accepted=False, sequence_nats=1.0, tokens=4)
    assert features([*answers([5.0] * 30), foreign])[-1, 1] == 1.0


def test_without_evidence_features_are_unknown() -> None:
    assert features([]).shape == (0, 5)
    assert features([signal()]).tolist()[0] == pytest.approx([NAN, NAN, NAN, NAN, 0], nan_ok=True)
    assert fisher(features([signal()])).tolist() == [0.5]


def test_the_default_is_fishers_method_on_router_answer_and_agreement() -> None:
    rows = [[0.03, 0.1, 0.3, NAN, 1], [0.5, NAN, NAN, NAN, 0], [NAN, 0.2, 0.1, 0.6, 1], [0.4, 0.9, 0.9, 0.1, 0]]
    wanted = [[0.03, 0.4], [0.5], [ABSTAINED_P, 0.3, 0.6], [0.4, 1.0, 0.1]]
    expected = [1 - combine_pvalues(p_values, method="fisher").pvalue for p_values in wanted]
    assert fisher(np.array(rows)).tolist() == pytest.approx(expected)


def simulated(rng: np.random.Generator, count: int) -> tuple[list[Signal], list[bool]]:
    """Good answers have uniform p-values and nats around 1.0 per token; bad ones low p-values, and twice as many."""
    bad = [bool(value) for value in rng.random(count) < 0.3]
    tokens = rng.integers(2, 30, count)
    nats = np.where(bad, 1.8, 1.0) * tokens * rng.gamma(8, 1 / 8, count)
    p_values = np.where(bad, rng.beta(0.5, 4, count), rng.random(count))
    made = [
        signal(accepted=bool(p > 0.05), p_value=float(p), sequence_nats=float(n), tokens=int(t))
        for p, n, t in zip(p_values, nats, tokens, strict=True)
    ]
    return made, bad


def test_the_detector_finds_bad_answers_better_than_either_part_alone() -> None:
    made, bad = simulated(np.random.default_rng(1), 600)
    scores, table = dissonance(made), features(made)
    found = pairs_auroc(scores, bad)
    assert found >= 0.85
    assert found > max(pairs_auroc(-table[:, column], bad) for column in (0, 1, 2))


def test_where_nothing_is_wrong_alarms_are_as_rare_as_they_say() -> None:
    rng = np.random.default_rng(2)
    made = [
        signal(p_value=float(p), sequence_nats=float(t * g), tokens=int(t), card="a")
        for p, t, g in zip(rng.random(2000), rng.integers(2, 30, 2000), rng.gamma(8, 1 / 8, 2000), strict=True)
    ]
    scores = dissonance(made)
    for alpha in (0.01, 0.05, 0.2):
        assert (scores >= 1 - alpha).mean() <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / 2000)


def test_the_owner_has_the_last_word() -> None:
    made = [
        signal(p_value=0.9, feedback="bad"),
        signal(accepted=False, p_value=0.001, feedback="good"),
        signal(p_value=0.5),
    ]
    assert dissonance(made).tolist() == pytest.approx([1.0, 0.0, 0.5])
    assert dissonance(made, combine=lambda table: np.full(len(table), 0.25)).tolist() == [1.0, 0.0, 0.25]


def test_the_worst_fifth_leaves_out_what_is_known() -> None:
    made = [signal(feedback="bad" if at == 0 else None) for at in range(10)]
    scores = np.linspace(1, 0, 10)
    assert worst(made, scores) == made[1:3]
    assert worst(made, scores, share=1.0) == made[1:]
    assert worst([], np.array([])) == []


def test_agreement_is_the_largest_class_times_its_probability() -> None:
    def reply(text: str, nats: float = 0.0, tokens: int = 2) -> Reply:
        return Reply(text=text, tokens=tokens, sequence_nats=nats)

    def same(one: str, other: str) -> bool:
        return one.casefold() == other.casefold()

    assert agreement([reply("Yes"), reply("yes"), reply("no"), reply("YES")], same) == pytest.approx(0.75)
    sure = agreement([reply("a", 2 * math.log(2)), reply("a", 2 * math.log(4)), reply("b")], same)
    assert sure == pytest.approx(2 / 3 * (1 / 2 + 1 / 4) / 2)
    assert agreement([reply("", tokens=0)] * 3, same) == 0
    assert agreement([], same) == 0
