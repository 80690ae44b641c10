"""The expert trainer: one step is the plain formula, a resumed run is the uninterrupted one, the best look is kept."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from evolution import trainer
from evolution.checkpoint import CHECKPOINT
from evolution.errors import TrainingError
from evolution.fine_tuning import fine_tune
from evolution.protocols import Example
from evolution.supervised import Answers
from evolution.trainer import ExpertTrainer
from evolution.training_data import Pair
from evolution.training_job import (
    PROGRESS,
    Distillation,
    ModelSpec,
    OnStep,
    Replay,
    Step,
    Trained,
    TrainingJob,
    Validation,
)
from tests.arrowmoe.tiny import tokenizer
from tests.evolution.jobs import EXAMPLES, TEXTS, data, job, tuning
from tests.peft_models import adapted_model, load_peft, tiny_gpt2, tiny_llama

OTHERS = [Example(prompt=f"w41 w{index}", answer="w9") for index in range(3, 9)]
TEACHER = ModelSpec(model="large", name="maker/large")


class Killed(Exception):
    """Stands for kill -9."""


def run(made: TrainingJob, on_step: OnStep | None = None, **given: Any) -> Trained:
    return ExpertTrainer(made, tiny_llama(), tokenizer(), **given).run(on_step)


def kill_at(step: int) -> OnStep:
    def on_step(taken: Step) -> None:
        if taken.step == step:
            raise Killed

    return on_step


def adapter(trained: Trained) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(trained.adapter_dir / "adapter_model.safetensors")
    return tensors


def everything(directory: Path, output: str = "out", **changes: Any) -> TrainingJob:
    held_out = data(directory, "held-out", EXAMPLES[:3])
    texts = data(directory, "texts", TEXTS)
    fields = {
        "replay": Replay(data_url=texts, share=0.5, kl_weight=0.3),
        "validation": Validation(data_url=held_out, every_steps=3),
        "distillation": Distillation(teacher=TEACHER, weight=0.2),
        "checkpoint_every_steps": 5,
    }
    return job(directory, output, **fields | changes)


def test_without_extras_it_is_the_plain_fine_tuning(tmp_path: Path) -> None:
    trained = run(job(tmp_path))
    pairs = [Pair(prompt=[{"role": "user", "content": row.prompt}], answer=row.answer) for row in EXAMPLES]
    plain = fine_tune(tiny_llama(), tokenizer(), pairs, tuning(), base_name="maker/tiny", directory=tmp_path / "plain")
    assert trained.losses_nats == tuple(plain)
    expected = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in adapter(trained).items())
    assert (trained.steps, trained.stopped_why, trained.best_validation_nats) == (12, "steps", None)


def test_it_learns_and_the_adapter_knows_it(tmp_path: Path) -> None:
    trained = run(job(tmp_path, tuning=tuning(rank=8, steps=60, batch_size=8)))
    adapted = load_peft(tiny_llama(), trained.adapter_dir)
    for row in EXAMPLES:
        ids = tokenizer()(row.prompt, return_tensors="pt")["input_ids"]
        assert tokenizer().decode(adapted(input_ids=ids).logits[0, -1].argmax()) == row.answer


@pytest.mark.parametrize("killed_at", [3, 7, 10])
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(tmp_path: Path, killed_at: int) -> None:
    teacher = tiny_llama(seed=1)
    whole = run(everything(tmp_path, "whole"), teacher=teacher)
    with pytest.raises(Killed):
        run(everything(tmp_path, "killed"), kill_at(killed_at), teacher=teacher)
    torch.manual_seed(99)
    seen: list[Step] = []
    resumed = run(everything(tmp_path, "killed"), seen.append, teacher=teacher)
    assert seen[0].step == (killed_at - 1) // 5 * 5 + 1
    assert resumed.losses_nats == whole.losses_nats
    assert resumed.best_validation_nats == whole.best_validation_nats
    assert all(torch.equal(tensor, adapter(whole)[name]) for name, tensor in adapter(resumed).items())


def test_dropout_goes_on_where_it_was(tmp_path: Path) -> None:
    def losses(output: str, on_step: OnStep | None = None) -> tuple[float, ...]:
        model, made = tiny_gpt2(), job(tmp_path, output, tuning=targets, checkpoint_every_steps=4)
        return ExpertTrainer(made, model, tokenizer()).run(on_step).losses_nats

    targets = tuning(targets=("c_attn", "c_fc"))
    assert tiny_gpt2().config.resid_pdrop > 0
    whole = losses("whole")
    with pytest.raises(Killed):
        losses("killed", kill_at(6))
    assert losses("killed") == whole


def test_a_finished_job_is_not_trained_again_and_another_does_not_take_its_place(tmp_path: Path) -> None:
    first = run(job(tmp_path))
    seen: list[Step] = []
    assert run(job(tmp_path), seen.append) == first
    assert seen == []
    with pytest.raises(TrainingError, match="of another job"):
        run(job(tmp_path, tuning=tuning(seed=5)))


def test_a_checkpoint_of_another_job_is_refused(tmp_path: Path) -> None:
    named = {"targets": ("up_proj",)}
    with pytest.raises(Killed):
        run(job(tmp_path, tuning=tuning(**named), checkpoint_every_steps=2), kill_at(4))
    with pytest.raises(TrainingError, match=r"checkpoint.*another job"):
        run(job(tmp_path, tuning=tuning(seed=5, **named), checkpoint_every_steps=2))


def test_a_damaged_checkpoint_says_so(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / CHECKPOINT).write_bytes(b"no tensors")
    with pytest.raises(TrainingError, match="is damaged"):
        run(job(tmp_path))


@pytest.mark.parametrize("accumulate", [2, 3, 9])
def test_a_batch_in_parts_is_the_same_step(tmp_path: Path, accumulate: int) -> None:
    rows = [Example(prompt=f"w{n}", answer=" ".join(f"w{n + k}" for k in range(1 + n % 4))) for n in range(3, 15)]
    extras = {
        "data_url": data(tmp_path, "rows", rows),
        "replay": Replay(data_url=data(tmp_path, "texts", TEXTS), share=0.5, kl_weight=0.5),
    }
    whole, parts = run(job(tmp_path, **extras)), run(job(tmp_path, "parts", accumulate=accumulate, **extras))
    assert parts.losses_nats == pytest.approx(whole.losses_nats, rel=1e-4)


def test_the_loss_is_the_sum_of_its_formulas(tmp_path: Path) -> None:
    made = everything(tmp_path, tuning=tuning(batch_size=12, steps=1))
    made = made.model_copy(update={"replay": made.replay.model_copy(update={"share": 10 / 12, "loss_weight": 0.7})})
    adapted, bare, teacher = adapted_model(tiny_llama(), seed=1), tiny_llama(), tiny_llama(seed=1)
    losses = list(Answers(made, adapted, tokenizer(), teacher=teacher).losses(0))
    own, distilled = formulas(adapted, teacher, EXAMPLES)
    replayed, drift = formulas(adapted, bare, TEXTS)
    assert sum(part.item() for part, _ in losses) == pytest.approx(
        own + 0.2 * distilled + 0.7 * replayed + 0.3 * drift, rel=1e-4
    )
    assert sum(reported for _, reported in losses) == pytest.approx(own, rel=1e-4)


@torch.no_grad()
def formulas(model: Any, reference: Any, examples: list[Example]) -> tuple[float, float]:
    """Mean −log P and mean KL(reference ‖ model) over the tokens of the answers, one row at a time."""
    nats, kl = [], []
    for row in examples:
        prompt = tokenizer()(row.prompt)["input_ids"]
        ids = prompt + tokenizer()(row.answer)["input_ids"] + ([1] if row.prompt else [])
        mine, theirs = (m(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1) for m in (model, reference))
        for at in range(max(len(prompt), 1), len(ids)):
            nats.append(-float(mine[at - 1, ids[at]]))
            kl.append(float((theirs[at - 1].exp() * (theirs[at - 1] - mine[at - 1])).sum()))
    return sum(nats) / len(nats), sum(kl) / len(kl)


def test_replay_holds_the_base_where_plain_training_forgets(tmp_path: Path) -> None:
    def drift(output: str, **changes: Any) -> float:
        trained = run(job(tmp_path, output, tuning=tuning(steps=40), **changes))
        return formulas(load_peft(tiny_llama(), trained.adapter_dir), tiny_llama(), TEXTS)[1]

    texts = data(tmp_path, "texts", TEXTS)
    held = drift("held", replay=Replay(data_url=texts, share=1.0, loss_weight=0, kl_weight=1.0))
    assert held < 0.3 * drift("plain")


def test_it_stops_when_validation_no_longer_falls_and_keeps_the_best(tmp_path: Path) -> None:
    validation = Validation(data_url=data(tmp_path, "others", OTHERS), every_steps=2, patience=2)
    seen: list[Step] = []
    trained = run(job(tmp_path, tuning=tuning(steps=60), validation=validation), seen.append)
    looks = {step.step: step.loss_nats for step in seen if step.phase == "validate"}
    best = min(looks, key=lambda step: looks[step])
    assert trained.stopped_why == "patience"
    assert trained.steps == best + 4 == max(looks) < 60
    assert trained.best_validation_nats == looks[best]
    kept = formulas(load_peft(tiny_llama(), trained.adapter_dir), tiny_llama(), OTHERS)[0]
    assert kept == pytest.approx(looks[best], rel=0.05)  # bf16
    assert abs(kept - looks[max(looks)]) > abs(kept - looks[best])


def test_the_last_step_is_looked_at_too(tmp_path: Path) -> None:
    validation = Validation(data_url=data(tmp_path, "held-out", EXAMPLES[:3]), every_steps=5, patience=9)
    seen: list[Step] = []
    run(job(tmp_path, validation=validation), seen.append)
    assert [step.step for step in seen if step.phase == "validate"] == [5, 10, 12]


def test_progress_is_written_as_it_happens(tmp_path: Path) -> None:
    seen: list[Step] = []
    run(job(tmp_path), seen.append)
    lines = [json.loads(line) for line in (tmp_path / "out" / PROGRESS).read_text().splitlines()]
    assert [Step(**line) for line in lines] == seen
    assert lines[0].keys() == {"phase", "step", "steps", "loss_nats"}
    assert [line["step"] for line in lines] == list(range(1, 13))


def test_the_model_is_left_as_it_was_even_after_an_error(tmp_path: Path) -> None:
    model, before = tiny_llama(), tiny_llama().state_dict()
    with pytest.raises(Killed):
        ExpertTrainer(job(tmp_path), model, tokenizer()).run(kill_at(3))
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert not model.training


def test_ranks_may_differ_at_one_scale(tmp_path: Path) -> None:
    pattern = {"model.layers.0.mlp.up_proj": 2, "model.layers.1.self_attn.q_proj": 8}
    trained = run(job(tmp_path, rank_pattern=pattern, tuning=tuning(steps=2, alpha=6)))
    adapted = load_peft(tiny_llama(), trained.adapter_dir).get_base_model()
    for name, rank in (pattern | {"model.layers.1.mlp.up_proj": 4}).items():
        layer = adapted.get_submodule(name)
        assert (layer.r["default"], layer.scaling["default"]) == (rank, 1.5)


def test_bf16_computes_in_bf16_and_keeps_fp32_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes: set[torch.dtype] = set()
    save = trainer.save_bf16

    def watched(adapted: Any, directory: Path) -> None:
        dtypes.update(weight.dtype for weight in adapted.parameters() if weight.requires_grad)
        save(adapted, directory)

    monkeypatch.setattr(trainer, "save_bf16", watched)
    half = run(job(tmp_path, precision="bfloat16"))
    full = run(job(tmp_path, "full"))
    assert dtypes == {torch.float32}
    assert half.losses_nats != full.losses_nats
    assert half.losses_nats == pytest.approx(full.losses_nats, rel=0.1)


def test_a_loss_that_is_no_number_ends_the_training(tmp_path: Path) -> None:
    model = tiny_llama()
    model.lm_head.weight.data[5] = torch.nan
    with pytest.raises(TrainingError, match="finite loss, got nan at step 1"):
        ExpertTrainer(job(tmp_path), model, tokenizer()).run()


@pytest.mark.parametrize("given", [{}, {"teacher": "small"}])
def test_a_teacher_must_speak_the_same_tokens(tmp_path: Path, given: Mapping[str, Any]) -> None:
    teacher = tiny_llama() if given else None
    if teacher is not None:
        teacher.resize_token_embeddings(32)
    with pytest.raises(TrainingError, match="vocabulary of 64"):
        run(everything(tmp_path), teacher=teacher)
