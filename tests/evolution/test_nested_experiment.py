"""Experiment files: what they say, from where paths are seen, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from evolution.errors import TrainingError
from evolution.nested_experiment import ConsolidationSpec, NestedExperiment, ReplaySpec

FILE = """
base: {model: ./vit, name: maker/vit}
kind: image
output_url: runs/digits
tasks:
  - {name: zero-one, data_url: 01.npz, test_url: "file:///data/01.npz"}
  - name: two-three
    data_url: 23.npz
    test_url: 23-test.npz
    validation: {data_url: 23-val.npz, every_steps: 5}
tuning: {rank: 8, steps: 60}
consolidation: {rank: 16}
replay: {items: 40}
"""


def written(directory: Path, text: str = FILE) -> Path:
    path = directory / "experiment.yaml"
    path.write_text(text)
    return path


def test_a_file_says_it_all_and_paths_are_seen_from_it(tmp_path: Path) -> None:
    made = NestedExperiment.load(written(tmp_path))
    assert made.output == tmp_path / "runs" / "digits"
    assert [task.name for task in made.tasks] == ["zero-one", "two-three"]
    assert made.tasks[0].data_url == (tmp_path / "01.npz").as_uri()
    assert made.tasks[0].test_url == "file:///data/01.npz"
    assert made.tasks[1].validation is not None
    assert made.tasks[1].validation.data_url == (tmp_path / "23-val.npz").as_uri()
    assert (made.tuning.rank, made.tuning.steps) == (8, 60)
    assert made.consolidation == ConsolidationSpec(rank=16)
    assert made.replay == ReplaySpec(items=40, choose="nll", share=0.5)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("kind: image", "kind: sound"),
        ("replay: {items: 40}", "replay: {item: 40}"),
        ("tuning: {rank: 8, steps: 60}", "tuning: {rnk: 8}"),
        ("two-three", "zero-one"),
        ("two-three", "../two"),
        ("kind: image", "kind: image\ntrains: slow"),
        ("kind: image", "kind: [image"),
        ("kind: image", "kind: !!python/object/apply:os.getcwd []"),
    ],
)
def test_what_is_no_experiment_is_refused(tmp_path: Path, old: str, new: str) -> None:
    assert old in FILE
    with pytest.raises(TrainingError, match=r"an experiment in experiment\.yaml"):
        NestedExperiment.load(written(tmp_path, FILE.replace(old, new)))


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"nothing\.yaml"):
        NestedExperiment.load(tmp_path / "nothing.yaml")


def test_settings_have_a_fingerprint_and_tasks_one_of_their_own(tmp_path: Path) -> None:
    def made(old: str = "", new: str = "") -> NestedExperiment:
        return NestedExperiment.load(written(tmp_path, FILE.replace(old, new)))

    for name in ("01", "23", "23-test", "23-val"):
        (tmp_path / f"{name}.npz").write_bytes(name.encode())
    assert made().fingerprint() == made("runs/digits", "elsewhere").fingerprint()
    assert made().fingerprint() != made("rank: 16", "rank: 12").fingerprint()
    before = made().tasks[1].digest()
    assert before == made("items: 40", "items: 9").tasks[1].digest()
    assert before != made("every_steps: 5", "every_steps: 6").tasks[1].digest()
    (tmp_path / "23.npz").write_bytes(b"other")
    assert before != made().tasks[1].digest()


def test_reading_files_and_states_needs_no_torch() -> None:
    code = "import sys, evolution.nested_experiment, evolution.nested_state; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
