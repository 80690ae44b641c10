"""Where a job adapts: probed once, kept in plan.json, read again by whoever goes on, and trained as it says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from evolution import planning
from evolution.errors import TrainingError
from evolution.planning import planned
from evolution.target_plan import PLAN, read_plan
from evolution.trainer import ExpertTrainer
from evolution.training_job import OnStep, Probe, Replay, Step, Trained, TrainingJob
from evolution.weight_probe import WeightMapProbe, hot_zones
from tests.arrowmoe.tiny import tokenizer
from tests.evolution.jobs import EXAMPLES, LABELLED, TEXTS, data, job, tuning
from tests.peft_models import load_peft, tiny_gpt2, tiny_llama

MLP_PARAMETERS = 2 * 3 * (16 + 32) * 4
"""Two blocks of three matrices of 16 × 32, at rank 4."""


class Killed(Exception):
    """Stands for kill -9."""


def probed(directory: Path, output: str = "out", **changes: Any) -> TrainingJob:
    fields = {
        "tuning": tuning(targets="mlp", alpha=6),
        "replay": Replay(data_url=data(directory, "texts", TEXTS)),
        "probe": Probe(examples=6),
        "checkpoint_every_steps": 3,
    }
    return job(directory, output, **fields | changes)


def run(made: TrainingJob, on_step: OnStep | None = None) -> Trained:
    return ExpertTrainer(made, tiny_llama(), tokenizer()).run(on_step)


def kill(step: Step) -> None:
    if step.step == 5:
        raise Killed


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("probed again")


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_the_hot_layers_are_trained_for_what_the_mlps_would_cost(
    tmp_path: Path, build: Callable[[], PreTrainedModel]
) -> None:
    made = probed(tmp_path, probe=Probe(examples=99, share=0.4))
    trained = ExpertTrainer(made, build(), tokenizer()).run()
    plan = read_plan(made.output, made.fingerprint())
    assert plan is not None
    zones = WeightMapProbe(build(), tokenizer(), seed=made.tuning.seed).zones(EXAMPLES, TEXTS)
    assert (plan.name, plan.ranks.keys()) == ("hot", {zone.module for zone in hot_zones(zones, 0.4)})
    mlp = MLP_PARAMETERS if build is tiny_llama else 2 * 2 * (16 + 64) * 4
    dearest = max(sum(zone.shape) for zone in zones)
    assert mlp - dearest < plan.parameters <= mlp
    adapted = load_peft(build(), trained.adapter_dir).get_base_model()
    layers = {name: module for name, module in adapted.named_modules() if hasattr(module, "lora_A")}
    assert {name: layer.r["default"] for name, layer in layers.items()} == plan.ranks
    assert {layer.scaling["default"] for layer in layers.values()} == {1.5}


def test_a_budget_is_a_multiple_and_layers_are_kept_to(tmp_path: Path) -> None:
    made = probed(tmp_path, tuning=tuning(targets="mlp", layers=(1, 2)), probe=Probe(budget=0.5, share=1.0))
    run(made)
    plan = read_plan(made.output, made.fingerprint())
    assert plan is not None
    assert {name.split(".")[2] for name in plan.ranks} == {"1"}
    assert MLP_PARAMETERS / 4 - 48 < plan.parameters <= MLP_PARAMETERS / 4


def test_a_resumed_training_reads_its_plan_and_ends_as_the_uninterrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(probed(tmp_path, "whole"))
    with pytest.raises(Killed):
        run(probed(tmp_path, "killed"), kill)
    monkeypatch.setattr(planning, "WeightMapProbe", never)
    torch.manual_seed(99)
    resumed = run(probed(tmp_path, "killed"))
    assert resumed.losses_nats == whole.losses_nats
    ours, theirs = (load_file(one.adapter_dir / "adapter_model.safetensors") for one in (resumed, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_checkpoint_of_another_plan_is_refused(tmp_path: Path) -> None:
    made = probed(tmp_path)
    with pytest.raises(Killed):
        run(made, kill)
    said = json.loads((made.output / PLAN).read_text())
    (made.output / PLAN).write_text(json.dumps(said | {"parameters": 1}))
    with pytest.raises(TrainingError, match=r"of the plan in plan\.json, got one of another"):
        run(made)


def test_a_plan_of_another_job_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(probed(tmp_path), kill)
    with pytest.raises(TrainingError, match=r"plan\.json of this job"):
        run(probed(tmp_path, probe=Probe(examples=5)))
    for damaged in ("{", "[]", '{"job": ""}'):
        (tmp_path / "out" / PLAN).write_text(damaged)
        with pytest.raises(TrainingError, match=r"plan\.json is damaged"):
            run(probed(tmp_path))


def test_layers_by_name_have_a_plan_too_and_named_modules_none(tmp_path: Path) -> None:
    ranks = {"model.layers.0.mlp.up_proj": 2}
    made = job(tmp_path, tuning=tuning(targets="mlp"), rank_pattern=ranks)
    made.output.mkdir()
    plan = planned(made, tiny_llama(), tokenizer(), made.fingerprint())
    assert plan is not None
    assert (plan.name, len(plan.ranks), plan.parameters) == ("mlp", 6, MLP_PARAMETERS - 2 * 48)
    assert plan.rank_pattern(made.tuning) == ranks
    assert read_plan(made.output, made.fingerprint()) == plan
    odd = job(tmp_path, "odd", tuning=tuning(targets="mlp"), rank_pattern={"lm_head": 2})
    with pytest.raises(TrainingError, match="lm_head"):
        planned(odd, tiny_llama(), tokenizer(), odd.fingerprint())
    named = job(tmp_path, "named", tuning=tuning(targets=("up_proj",)))
    assert planned(named, tiny_llama(), tokenizer(), named.fingerprint()) is None


def test_a_probe_needs_what_it_weighs(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="needs replay"):
        probed(tmp_path, replay=None)
    with pytest.raises(ValidationError, match="finds modules and ranks itself"):
        probed(tmp_path, tuning=tuning(targets=("up_proj",)))
    with pytest.raises(ValidationError, match="finds modules and ranks itself"):
        probed(tmp_path, rank_pattern={"model.layers.0.mlp.up_proj": 2})
    labels = data(tmp_path, "labels", LABELLED)
    with pytest.raises(ValidationError, match=r"takes no \['probe'\]"):
        probed(tmp_path, objective="contrastive", data_url=labels, replay=None)


def test_a_probe_survives_its_file(tmp_path: Path) -> None:
    made = probed(tmp_path, probe=Probe(share=0.3, budget=2, examples=7))
    made.save(tmp_path / "job.json")
    assert TrainingJob.load(tmp_path / "job.json") == made
    assert made.fingerprint() != probed(tmp_path).fingerprint()
