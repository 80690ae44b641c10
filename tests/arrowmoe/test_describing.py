"""Describing, from within: what is embedded how often, which cards are indexed, which files are read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from arrowmoe.describing import (
    EMBEDDED_AT_ONCE,
    Describer,
    RememberingFeaturizer,
    indexed,
    read_dataset,
    read_prompts,
)
from arrowmoe.errors import RoutingError
from arrowmoe.features import Features
from arrowmoe.router_view import summary
from arrowmoe.routing.dataset import RoutingDataError, RoutingExample
from arrowmoe.routing.generative import ROUTES
from arrowmoe.routing.probe import Probe
from arrowmoe.routing.statistics import CardStatistics
from registry.digest import digest_of
from registry.store import Registry
from tests.registry.cards import small_card

DIMENSION = 6


class Counting:
    """A featurizer whose vectors come from the text, and which counts what it was asked."""

    embedder = "counting"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def features(self, texts: Sequence[str]) -> Features:
        self.asked += texts
        vectors = np.stack([vector(text) for text in texts])
        return Features(texts=tuple(texts), vectors=vectors, embedder=self.embedder)


def vector(text: str) -> np.ndarray:
    values = np.random.default_rng(int(digest_of(text.encode())[-8:], 16)).normal(size=DIMENSION)
    return np.asarray(values / np.linalg.norm(values), dtype=np.float32)


def probe() -> Probe:
    return Probe(
        embedder="counting",
        digest=digest_of(b"probe"),
        mean=np.zeros(DIMENSION),
        covariance=np.eye(DIMENSION) / DIMENSION,
    )


def test_each_text_is_embedded_once_and_progress_is_told() -> None:
    inner, told = Counting(), list[tuple[str, float, float]]()
    featurizer = RememberingFeaturizer(inner, lambda *done: told.append(done))
    texts = [f"text {index}" for index in range(EMBEDDED_AT_ONCE + 10)]
    featurizer.features(texts)
    found = featurizer.features(["text 3", "new", "text 3"])
    assert sorted(inner.asked) == sorted([*texts, "new"])
    np.testing.assert_array_equal(found.vectors, np.stack([vector("text 3"), vector("new"), vector("text 3")]))
    assert (found.texts, found.embedder) == (("text 3", "new", "text 3"), "counting")
    assert [done[1:] for done in told] == [(0, 266), (256, 266), (0, 1)]


def test_a_described_card_carries_what_its_summary_says() -> None:
    prompts = [RoutingExample(text=f"prompt {index}", card="sample", label=str(index % 2)) for index in range(20)]
    held = [RoutingExample(text=f"held {index}", card="sample") for index in range(12)]
    describer = Describer(featurizer=Counting(), probe=probe(), min_prompts=4)
    plain = small_card(description="folds paper")
    card = describer.described(plain, prompts, held_out=held)
    assert (summary(plain), card.name, card.signature) == (None, "sample", None)
    spec = card.manifest.routing
    assert spec is not None
    found = CardStatistics.of(spec, card.statistics)
    assert summary(card) == {
        "embedder": "counting",
        "probe": digest_of(b"probe"),
        "prompts": 21,
        "min_prompts": 4,
        "prototypes": 3,
        "sketch_rank": len(found.sketch),
        "calibrated": 12,
        "nbytes": found.nbytes,
    }
    assert found.counts.tolist() == [10, 10, 1]
    np.testing.assert_allclose(found.prototypes[2], vector("folds paper"), atol=1e-3)


def test_a_card_of_which_nothing_is_known_cannot_be_described() -> None:
    with pytest.raises(RoutingError, match="expected room for 0 prototypes"):
        Describer(featurizer=Counting(), probe=probe()).described(small_card(), [])


def test_the_index_is_the_newest_version_of_each_card_for_the_base(home: Path) -> None:
    with Registry.open(home) as registry:
        for version in ("1", "2"):
            registry.publish(small_card("one", version=version, base_name="org/base"))
        registry.publish(small_card("one", version="3", base_name="other"))
        registry.publish(small_card("two", seed=1, base_name=None))
        registry.publish(small_card("router", seed=2, base_name="org/base", training={ROUTES: ["one"]}))
        known = {(one.entry.name, one.entry.version) for one in indexed(registry)}
        assert known == {("one", "2"), ("one", "3"), ("two", "1")}
        assert [one.entry.version for one in indexed(registry, "base")] == ["2"]
        assert all(one.statistics is None for one in indexed(registry))


def test_prompts_are_lines_or_rows(tmp_path: Path) -> None:
    lines, rows = tmp_path / "lines.txt", tmp_path / "rows.jsonl"
    lines.write_text("  first {one}\n\nsecond\n")
    assert read_prompts(lines, "a") == ([RoutingExample(text=text, card="a") for text in ("first {one}", "second")], 0)
    known = [{"text": "x", "card": "a", "label": "l"}, {"text": "y", "card": "b"}, {"text": "z", "card": None}]
    rows.write_text("\n" + "\n".join(map(json.dumps, known)))
    assert read_prompts(rows, "a") == ([RoutingExample(text="x", card="a", label="l")], 2)


def test_rows_that_name_no_card_are_of_the_one_that_is_described(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two", "card": "other"}\n{"text": "three", "card": null}\n')
    own, others = read_prompts(path, "mine")
    assert ([row.text for row in own], others) == (["one"], 2)


def test_an_empty_dataset_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(RoutingDataError, match="expected rows"):
        read_dataset(tmp_path / "empty.jsonl")
    with pytest.raises(RoutingDataError, match="can be read"):
        read_dataset(tmp_path)
