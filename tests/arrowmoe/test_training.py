"""The training process: models by a job's words, vectors as the engine encodes them, and kill -9 in its middle."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from arrowmoe.base_model import load_base_model
from arrowmoe.encoding import encode_batch
from arrowmoe.errors import ModelLoadError
from arrowmoe.training import embedder, train_from_file
from evolution.errors import TrainingError
from evolution.executors import LocalProcess
from evolution.training_job import Distillation, ModelSpec, Step, TrainingJob, Validation
from registry.card import LoRACard
from tests.evolution.jobs import EXAMPLES, LABELLED, data, job, tuning


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """A job sets the threads of its process, which here is the tests'."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def causal(model: Path, directory: Path, output: str = "out", **changes: object) -> TrainingJob:
    return job(directory, output, base=ModelSpec(model=str(model), name="maker/tiny", device="cpu"), **changes)


def test_a_causal_job_ends_as_a_card_of_the_logical_base(tiny_models: tuple[Path, Path], tmp_path: Path) -> None:
    teacher = ModelSpec(model=str(tiny_models[0]), name="maker/teacher", device="cpu")
    ranks = {"model.layers.0.mlp.up_proj": 2, "model.layers.1.mlp.up_proj": 4}
    made = causal(
        tiny_models[0],
        tmp_path,
        tuning=tuning(rank=4, alpha=6, targets=tuple(ranks)),
        rank_pattern=ranks,
        distillation=Distillation(teacher=teacher),
    )
    made.save(tmp_path / "job.json")
    trained = train_from_file(tmp_path / "job.json")
    card = LoRACard.from_peft(trained.adapter_dir)
    assert (card.manifest.base.name, trained.steps) == ("maker/tiny", 12)
    assert {module: card.manifest.adapter.rank_of(module) for module in card.manifest.adapter.target_modules} == ranks
    assert {card.manifest.adapter.scaling_of(module) for module in ranks} == {1.5}
    assert str(tmp_path) not in json.dumps(card.manifest.model_dump(mode="json"))


def test_an_encoder_job_trains_too(tiny_models: tuple[Path, Path], tmp_path: Path) -> None:
    made = job(
        tmp_path,
        base=ModelSpec(model=str(tiny_models[1]), name="maker/encoder", device="cpu"),
        objective="contrastive",
        data_url=data(tmp_path, "labels", LABELLED),
        tuning=tuning(targets=("query", "value", "dense"), batch_size=12, steps=30, learning_rate=5e-3),
    )
    made.save(tmp_path / "job.json")
    trained = train_from_file(tmp_path / "job.json")
    assert trained.losses_nats[-1] < 0.9 * trained.losses_nats[0]
    assert LoRACard.from_peft(trained.adapter_dir).manifest.base.name == "maker/encoder"


def test_vectors_are_those_of_the_engine(tiny_models: tuple[Path, Path]) -> None:
    base = load_base_model(tiny_models[1], device="cpu")
    texts = ["w3 w4 w5", "w6", " ".join(["w7"] * 90)]
    assert np.allclose(embedder(base)(texts).numpy(), encode_batch(base, texts), atol=1e-6)


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    causal(tmp_path / "no-model", tmp_path).save(tmp_path / "job.json")
    with pytest.raises(ModelLoadError, match="no-model"):
        train_from_file(tmp_path / "job.json")
    with pytest.raises(TrainingError, match=r"exit code 1.*ModelLoadError.*no-model"):
        LocalProcess().run(tmp_path / "job.json", on_progress=lambda step: None)


@pytest.mark.e2e
def test_a_training_killed_in_its_middle_goes_on_to_the_same_end(
    tiny_models: tuple[Path, Path], tmp_path: Path
) -> None:
    def spec(output: str) -> Path:
        made = causal(
            tiny_models[0],
            tmp_path,
            output,
            tuning=tuning(steps=300),
            validation=Validation(data_url=data(tmp_path, "held-out", EXAMPLES[:3]), patience=99),
            threads=1,
        )
        made.save(tmp_path / f"{output}.json")
        return tmp_path / f"{output}.json"

    def kill(step: Step) -> None:
        if step.step >= 60:
            for child in psutil.Process().children():
                child.kill()

    with pytest.raises(TrainingError, match="signal SIGKILL"):
        LocalProcess().run(spec("killed"), on_progress=kill)
    assert not (tmp_path / "killed" / "trained.json").exists()
    seen: list[Step] = []
    resumed = LocalProcess().run(spec("killed"), on_progress=seen.append)
    whole = train_from_file(spec("whole"))
    assert seen[0].step > 50
    assert resumed.losses_nats == whole.losses_nats
    assert resumed.best_validation_nats == whole.best_validation_nats
    name = "adapter_model.safetensors"
    assert (resumed.adapter_dir / name).read_bytes() == (whole.adapter_dir / name).read_bytes()
