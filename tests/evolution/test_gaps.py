"""Gaps: families of prompts are found whole, noise and what is ordinary is not, and repetition is traffic."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from evolution.gaps import NOISE, Clustering, cluster, coverage, find_gaps, worth
from evolution.protocols import Cover, Vectors
from evolution.signals import Signal

WIDTH = 64


def directions(rng: np.random.Generator, count: int, around: Vectors | None = None, cosine: float = 0.0) -> Vectors:
    """Unit vectors (count, WIDTH), uniform or with about `cosine` to `around`."""
    noise = rng.normal(size=(count, WIDTH))
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    mixed = noise if around is None else cosine * around + np.sqrt(1 - cosine**2) * noise
    return np.asarray(mixed / np.linalg.norm(mixed, axis=1, keepdims=True), np.float32)


def family(rng: np.random.Generator, *, intents: int, each: int) -> Vectors:
    """A family as sentence encoders show it: tight intents, loosely about one middle."""
    [middle] = directions(rng, 1)
    return np.concatenate([directions(rng, each, intent, 0.85) for intent in directions(rng, intents, middle, 0.75)])


def signals_of(prompts: Sequence[str], *, weight: float = 1.0) -> list[Signal]:
    return [Signal(base="tiny", prompt=prompt, accepted=False, weight=weight) for prompt in prompts]


def test_families_are_found_whole_and_noise_stays_queued() -> None:
    rng = np.random.default_rng(0)
    families = [family(rng, intents=4, each=20), family(rng, intents=1, each=40), family(rng, intents=3, each=15)]
    stray = directions(rng, 40)
    truth = np.repeat([0, 1, 2, NOISE], [80, 40, 45, 40])
    labels = cluster(np.concatenate([*families, stray]), directions(rng, 100), Clustering())
    inside = (truth != NOISE) & (labels != NOISE)
    assert adjusted_rand_score(truth[inside], labels[inside]) >= 0.95
    assert inside.sum() >= 0.8 * (truth != NOISE).sum()
    assert labels.max() + 1 == 3
    assert (labels[truth == NOISE] == NOISE).mean() >= 0.9


@pytest.mark.parametrize("ordinary", [0, 100])
def test_one_lone_family_is_a_gap(ordinary: int) -> None:
    rng = np.random.default_rng(1)
    vectors = np.concatenate([family(rng, intents=1, each=30), directions(rng, 6)])
    labels = cluster(vectors, directions(rng, ordinary), Clustering())
    assert labels.max() == 0
    assert (labels[:30] == 0).mean() >= 0.9
    assert (labels[30:] == NOISE).all()


def test_a_gap_takes_in_what_lies_close_to_it_and_nothing_else() -> None:
    """Loose prompts around a tight core, too thinly spread for any cluster; others as far from it as prompts are."""
    rng = np.random.default_rng(7)
    [middle] = directions(rng, 1)
    core, loose = directions(rng, 25, middle, 0.9), directions(rng, 15, middle, 0.65)
    far = directions(rng, 15, middle, 0.3)
    labels = cluster(np.concatenate([core, loose, far]), directions(rng, 100), Clustering())
    assert (labels[:40] == 0).mean() >= 0.9
    assert (labels[40:] == NOISE).all()


def test_stray_requests_are_no_gap() -> None:
    rng = np.random.default_rng(2)
    assert (cluster(directions(rng, 60), directions(rng, 60), Clustering()) == NOISE).all()


def test_what_lies_among_ordinary_requests_is_no_gap() -> None:
    rng = np.random.default_rng(3)
    [known] = directions(rng, 1)
    false_alarms, answered = directions(rng, 15, known, 0.85), directions(rng, 90, known, 0.85)
    gap = family(rng, intents=1, each=30)
    labels = cluster(np.concatenate([gap, false_alarms]), np.concatenate([answered, directions(rng, 20)]), Clustering())
    assert (labels[:30] == 0).mean() >= 0.9
    assert (labels[30:] == NOISE).all()


def test_too_few_prompts_are_no_gap() -> None:
    rng = np.random.default_rng(4)
    assert cluster(family(rng, intents=1, each=8), directions(rng, 50), Clustering()).tolist() == [NOISE] * 8
    assert cluster(np.empty((0, WIDTH), np.float32), directions(rng, 5), Clustering()).tolist() == []
    assert find_gaps([], np.empty((0, WIDTH), np.float32), np.empty(0), ordinary=directions(rng, 5)) == []


def test_a_prompt_that_is_repeated_is_traffic_and_no_second_member() -> None:
    rng = np.random.default_rng(5)
    vectors = family(rng, intents=1, each=30)
    once = [f"What is {at}?" for at in range(30)]
    asked = once + [f"  what IS {at}? " for at in range(10)]
    signals = signals_of(asked)
    rows = np.concatenate([vectors, vectors[:10]])
    [gap] = find_gaps(signals, rows, np.full(40, 0.9), ordinary=directions(rng, 80))
    assert set(gap.prompts) <= set(once)
    repeated = sum(prompt in once[:10] for prompt in gap.prompts)
    assert (gap.size, gap.traffic) == (len(gap.signals) - repeated, float(gap.size + repeated))
    again = signals_of(["the same prompt"] * 40)
    assert find_gaps(again, rows, np.full(40, 0.9), ordinary=directions(rng, 80)) == []


def test_a_gap_says_what_it_is_worth_and_the_worthiest_comes_first() -> None:
    rng = np.random.default_rng(6)
    small, large = family(rng, intents=1, each=20), family(rng, intents=1, each=60)
    vectors = np.concatenate([small, large])
    signals = signals_of([f"s{at}" for at in range(20)], weight=2.0) + signals_of([f"l{at}" for at in range(60)])
    scores = np.repeat([0.9, 0.6], [20, 60])
    first, second = find_gaps(signals, vectors, scores, ordinary=directions(rng, 80))
    assert (first.prompts[0][0], second.prompts[0][0]) == ("l", "s")
    assert [first.lift, second.lift] == pytest.approx([0.6, 0.9])
    assert second.traffic == 2 * second.size
    assert first.base == "tiny"
    rows = [int(prompt[1:]) for prompt in second.prompts]
    mean = small[rows].mean(axis=0) / np.linalg.norm(small[rows].mean(axis=0))
    assert second.centroid == pytest.approx(mean, abs=1e-5)
    assert second.cohesion == pytest.approx(float((small[rows] @ mean).mean()), abs=1e-5)
    assert worth(second, cost_microusd=500) == pytest.approx(0.9 * second.traffic / 500)
    assert worth(second, cost_microusd=0) == pytest.approx(0.9 * second.traffic)


def test_of_too_many_prompts_the_most_dissonant_are_looked_at() -> None:
    rng = np.random.default_rng(7)
    vectors = np.concatenate([family(rng, intents=1, each=30), family(rng, intents=1, each=30)])
    signals = signals_of([f"w{at}" for at in range(60)])
    scores = np.repeat([0.5, 0.9], [30, 30])
    [gap] = find_gaps(signals, vectors, scores, ordinary=directions(rng, 80), clustering=Clustering(most_prompts=30))
    assert {int(prompt[1:]) >= 30 for prompt in gap.prompts} == {True}


def cover(name: str | None, *, virtual: bool = False, accepted: bool = True) -> Cover:
    return Cover(accepted=accepted, name=name, digest=f"blake3:{name}", virtual=virtual)


def test_a_gap_that_cards_here_accept_is_none() -> None:
    found = coverage([cover("dates")] * 5 + [cover("sums")] + [cover("dates", accepted=False)] * 4)
    assert (found.verdict, found.here, found.card) == ("covered", 0.6, "dates")
    assert found.why == "60% of its prompts are accepted by cards here, most by dates"


def test_a_peers_card_is_fetched_before_anything_is_trained() -> None:
    found = coverage([cover("dates", virtual=True)] * 4 + [cover("sums")] * 2 + [cover(None, accepted=False)] * 4)
    assert (found.verdict, found.elsewhere, found.peer_digest) == ("fetch", 0.4, "blake3:dates")
    assert found.why.startswith("fetch dates first")


def test_what_nobody_accepts_is_a_gap() -> None:
    found = coverage([cover("dates")] * 2 + [cover("sums", virtual=True)] * 2 + [cover(None, accepted=False)] * 6)
    assert (found.verdict, found.why) == ("gap", "no card accepts 60% of its prompts")
    assert coverage([]).verdict == "gap"
