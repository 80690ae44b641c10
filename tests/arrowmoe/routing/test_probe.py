"""The probe: measured once, kept, measured again where what was kept is damaged or another model's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from arrowmoe.features import Features
from arrowmoe.routing.probe import CHECKED, Probe, measured, sentences
from tests.arrowmoe.routing.synthetic import unit


class Fake:
    """A featurizer that remembers how many texts it was given; `weights` are the model's, the name stays."""

    embedder = "fake"

    def __init__(self, weights: int = 0, dimension: int = 24) -> None:
        self.seen = 0
        self._weights, self._dimension = weights, dimension

    def features(self, texts: Sequence[str]) -> Features:
        self.seen += len(texts)
        rows = [
            np.random.default_rng([self._weights, *text.encode()]).standard_normal(self._dimension) + 0.5
            for text in texts
        ]
        return Features(texts=tuple(texts), vectors=unit(np.array(rows)), embedder=self.embedder)


def same(first: Probe, second: Probe) -> bool:
    return np.array_equal(first.mean, second.mean) and np.array_equal(first.covariance, second.covariance)


def test_the_sentences_are_many_and_each_is_one() -> None:
    found = sentences()
    assert len(found) >= 500
    assert len(set(found)) == len(found)
    assert all(text.strip() == text != "" for text in found)


def test_the_probe_is_mean_and_covariance_of_the_sentences() -> None:
    found, rows = measured(Fake()), Fake().features(sentences()).vectors.astype(np.float64)
    expected = sum(np.outer(row - rows.mean(axis=0), row - rows.mean(axis=0)) for row in rows) / len(rows)
    assert found.mean == pytest.approx(rows.mean(axis=0))
    assert found.covariance == pytest.approx(expected)
    assert found.embedder == "fake"
    half, covariance = found.half(0.25), found.covariance / 2 + 0.25 * np.eye(24)
    assert half.whiten(covariance) @ half.whiten(np.eye(24)).T == pytest.approx(np.eye(24))


def test_a_kept_probe_is_not_embedded_again(tmp_path: Path) -> None:
    first, featurizer = measured(Fake(), tmp_path), Fake()
    second = measured(featurizer, tmp_path)
    assert same(first, second)
    assert featurizer.seen < 10
    assert not list(tmp_path.rglob("*.partial*"))


@pytest.mark.parametrize("damage", ["empty", "short", "text", "shape", "pickle"])
def test_a_damaged_cache_is_measured_anew_and_mended(tmp_path: Path, damage: str) -> None:
    expected = measured(Fake(), tmp_path)
    (path,) = tmp_path.rglob("*.npy")
    whole = path.read_bytes()
    if damage == "shape":
        np.save(path, np.zeros((3, 24)))
    elif damage == "pickle":
        np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    else:
        path.write_bytes({"empty": b"", "short": whole[:-100], "text": b"not an array"}[damage])
    assert same(measured(Fake(), tmp_path), expected)
    assert path.read_bytes() == whole


def test_other_weights_of_the_same_name_do_not_get_what_was_kept(tmp_path: Path) -> None:
    measured(Fake(weights=1), tmp_path)
    assert same(measured(Fake(weights=2), tmp_path), measured(Fake(weights=2)))
    assert same(measured(Fake(weights=2, dimension=12), tmp_path), measured(Fake(weights=2, dimension=12)))


def test_the_mark_of_a_space_survives_rounding_and_no_other_space_has_it() -> None:
    here = measured(Fake())
    assert len(here.check) == CHECKED
    assert here.is_same_space(here.check)
    assert here.is_same_space(replace(here, mean=here.mean + 3e-4).check)
    assert not here.is_same_space(measured(Fake(weights=1)).check)
    assert not here.is_same_space(replace(here, mean=here.mean * 0.9).check)
    assert not here.is_same_space(here.check[:-1])
    assert not here.is_same_space(())
