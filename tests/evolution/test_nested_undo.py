"""The last consolidation can be undone, bit for bit, for as long as nothing was learnt on top of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from evolution import nested_trainer
from evolution.errors import TrainingError
from evolution.nested_experiment import ConsolidationSpec, NestedExperiment
from evolution.nested_model import NestedModel
from evolution.nested_state import WEIGHTS, NestedState, read_state
from evolution.nested_trainer import NestedTrainer
from tests.arrowmoe.tiny import tokenizer
from tests.evolution.nested_experiments import TUNING, image_experiment, text_experiment
from tests.evolution.nested_models import tiny_vit
from tests.peft_models import tiny_llama

SHORT = replace(TUNING, steps=12)
MODELS = {"image": tiny_vit, "text": tiny_llama}
EXPERIMENTS = {"image": image_experiment, "text": text_experiment}


def trainer(made: NestedExperiment) -> NestedTrainer:
    return NestedTrainer(made, MODELS[made.kind](), tokenizer())


def pairs_of(learnt: NestedModel) -> dict[str, Tensor]:
    """Every factor by the name that it has on disk, as the layers hold it."""
    layers = learnt.nested.layers.items()
    slow = {f"slow/{path}.{factor}": getattr(layer.slow, factor) for path, layer in layers for factor in "ab"}
    fast = {
        f"fast/{number}.{path}.{factor}": getattr(pair, factor)
        for path, layer in layers
        for number, pair in enumerate(layer.fast)
        for factor in "ab"
    }
    return {name: weight.detach().clone() for name, weight in (slow | fast).items()}


@pytest.mark.parametrize("kind", ["image", "text"])
def test_an_undone_consolidation_leaves_what_was_there_before(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, settle = ConsolidationSpec(rank=8, tolerance=None), nested_trainer.settle
    made = EXPERIMENTS[kind](tmp_path, tasks=3, tuning=SHORT, consolidation=spec)
    before: list[dict[str, Tensor]] = []

    def watched(experiment: NestedExperiment, learnt: NestedModel, *rest: Any) -> Any:
        before.append(pairs_of(learnt))
        return settle(experiment, learnt, *rest)

    monkeypatch.setattr(nested_trainer, "settle", watched)
    two = made.model_copy(update={"tasks": made.tasks[:2]})
    state = trainer(two).run()
    assert state.held == (None,)
    assert trainer(two).roll_back() == made.tasks[1].name
    kept = load_file(made.output / WEIGHTS)
    assert {name for name in kept if not name.startswith("head/")} == before[1].keys()
    assert all(torch.equal(kept[name], weight) for name, weight in before[1].items())
    undone = read_state(made.output)
    assert undone.held == (1,)
    settled = [task.consolidation for task in undone.tasks]
    assert [one is not None and one.kept for one in settled] == [True, False]
    assert (undone.replay, undone.untold[0]) == (state.replay, state.untold[0])
    with pytest.raises(TrainingError, match="to roll back, got none"):
        trainer(two).roll_back()
    # It goes on from there: what the second task keeps for itself is left alone.
    third = trainer(made).run()
    assert third.held == (1, None)
    after = load_file(made.output / WEIGHTS)
    assert all(torch.equal(after[name], weight) for name, weight in before[1].items() if name.startswith("fast/0"))


def test_its_accuracies_are_asked_again(tmp_path: Path) -> None:
    forgetful = ConsolidationSpec(slow=0.0, fast=0.0, tolerance=None)
    made = text_experiment(tmp_path, tasks=1, consolidation=forgetful)
    assert trainer(made).run().told[0][0] < 0.5
    trainer(made).roll_back()
    assert read_state(made.output).told[0][0] > 0.8


def test_one_by_hand_is_undone_to_the_same_state(tmp_path: Path) -> None:
    made = text_experiment(tmp_path, tuning=SHORT, consolidation=None, trains="fast", replay=None)
    state = trainer(made).run()
    bits = (made.output / WEIGHTS).read_bytes()
    trainer(made).consolidate("words-0", ConsolidationSpec())
    assert (made.output / WEIGHTS).read_bytes() != bits
    assert trainer(made).roll_back() == "words-0"
    assert (made.output / WEIGHTS).read_bytes() == bits
    assert read_state(made.output) == state


def test_one_that_later_tasks_stand_on_is_not_undone(tmp_path: Path) -> None:
    made = text_experiment(tmp_path, tasks=3, tuning=SHORT, consolidation=None, trains="fast", replay=None)
    two = made.model_copy(update={"tasks": made.tasks[:2]})
    trainer(two).run()
    trainer(two).consolidate("words-0", ConsolidationSpec())
    state: NestedState = trainer(made).run()
    with pytest.raises(TrainingError, match="before another task"):
        trainer(made).roll_back()
    assert read_state(made.output) == state


def test_only_the_last_is_kept(tmp_path: Path) -> None:
    spec = ConsolidationSpec(tolerance=None)
    made = text_experiment(tmp_path, tasks=3, tuning=replace(TUNING, steps=2), consolidation=spec)
    trainer(made).run()
    assert [path.name for path in made.output.glob("before-*")] == ["before-002.safetensors"]


def test_where_nothing_was_consolidated_there_is_nothing_to_undo(tmp_path: Path) -> None:
    made = text_experiment(tmp_path, tasks=1, tuning=replace(TUNING, steps=2), consolidation=None, trains="fast")
    trainer(made).run()
    with pytest.raises(TrainingError, match="to roll back, got none"):
        trainer(made).roll_back()
