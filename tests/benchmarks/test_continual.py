"""Learning task after task: what the streams are made of, who is routed where, and what is held against what."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from benchmarks.continual import targets
from benchmarks.continual_arms import ARMS, OURS, ROUTED, SEPARATE, SEQUENTIAL, learnt, routed
from benchmarks.continual_base import Glyphs, Pretraining
from benchmarks.continual_streams import Stream, Task, digits
from evolution.nested_data import Image, images_at
from evolution.nested_experiment import NestedTask
from evolution.nested_model import NestedModel
from evolution.training_job import ModelSpec

BARELY = Pretraining(glyphs=3, steps=1, batch_size=2)
SHAPE = (1, 16, 16)


@pytest.fixture
def stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stream:
    monkeypatch.setenv("ARROWMOE_CACHE_DIR", str(tmp_path / "cache"))
    return digits(tmp_path, 0, "test", BARELY)


def test_a_glyph_is_drawn_anew_each_time_and_stays_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    glyphs = Glyphs.invented(20, generator)
    drawn = torch.stack([glyphs.drawn(torch.arange(20), generator) for _ in range(30)])
    assert drawn.shape == (30, 20, 8, 8)
    assert drawn.min() >= 0
    assert drawn.max() <= 1
    assert (drawn[0] != drawn[1]).flatten(1).any(dim=1).all()
    distances = torch.cdist(drawn[-1].flatten(1), drawn[:-1].mean(dim=0).flatten(1))
    assert (distances.argmin(dim=1) == torch.arange(20)).float().mean() > 0.6  # one in twenty by chance


def test_five_tasks_have_all_ten_digits_and_score_none_that_they_train_on(stream: Stream) -> None:
    labels = []
    for task in stream.tasks:
        train, scored = images_at(task.spec.data_url, SHAPE), images_at(task.spec.test_url, SHAPE)
        assert len({label for _, label in train}) == 2
        assert {label for _, label in train} == {label for _, label in scored}
        assert not _pixels(train) & _pixels(scored)
        assert (len(task.train), len(task.scored)) == (len(train), len(scored))
        labels += sorted({label for _, label in train})
    assert sorted(labels) == list(range(10))


def test_another_seed_is_another_order(stream: Stream, tmp_path: Path) -> None:
    names = [task.spec.name for task in stream.tasks]
    assert [task.spec.name for task in digits(tmp_path, 0, "test", BARELY).tasks] == names
    assert [task.spec.name for task in digits(tmp_path, 1, "test", BARELY).tasks] != names


def test_validation_is_not_the_test(stream: Stream, tmp_path: Path) -> None:
    validation = digits(tmp_path, 0, "val", BARELY)
    for one, other in zip(stream.tasks, validation.tasks, strict=True):
        assert one.spec.data_url == other.spec.data_url
        assert not _pixels(images_at(one.spec.test_url, SHAPE)) & _pixels(images_at(other.spec.test_url, SHAPE))


def test_every_arm_learns_the_stream(stream: Stream, tmp_path: Path) -> None:
    table = learnt(stream, 0, tmp_path / "runs", steps=1)
    assert set(table) == {*ARMS, ROUTED}
    assert table[ROUTED]["average_accuracy"] <= table[SEPARATE]["average_accuracy"]
    assert table[OURS]["adapters_growth"] == 1
    # Five fast pairs and a slow one, which were two and one after the second task.
    assert table[SEPARATE]["adapters_growth"] == 2
    assert table[OURS]["kept_items"] == 300
    assert table[SEQUENTIAL]["kept_items"] == 0


class Experts:
    """Text experts of which the first is right about half of its rows, and each is wrong about the other's."""

    subject = SimpleNamespace(read=lambda url: [url] * 4)

    def right(self, rows: Sequence[str], task: int) -> tuple[float, float]:
        return 0.0, (0.5 if task == 0 else 1.0) if rows[0] == f"test:{task}" else 0.0


def test_a_row_counts_where_the_router_sent_it() -> None:
    # Task 0 points one way and task 1 the other; a quarter of task 1's rows looks like task 0's.
    rng = np.random.default_rng(0)
    one, other = (_unit(rng.normal(mean, 0.1, (40, 4))) for mean in (1.0, -1.0))
    tasks = [_task(0, one, one[:4]), _task(1, other, np.concatenate([other[:3], one[:1]]))]
    stream = Stream(kind="text", spec=ModelSpec(model="m", name="m"), base=lambda: (None, None), tasks=tuple(tasks))
    assert routed(stream, cast("NestedModel", Experts())) == pytest.approx((0.5 + 0.75) / 2)


def test_targets_hold_ours_against_a_third_and_three_points() -> None:
    table = {
        SEQUENTIAL: {"forgetting": 30.0, "average_accuracy": 50.0},
        SEPARATE: {"forgetting": 0.0, "average_accuracy": 95.0},
        OURS: {"forgetting": 9.0, "average_accuracy": 91.0, "adapters_growth": 1.0},
    }
    assert [target.met for target in targets("digits", table)] == [True, False, True]


def _pixels(rows: Sequence[Image]) -> set[bytes]:
    return {pixels.numpy().tobytes() for pixels, _ in rows}


def _unit(x: Any) -> Any:
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def _task(number: int, train: Any, scored: Any) -> Task:
    spec = NestedTask(name=str(number), data_url=f"train:{number}", test_url=f"test:{number}")
    return Task(spec=spec, train=train, scored=scored)
