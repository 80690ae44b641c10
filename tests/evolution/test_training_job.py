"""The job file: what goes in comes out, anything else is refused, and its progress can be read while it is written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from evolution.errors import TrainingError
from evolution.training_job import (
    PROGRESS,
    Distillation,
    FineTuning,
    ModelSpec,
    ProgressLog,
    ProgressTail,
    Replay,
    Step,
    TrainingJob,
    Validation,
    path_of,
)
from tests.evolution.jobs import EXAMPLES, LABELLED, TEXTS, data, job, tuning


def test_a_job_survives_its_file(tmp_path: Path) -> None:
    whole = job(
        tmp_path,
        tuning=tuning(layers=(1, 2), learning_rate=1 / 3),
        rank_pattern={"model.layers.0.mlp.up_proj": 2},
        accumulate=2,
        precision="bfloat16",
        replay=Replay(data_url=data(tmp_path, "texts", TEXTS), kl_weight=0.5),
        validation=Validation(data_url=data(tmp_path, "held-out", EXAMPLES[:2])),
        distillation=Distillation(teacher=ModelSpec(model="large", name="maker/large")),
        threads=1,
    )
    whole.save(tmp_path / "job.json")
    assert TrainingJob.load(tmp_path / "job.json") == whole
    assert json.loads((tmp_path / "job.json").read_text())["format"] == "arrowmoe.job"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("version",), 2),
        (("format",), "other"),
        (("surprise",), 1),
        (("tuning", "surprise"), 1),
        (("tuning", "rank"), 0),
        (("base", "surprise"), 1),
        (("data_url",), "/a/path"),
        (("rank_pattern",), {"up_proj": 0}),
        (("checkpoint_every_steps",), 0),
    ],
)
def test_what_a_job_cannot_say_is_refused(tmp_path: Path, path: tuple[str, ...], value: object) -> None:
    said = job(tmp_path).model_dump(mode="json")
    place = said
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (tmp_path / "job.json").write_text(json.dumps(said))
    with pytest.raises(TrainingError, match=path[-1]):
        TrainingJob.load(tmp_path / "job.json")


def test_a_file_that_is_not_there_or_no_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="expected a training job"):
        TrainingJob.load(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"format": ')
    with pytest.raises(TrainingError, match="expected a training job"):
        TrainingJob.load(tmp_path / "half.json")


def test_a_contrastive_job_takes_whole_batches_only(tmp_path: Path) -> None:
    labels = data(tmp_path, "labels", LABELLED)
    assert job(tmp_path, objective="contrastive", data_url=labels).accumulate == 1
    with pytest.raises(ValueError, match="one whole batch"):
        job(tmp_path, objective="contrastive", data_url=labels, accumulate=2)


def test_only_files_of_this_machine_have_a_path(tmp_path: Path) -> None:
    path = tmp_path / "a name with % and blanks.jsonl"
    assert path_of(path.as_uri()) == path
    for url in ("s3://bucket/data.jsonl", "file://elsewhere/data.jsonl", "file:data.jsonl", "https://host/data"):
        with pytest.raises(TrainingError, match="cannot be reached"):
            path_of(url)


def test_the_fingerprint_is_of_job_and_data_wherever_it_runs(tmp_path: Path) -> None:
    one = job(tmp_path)
    elsewhere = job(tmp_path, "there", threads=2, base=one.base.model_copy(update={"device": "cuda"}))
    assert elsewhere.fingerprint() == one.fingerprint()
    assert job(tmp_path, tuning=tuning(seed=1)).fingerprint() != one.fingerprint()
    before = one.fingerprint()
    data(tmp_path, "data", EXAMPLES[1:])
    assert one.fingerprint() != before


def test_progress_is_read_line_by_line_and_half_a_line_waits(tmp_path: Path) -> None:
    steps = [Step(phase="train", step=number, steps=3, loss_nats=1 / number) for number in (1, 2, 3)]
    log = ProgressLog(tmp_path)
    log.append(steps[0])
    tail = ProgressTail(tmp_path)
    assert list(tail.new()) == []
    log.append(steps[1])
    assert list(tail.new()) == [steps[1]]
    with (tmp_path / PROGRESS).open("a") as file:
        file.write('{"phase": "tr')
    assert list(tail.new()) == []
    ProgressLog(tmp_path).append(steps[2])  # as after kill -9 in the middle of a line
    assert list(tail.new()) == [steps[2]]


def test_jobs_are_read_without_torch() -> None:
    probe = "import sys, evolution.training_job, evolution.executors; print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "False"


def test_counts_are_at_least_one() -> None:
    with pytest.raises(TrainingError, match="'steps': 0"):
        FineTuning(steps=0)
