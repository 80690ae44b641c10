"""Task after task: it learns, goes on bit for bit, does not grow, and rolls back what would cost too much."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from evolution import nested_trainer
from evolution.continual_measures import measures
from evolution.errors import TrainingError
from evolution.nested_experiment import ConsolidationSpec, NestedExperiment, ReplaySpec
from evolution.nested_loss import Lesson, Replayed, TaskLoss
from evolution.nested_model import opened
from evolution.nested_state import STATE, WEIGHTS, NestedState, read_state
from evolution.nested_trainer import NestedTrainer, OnTaskStep
from evolution.training_job import PROGRESS, Step
from tests.arrowmoe.tiny import tokenizer
from tests.evolution.nested_experiments import TUNING, image_experiment, text_experiment
from tests.evolution.nested_models import tiny_vit
from tests.peft_models import tiny_llama

SHORT = replace(TUNING, steps=12)
MODELS: dict[str, Callable[[], PreTrainedModel]] = {"image": tiny_vit, "text": tiny_llama}
EXPERIMENTS = {"image": image_experiment, "text": text_experiment}
both = pytest.mark.parametrize("kind", ["image", "text"])


class Killed(Exception):
    """Stands for kill -9."""


def run(made: NestedExperiment, on_step: OnTaskStep | None = None) -> NestedState:
    return NestedTrainer(made, MODELS[made.kind](), tokenizer()).run(on_step)


def weights(made: NestedExperiment) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_file(made.output / WEIGHTS)
    return tensors


def same(one: NestedExperiment, other: NestedExperiment) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def told_alike(one: NestedState, other: NestedState) -> bool:
    """All but how long it took."""
    first, second = (
        replace(state, tasks=tuple(replace(task, seconds=0.0) for task in state.tasks)) for state in (one, other)
    )
    return first == second


@both
def test_two_tasks_are_learnt(tmp_path: Path, kind: str) -> None:
    made = EXPERIMENTS[kind](tmp_path)
    seen: list[tuple[str, Step]] = []
    state = run(made, lambda name, step: seen.append((name, step)))
    for task in state.tasks:
        losses = task.losses_nats
        assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    assert state.told[0][0] > 0.8
    assert [len(row) for row in state.untold] == [len(row) for row in state.told] == [1, 2]
    assert [name for name, step in seen if step.step == 1] == [task.name for task in made.tasks]
    assert read_state(made.output) == state
    said = json.loads((made.output / STATE).read_text())
    assert said["measures"]["untold"]["forgetting"] == measures(state.untold).forgetting


def test_the_head_grows_and_old_rows_stay_bit_for_bit_without_replay(tmp_path: Path) -> None:
    made = image_experiment(tmp_path, tuning=SHORT, replay=None)
    first = run(made.model_copy(update={"tasks": made.tasks[:1]}))
    head = {name: tensor for name, tensor in weights(made).items() if name.startswith("head/")}
    assert first.classes == ((0, 1),)
    state = run(made)
    after = weights(made)
    assert state.classes == ((0, 1), (2, 3))
    assert all(torch.equal(tensor, after[name]) for name, tensor in head.items())
    assert after["head/parts.1.weight"].shape == (2, 16)


def test_old_rows_are_trained_where_they_are_replayed(tmp_path: Path) -> None:
    made = image_experiment(tmp_path, tuning=SHORT)
    run(made.model_copy(update={"tasks": made.tasks[:1]}))
    before = weights(made)["head/parts.0.weight"]
    run(made)
    assert not torch.equal(weights(made)["head/parts.0.weight"], before)


@pytest.mark.parametrize(("kind", "task", "step"), [("image", 0, 9), ("image", 1, 12), ("text", 1, 10)])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, kind: str, task: int, step: int) -> None:
    made = EXPERIMENTS[kind](tmp_path, "whole", tuning=SHORT)
    killed = made.model_copy(update={"output_url": (tmp_path / "killed").as_uri()})
    whole = run(made)

    def kill(name: str, taken: Step) -> None:
        if (name, taken.step) == (made.tasks[task].name, step):
            raise Killed

    with pytest.raises(Killed):
        run(killed, kill)
    torch.manual_seed(99)
    steps: list[int] = []
    state = run(killed, lambda _, taken: steps.append(taken.step))
    assert steps[0] == 8
    assert told_alike(state, whole)
    assert same(made, killed)
    assert not list(killed.output.rglob("checkpoint*"))


@pytest.mark.parametrize("where", ["settle", "TaskReport", "forget"])
def test_a_run_killed_at_the_end_of_a_task_goes_on_bit_for_bit(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = text_experiment(tmp_path, "whole", tuning=SHORT)
    killed = made.model_copy(update={"output_url": (tmp_path / "killed").as_uri()})
    whole = run(made)

    def kill(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(nested_trainer, where, kill)
        with pytest.raises(Killed):
            run(killed)
    assert told_alike(run(killed), whole)
    assert same(made, killed)


def test_memory_does_not_grow_with_tasks(tmp_path: Path) -> None:
    state = run(text_experiment(tmp_path, tasks=4, tuning=SHORT))
    assert len({task.parameters for task in state.tasks[1:]}) == 1
    assert len(state.replay) == 24
    assert {item.task for item in state.replay} == {0, 1, 2, 3}
    assert state.held == (None,)


def test_without_consolidation_each_task_keeps_a_pair_that_is_its_own(tmp_path: Path) -> None:
    made = text_experiment(tmp_path, tuning=SHORT, consolidation=None, trains="fast", replay=None)
    run(made.model_copy(update={"tasks": made.tasks[:1]}))
    first = weights(made)
    state = run(made)
    after = weights(made)
    assert state.held == (0, 1)
    assert all(torch.equal(tensor, after[name]) for name, tensor in first.items())
    assert all(not tensor.any() for name, tensor in after.items() if name.startswith("slow/") and name.endswith(".b"))
    # With its task named nothing of the other is used.
    assert state.told[1][0] == state.told[0][0]


def test_what_a_task_has_kept_for_itself_is_consolidated_later(tmp_path: Path) -> None:
    made = text_experiment(tmp_path, tuning=SHORT, consolidation=None, trains="fast", replay=None)
    run(made)
    before = told_without_tasks(made)
    trainer = NestedTrainer(made, tiny_llama(), tokenizer())
    settled = trainer.consolidate("words-0", ConsolidationSpec())
    assert settled.kept
    assert read_state(made.output).held == (None, 1)
    torch.testing.assert_close(told_without_tasks(made), before, rtol=0, atol=1e-5)
    for task in ("words-0", "words-9"):
        with pytest.raises(TrainingError, match="expected a task"):
            trainer.consolidate(task, ConsolidationSpec())


def test_a_task_under_way_begins_anew_on_a_consolidation(tmp_path: Path) -> None:
    def kill(name: str, taken: Step) -> None:
        if (name, taken.step) == ("words-1", 10):
            raise Killed

    made = text_experiment(tmp_path, tuning=SHORT, consolidation=None, replay=None)
    with pytest.raises(Killed):
        run(made, kill)
    NestedTrainer(made, tiny_llama(), tokenizer()).consolidate("words-0", ConsolidationSpec())
    steps: list[int] = []
    state = run(made, lambda _, taken: steps.append(taken.step))
    assert steps[0] == 1
    assert state.held == (1,)


def test_a_damaged_state_says_so(tmp_path: Path) -> None:
    made = text_experiment(tmp_path)
    made.output.mkdir()
    save_file({"slow/x.a": torch.zeros(1)}, made.output / WEIGHTS, metadata={"notes": "{}"})
    with pytest.raises(TrainingError, match="is damaged"):
        run(made)


def told_without_tasks(made: NestedExperiment) -> Tensor:
    with opened(made, tiny_llama(), tokenizer()) as learnt:
        return torch.cat(learnt.logits(learnt.subject.read(made.tasks[1].test_url)))


def test_one_lora_for_all_tasks_leaves_the_fast_pair_empty(tmp_path: Path) -> None:
    made = text_experiment(tmp_path, tuning=SHORT, consolidation=None, trains="slow", replay=None)
    state = run(made)
    assert state.held == (None,)
    assert all(
        bool(tensor.any()) == name.startswith("slow/") for name, tensor in weights(made).items() if name[-1] == "b"
    )


def test_a_consolidation_that_costs_too_much_is_rolled_back(tmp_path: Path) -> None:
    forgetful = ConsolidationSpec(slow=0.0, fast=0.0, tolerance=0.1)
    state = run(text_experiment(tmp_path, consolidation=forgetful))
    first = state.tasks[0].consolidation
    assert first is not None
    assert first.right_before is not None
    assert first.right_after is not None
    assert not first.kept
    assert first.right_before - first.right_after > 0.1
    assert state.held[0] == 0
    assert state.told[0][0] == first.right_before
    kept = run(text_experiment(tmp_path, "kept", consolidation=forgetful.model_copy(update={"tolerance": None})))
    assert kept.tasks[0].consolidation is not None
    assert kept.tasks[0].consolidation.kept
    assert kept.told[0][0] < 0.5


@both
def test_the_model_is_left_as_it_was_even_after_an_error(tmp_path: Path, kind: str) -> None:
    model, before = MODELS[kind](), MODELS[kind]().state_dict()
    trained = [weight.requires_grad for weight in model.parameters()]
    made = EXPERIMENTS[kind](tmp_path, tuning=SHORT)

    def kill(name: str, taken: Step) -> None:
        if taken.step == 3:
            raise Killed

    with pytest.raises(Killed):
        NestedTrainer(made, model, tokenizer()).run(kill)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert [weight.requires_grad for weight in model.parameters()] == trained
    assert not model.training


def test_what_was_learnt_can_be_asked_again(tmp_path: Path) -> None:
    made = image_experiment(tmp_path, tuning=SHORT)
    state = run(made)
    with opened(made, tiny_vit()) as learnt:
        rows = learnt.subject.read(made.tasks[0].test_url)
        assert learnt.right(rows, 0) == (state.untold[1][0], state.told[1][0])


def test_a_finished_experiment_is_not_trained_again_and_tasks_may_be_added(tmp_path: Path) -> None:
    made = text_experiment(tmp_path, tasks=3, tuning=SHORT)
    two = made.model_copy(update={"tasks": made.tasks[:2]})
    first = run(two)
    names: set[str] = set()
    assert run(two, lambda name, _: names.add(name)) == first
    assert names == set()
    state = run(made, lambda name, _: names.add(name))
    assert names == {"words-2"}
    assert state.tasks[:2] == first.tasks
    assert (made.output / "tasks" / "002" / PROGRESS).exists()


def test_another_experiment_or_other_data_does_not_take_its_place(tmp_path: Path) -> None:
    made = text_experiment(tmp_path, tuning=SHORT)
    run(made)
    with pytest.raises(TrainingError, match="other settings"):
        run(made.model_copy(update={"combine": "mean"}))
    with pytest.raises(TrainingError, match="tasks that were learnt already"):
        run(made.model_copy(update={"tasks": made.tasks[::-1]}))
    (tmp_path / "words-0.jsonl").write_text('{"prompt": "w3", "answer": "w4"}\n')
    with pytest.raises(TrainingError, match="tasks that were learnt already"):
        run(made)


def test_what_cannot_be_learnt_says_so(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="a tokenizer"):
        NestedTrainer(text_experiment(tmp_path), tiny_llama()).run()
    with pytest.raises(TrainingError, match="a linear classifier"):
        NestedTrainer(image_experiment(tmp_path), tiny_llama()).run()
    twice = image_experiment(tmp_path, "twice", tuning=replace(SHORT, steps=1))
    again = twice.tasks[0].model_copy(update={"name": "again"})
    with pytest.raises(TrainingError, match="with new classes"):
        run(twice.model_copy(update={"tasks": (twice.tasks[0], again)}))


def test_a_tasks_pair_spans_what_the_slow_one_does_not(tmp_path: Path) -> None:
    """Else both together would have the rank of one."""
    made = text_experiment(tmp_path)
    with opened(made, tiny_llama(), tokenizer()) as learnt:
        learnt.take_pair(0, made.tuning.seed)
        for layer in learnt.nested.layers.values():
            both = torch.cat([layer.slow.a, layer.fast[0].a]).detach()
            assert torch.linalg.matrix_rank(both) == len(both)


def test_the_loss_is_the_sum_of_its_formulas(tmp_path: Path) -> None:
    made = text_experiment(tmp_path, replay=ReplaySpec(items=8, share=1.0, loss_weight=0.7, distil_weight=0.3))
    assert made.replay is not None
    with opened(made, tiny_llama(), tokenizer()) as learnt:
        own, old = (learnt.subject.read(task.data_url) for task in made.tasks)
        before = learnt.logits(old)
        learnt.take_pair(0, 0)
        for layer in learnt.nested.layers.values():
            torch.nn.init.normal_(layer.fast[0].b, std=0.3)
        replayed = Replayed(spec=made.replay, rows=old, pairs=[0] * 8, before=before)
        lesson = Lesson(rows=own, held_out=own, pair=0, among=None, replay=replayed)
        loss = TaskLoss(lesson, learnt.subject, learnt.nested, replace(TUNING, batch_size=8))
        parts = list(loss.losses(0))
        with learnt.nested.using(0):
            own_nats, old_nats = (one_by_one(learnt.nested.model, rows) for rows in (own, old))
            kl = divergence_one_by_one(tiny_llama(), learnt.nested.model, old)
        assert loss.validation_nats() == pytest.approx(own_nats, rel=1e-4)
    assert parts[0][1] == pytest.approx(own_nats, rel=1e-4)
    assert parts[1][1] == 0.0
    assert sum(part.item() for part, _ in parts) == pytest.approx(own_nats + 0.7 * old_nats + 0.3 * kl, rel=1e-4)


@torch.no_grad()
def one_by_one(model: Any, rows: list[Any]) -> float:
    nats = []
    for prompt, answer in rows:
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        nats += functional.cross_entropy(logits, torch.tensor(answer), reduction="none").tolist()
    return sum(nats) / len(nats)


@torch.no_grad()
def divergence_one_by_one(reference: Any, model: Any, rows: list[Any]) -> float:
    found = []
    for prompt, answer in rows:
        ids = torch.tensor([prompt + answer])
        theirs, mine = (
            one(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for one in (reference, model)
        )
        found += (theirs.exp() * (theirs - mine)).sum(-1).tolist()
    return sum(found) / len(found)
