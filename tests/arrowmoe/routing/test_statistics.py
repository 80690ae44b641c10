"""A card's statistics: means of enough prompts, the best sketch of its rank, in 64 KiB at most, and through a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arrowmoe.errors import RoutingError
from arrowmoe.features import Vectors
from arrowmoe.routing.densities import Array
from arrowmoe.routing.statistics import MOST_PROMPTS, CardStatistics, calibrated, summarise
from registry.format import LoRAFormat
from registry.manifest import CALIBRATION, COUNTS, MAX_STATISTICS_BYTES, PROTOTYPES, SKETCH, RoutingSpec
from registry.tensor import Role, Tensor
from tests.arrowmoe.routing.synthetic import EMBEDDER, PROBE_DIGEST, centres, prompts, unit
from tests.registry.cards import small_card

HALF = 1e-3
"""What float16 may take from a value of at most 1."""


def summary(vectors: Vectors, labels: list[str] | None = None, **options: object) -> CardStatistics:
    return summarise(vectors, embedder=EMBEDDER, probe=PROBE_DIGEST, labels=labels, **options)  # type: ignore[arg-type]


def scatter(vectors: Vectors, labels: list[str]) -> Array:
    """Covariance of the prompts around the mean of their label, by loops."""
    rows, total = vectors.astype(np.float64), np.zeros((vectors.shape[1], vectors.shape[1]))
    for label in set(labels):
        own = rows[[index for index, other in enumerate(labels) if other == label]]
        for row in own:
            total += np.outer(row - own.mean(axis=0), row - own.mean(axis=0))
    return total / len(rows)


def test_each_label_gives_the_mean_and_number_of_its_prompts() -> None:
    random = np.random.default_rng(0)
    vectors, labels = prompts(random, centres(random, 4, 12), 40)
    found = summary(vectors, labels)
    expected = [vectors[[label == str(index) for label in labels]].mean(axis=0) for index in range(4)]
    assert found.prototypes == pytest.approx(np.array(expected), abs=HALF)
    assert found.counts.tolist() == [40] * 4
    assert (found.count, found.dimension, found.embedder, found.probe) == (160, 12, EMBEDDER, PROBE_DIGEST)
    assert found.mean == pytest.approx(vectors.mean(axis=0), abs=HALF)
    apart = np.array(expected) - vectors.mean(axis=0)
    assert found.between().T @ found.between() == pytest.approx(apart.T @ apart / 4, abs=HALF)
    assert found.sketch.T @ found.sketch == pytest.approx(scatter(vectors, labels), abs=HALF)


@pytest.mark.parametrize("rank", [0, 1, 3, 7])
def test_the_sketch_is_the_best_of_its_rank(rank: int) -> None:
    random = np.random.default_rng(rank)
    vectors, labels = prompts(random, centres(random, 2, 10), 60)
    found = summary(vectors, labels, budget_bytes=2 * (20 + 4) + rank * 20)
    whole = scatter(vectors, labels)
    left = np.sort(np.linalg.svd(whole, compute_uv=False))[: 10 - rank]
    assert found.sketch.shape == (rank, 10)
    assert np.linalg.norm(whole - found.sketch.T @ found.sketch) == pytest.approx(np.linalg.norm(left), rel=HALF)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 1 << 16),
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=12),
    min_prompts=st.integers(1, 7),
    labelled=st.booleans(),
)
def test_no_prototype_is_of_fewer_prompts_than_the_owner_wants(
    seed: int, sizes: list[int], min_prompts: int, labelled: bool
) -> None:
    vectors = unit(np.random.default_rng(seed).standard_normal((sum(sizes), 5)))
    labels = [str(index) for index, size in enumerate(sizes) for _ in range(size)] if labelled else None
    if len(vectors) < min_prompts:
        with pytest.raises(RoutingError, match="expected room for 0 prototypes"):
            summary(vectors, labels, min_prompts=min_prompts)
        return
    found = summary(vectors, labels, min_prompts=min_prompts)
    assert found.counts.min() >= min_prompts
    assert found.counts.sum() == len(vectors)
    assert found.counts @ found.prototypes == pytest.approx(vectors.sum(axis=0), abs=HALF * len(vectors))


def test_a_label_of_too_few_prompts_joins_the_nearest() -> None:
    places = np.array([[1, 0, 0]] * 5 + [[0, 1, 0]] * 5 + [[0, 0.5, 1]], dtype=np.float64)
    found = summary(unit(places), ["a"] * 5 + ["b"] * 5 + ["few"], min_prompts=2)
    assert sorted(found.counts) == [5, 6]
    assert found.prototypes[found.counts.argmin()] == pytest.approx([1, 0, 0], abs=HALF)


def test_prompts_without_a_label_are_a_group_of_their_own() -> None:
    vectors = unit(np.eye(2)[[0] * 4 + [1] * 3].astype(np.float64))
    found = summarise(vectors, embedder=EMBEDDER, probe=PROBE_DIGEST, labels=["a"] * 4 + [None] * 3)
    assert sorted(found.counts) == [3, 4]


@pytest.mark.parametrize(("planted", "each"), [(4, 15), (20, 225)])
def test_without_labels_the_clusters_are_found(planted: int, each: int) -> None:
    random = np.random.default_rng(5)
    vectors, labels = prompts(random, centres(random, planted, 16), each, spread=0.02)
    order = random.permutation(len(vectors))
    found = summary(vectors[order])
    means = np.stack([vectors[np.array(labels) == str(index)].mean(axis=0) for index in range(planted)])
    distances = np.linalg.norm(found.prototypes[:, None] - means, axis=2)
    assert sorted(distances.argmin(axis=1)) == list(range(planted))
    assert distances.min(axis=1).max() < 2 * HALF
    assert found.counts.tolist() == [each] * planted


def test_an_owner_may_let_single_examples_be_prototypes() -> None:
    vectors = unit(np.random.default_rng(0).standard_normal((20, 6)))
    found = summary(vectors, min_prompts=1)
    assert found.prototypes == pytest.approx(vectors, abs=HALF)
    assert found.counts.tolist() == [1] * 20
    assert found.sketch.shape == (0, 6)


def test_public_texts_are_prototypes_of_their_own_beside_private_means() -> None:
    random = np.random.default_rng(0)
    vectors, labels = prompts(random, centres(random, 2, 6), 40)
    public = unit(random.standard_normal((3, 6)))
    found = summary(vectors, labels, public=public, min_prompts=4)
    assert found.prototypes[2:] == pytest.approx(public, abs=HALF)
    assert found.counts.tolist() == [40, 40, 1, 1, 1]
    # The scatter adds up over cards by prompts, public ones too.
    assert 83 * found.sketch.T @ found.sketch == pytest.approx(80 * scatter(vectors, labels), abs=83 * HALF)
    only = summary(vectors[:0], public=public)
    assert (only.counts.tolist(), len(only.sketch)) == ([1, 1, 1], 0)


@pytest.mark.parametrize("budget", [MAX_STATISTICS_BYTES, 16 << 10, 4 << 10])
@pytest.mark.parametrize("values", [0, 256])
def test_the_budget_is_kept_and_used(budget: int, values: int) -> None:
    random = np.random.default_rng(0)
    vectors, labels = prompts(random, centres(random, 3, 128), 100)
    public = unit(random.standard_normal((4, 128)))
    found = summary(vectors, labels, public=public, budget_bytes=budget, calibration_values=values)
    found = calibrated(found, random.standard_normal(1000), values) if values else found
    of_prompts = (300 - 3) // 9
    fullest = min(of_prompts, (budget - 7 * (256 + 4) - 4 * values) // 256)
    assert found.nbytes == 7 * (256 + 4) + 256 * fullest + 4 * values <= budget
    assert found.put_into(small_card()).manifest.routing == found.spec()


@pytest.mark.parametrize(("each", "rank"), [(3, 0), (10, 1), (64, 7)])
def test_a_sketch_has_one_direction_for_nine_prompts_where_prototypes_are_means_of_three(each: int, rank: int) -> None:
    """With more, prototype and sketch together would give each of the prompts back."""
    random = np.random.default_rng(0)
    vectors, labels = prompts(random, centres(random, 1, 40), each)
    assert len(summary(vectors, labels, min_prompts=3).sketch) == rank


def test_prototypes_that_do_not_fit_the_budget_are_refused() -> None:
    random = np.random.default_rng(0)
    vectors, labels = prompts(random, centres(random, 10, 8), 3)
    summary(vectors, labels, budget_bytes=10 * 20)
    with pytest.raises(RoutingError, match=r"room for 10 prototypes \(200 bytes\) in 199 bytes"):
        summary(vectors, labels, budget_bytes=199)


def test_calibration_keeps_few_fits_and_quantiles_of_many() -> None:
    random = np.random.default_rng(0)
    vectors, labels = prompts(random, centres(random, 2, 4), 5)
    few = calibrated(summary(vectors, labels), np.array([3.0, -1.0, 2.0]), 8)
    assert (few.calibration.tolist(), few.calibrated) == ([-1, 2, 3], 3)
    many = calibrated(summary(vectors, labels), random.permutation(np.arange(1001.0)), 11)
    step = 500 / 16  # a sixteenth of the distance between the quartiles
    assert many.calibration == pytest.approx(np.arange(0, 1001, 100), abs=step / 2)
    assert many.calibration % step == pytest.approx(0)
    assert many.calibrated == 1001


def whole() -> CardStatistics:
    random = np.random.default_rng(0)
    vectors, labels = prompts(random, centres(random, 3, 8), 6)
    return calibrated(summary(vectors, labels, check=(0.25, -0.5)), random.standard_normal(40), 16)


@pytest.mark.parametrize("found", [whole(), summary(unit(np.eye(4)), min_prompts=1)], ids=["whole", "bare"])
def test_statistics_travel_inside_a_card(tmp_path: Path, found: CardStatistics) -> None:
    LoRAFormat.save(found.put_into(small_card()), tmp_path / "card.lora.arrow")
    card = LoRAFormat.load(tmp_path / "card.lora.arrow")
    assert card.manifest.routing is not None
    loaded = CardStatistics.of(card.manifest.routing, card.statistics)
    for name in ("prototypes", "counts", "sketch", "calibration"):
        assert np.array_equal(getattr(loaded, name), getattr(found, name)), name
    for name in ("embedder", "probe", "check", "calibrated", "min_prompts"):
        assert getattr(loaded, name) == getattr(found, name), name


def received(spec: Mapping[str, int], arrays: Mapping[str, Array]) -> CardStatistics:
    """As `whole`, with what a peer put in place of some of it; the card itself is sound."""
    good = whole()
    values = {tensor.name: tensor.float32().astype(np.float64) for tensor in good.tensors()} | dict(arrays)
    tensors = [
        Tensor.from_numpy(name, Role.STATS, array.astype(np.float16 if name in (PROTOTYPES, SKETCH) else np.float32))
        for name, array in values.items()
    ]
    card = small_card().with_routing(RoutingSpec(**good.spec().model_dump() | dict(spec)), tensors)
    assert card.manifest.routing is not None
    return CardStatistics.of(card.manifest.routing, card.statistics)


@pytest.mark.parametrize(
    ("spec", "arrays", "message"),
    [
        ({}, {COUNTS: np.array([6.0, 0.0, 12.0])}, "counts of at least 3, or 1 for a public text, got 0"),
        ({}, {COUNTS: np.array([-6.0, 12.0, 12.0])}, "counts of at least 3, .* got -6"),
        ({}, {COUNTS: np.array([2.0, 8.0, 8.0])}, "counts of at least 3, .* got 2"),
        ({"min_prompts": 7}, {}, "counts of at least 7, .* got 6"),
        ({"count": 19}, {}, "counts of 19 prompts together, got 18"),
        ({"count": MOST_PROMPTS}, {COUNTS: np.full(3, MOST_PROMPTS / 2)}, "at most 1000000 prompts, got 1.5e"),
        ({"count": 1 << 40}, {COUNTS: np.full(3, 3e38)}, "at most 1000000 prompts, got 9e"),
        ({}, {PROTOTYPES: np.full((3, 8), 1e4)}, "prototypes of length 1 at most, got 2.83e"),
        ({}, {SKETCH: np.full((1, 8), 6e4)}, "a second moment of 1 at most"),
        ({}, {PROTOTYPES: np.eye(3, 8)}, "a second moment of 1 at most"),
        ({}, {CALIBRATION: np.array([1.0, 3.0, 2.0])}, "ascending calibration values"),
        ({"calibration": 15}, {}, "calibration values of 16 prompts, got 15"),
    ],
)
def test_statistics_that_no_prompts_can_have_are_refused(
    spec: Mapping[str, int], arrays: Mapping[str, Array], message: str
) -> None:
    received({}, {})
    with pytest.raises(RoutingError, match=message):
        received(spec, arrays)


def test_the_most_prompts_are_taken() -> None:
    assert received({"count": MOST_PROMPTS}, {COUNTS: np.array([6.0, 6.0, MOST_PROMPTS - 12])}).count == MOST_PROMPTS


def test_vectors_that_nobody_scaled_are_refused() -> None:
    with pytest.raises(RoutingError, match="prototypes of length 1 at most"):
        summary(3 * unit(np.ones((5, 4))))


def test_rounding_is_what_a_card_keeps() -> None:
    fine = replace(whole(), calibration=np.array([1 / 3]), calibrated=1)
    assert fine.rounded().calibration.tolist() == [float(np.float32(1 / 3))]
    assert np.array_equal(fine.rounded().rounded().prototypes, fine.rounded().prototypes)
