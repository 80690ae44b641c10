"""The attacks on statistics find what is planted for them; figures on real data are the benchmark's."""

from __future__ import annotations

import numpy as np
import pytest

from arrowmoe.routing.acceptance import Prompts, describe
from arrowmoe.routing.densities import Array
from arrowmoe.routing.metrics import auroc
from arrowmoe.routing.probe import Probe
from arrowmoe.routing.statistics import CardStatistics, summarise
from benchmarks.privacy import table
from benchmarks.privacy_attacks import (
    added_prompts,
    calibration_match,
    distances,
    inside_sketch,
    nearness,
    token_f1,
    unmixed,
)
from registry.digest import digest_of
from registry.manifest import MAX_STATISTICS_BYTES

D = 48
PROBE = Probe(embedder="tiny", digest=digest_of(b"probe"), mean=np.zeros(D), covariance=np.eye(D) / D)


def prompts(rows: int, seed: int) -> Array:
    """Unit vectors (rows, D) around one direction, so members and strangers are exchangeable."""
    x = np.random.default_rng(seed).normal(size=(rows, D)) / np.sqrt(D) + np.eye(D)[0]
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True))


def card_of(x: Array, *, m: int = 3, labels: list[str] | None = None) -> CardStatistics:
    return summarise(x.astype(np.float32), embedder=PROBE.embedder, probe=PROBE.digest, labels=labels, min_prompts=m)


def separation(member: Array, stranger: Array) -> float:
    value = auroc(member, stranger)
    assert value is not None
    return value


def test_distances_against_a_loop() -> None:
    x, points = prompts(4, 1), prompts(3, 2)
    expected = [[sum((a - b) ** 2 for a, b in zip(row, point, strict=True)) for point in points] for row in x]
    np.testing.assert_allclose(distances(x, points), expected, atol=1e-12)


def test_single_examples_are_known_at_once_and_one_mean_of_many_is_not() -> None:
    members, strangers = prompts(40, 1), prompts(40, 2)
    single = card_of(members, m=1, labels=[str(row) for row in range(40)])
    assert separation(nearness(single, members), nearness(single, strangers)) == 1.0
    mean = card_of(members, m=40)
    assert separation(nearness(mean, members), nearness(mean, strangers)) < 0.75


def test_a_direction_for_every_prompt_tells_members() -> None:
    members, strangers = prompts(12, 1), prompts(40, 2)
    statistics = card_of(members)
    axes = np.linalg.svd(members - members.mean(axis=0))[2][:11]
    full = CardStatistics(
        embedder=statistics.embedder,
        probe=statistics.probe,
        prototypes=members.mean(axis=0)[None],
        counts=np.array([12.0]),
        sketch=axes * 0.1,
        calibration=np.zeros(0),
    )
    np.testing.assert_allclose(inside_sketch(full, members), 0, atol=1e-12)
    assert inside_sketch(full, strangers).max() < -0.1


def test_without_a_sketch_only_nearness_is_left() -> None:
    statistics = card_of(prompts(12, 1))
    x, bare = prompts(5, 2), CardStatistics(**{**vars(statistics), "sketch": np.zeros((0, D))})
    np.testing.assert_array_equal(inside_sketch(bare, x), nearness(bare, x))


@pytest.mark.parametrize("count", [1, 3, 10])
def test_a_mean_is_unmixed_into_its_prompts_if_the_list_has_them(count: int) -> None:
    members, others = prompts(count, 1), prompts(20, 2)
    candidates = np.concatenate([others[:7], members, others[7:]])
    mean = members.mean(axis=0).astype(np.float16).astype(np.float64)
    assert sorted(unmixed(mean, count, candidates)) == list(range(7, 7 + count))


def test_the_prompt_between_two_versions_is_their_difference() -> None:
    x = prompts(31, 1)
    apart = added_prompts(card_of(x[:30]), card_of(x))
    assert np.linalg.norm(apart - x[30]) < 0.05


def test_calibration_match_is_the_distance_from_the_nearest_score() -> None:
    members, held_out = prompts(40, 1), prompts(10, 3)
    vectors = Prompts(vectors=members.astype(np.float32), held_out=held_out.astype(np.float32))
    statistics = describe(vectors, PROBE, min_prompts=3, budget_bytes=MAX_STATISTICS_BYTES)
    wide = CardStatistics(**{**vars(statistics), "calibration": np.array([-1e6, 1e6])})
    assert calibration_match(wide, PROBE, held_out).max() < -9e5
    assert len(statistics.calibration) == 10


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [("What's my balance", "what's MY rate", 2 * 2 / 6), ("a a b", "a c", 2 / 5), ("x", "y", 0.0), ("x", "x", 1.0)],
)
def test_token_f1_by_hand(one: str, other: str, expected: float) -> None:
    assert token_f1(one, other) == pytest.approx(expected)


def test_a_table_has_a_line_for_each_row() -> None:
    lines = table({"one": {"auroc": 0.5}, "two": {"auroc": 1.0}}).splitlines()
    assert [line.split() for line in lines] == [["auroc"], ["one", "0.5"], ["two", "1"]]
