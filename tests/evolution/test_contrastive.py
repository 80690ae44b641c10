"""Training encoders: the loss is equation 2 of Khosla et al., labels come together, and a resumed run is the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from evolution.contrastive import supervised_contrast
from evolution.errors import TrainingError
from evolution.protocols import Example
from evolution.trainer import ExpertTrainer
from evolution.training_job import ModelSpec, Step, TrainingJob, Validation
from tests.arrowmoe.tiny import tokenizer
from tests.evolution.jobs import LABELLED, data, job, tuning
from tests.peft_models import load_peft, tiny_bert

HELD_OUT = [Example(prompt=f"w{index} w{50 + index % 3}", answer=f"label {index % 3}") for index in range(27, 45)]


def mean_pooled(model: torch.nn.Module, texts: Sequence[str]) -> Tensor:
    batch = tokenizer()(list(texts), padding=True, return_tensors="pt")
    mask = batch["attention_mask"].unsqueeze(-1)
    states = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    return torch.nn.functional.normalize((states * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)


def contrast_job(directory: Path, output: str = "out", **changes: object) -> TrainingJob:
    shape = tuning(targets=("query", "value", "dense"), batch_size=12, steps=20)
    fields = {"objective": "contrastive", "data_url": data(directory, "labels", LABELLED), "tuning": shape}
    return job(directory, output, base=ModelSpec(model="tiny", name="maker/encoder"), **fields | changes)


def run(made: TrainingJob, on_step: object = None) -> tuple[float, ...]:
    model = tiny_bert()
    trainer = ExpertTrainer(made, model, tokenizer(), embed=lambda texts: mean_pooled(model, texts))
    return trainer.run(on_step).losses_nats  # type: ignore[arg-type]


def test_the_loss_is_the_papers_equation_over_the_rows_that_have_a_positive() -> None:
    vectors = torch.nn.functional.normalize(torch.randn((6, 5), generator=torch.Generator().manual_seed(1)), dim=-1)
    labels = [0, 0, 1, 1, 1, 2]
    rows = []
    for row, label in enumerate(labels):
        others = [other for other in range(6) if other != row]
        total = sum(math.exp(float(vectors[row] @ vectors[other]) / 0.1) for other in others)
        shares = [
            math.log(math.exp(float(vectors[row] @ vectors[other]) / 0.1) / total)
            for other in others
            if labels[other] == label
        ]
        rows += [-sum(shares) / len(shares)] if shares else []
    assert len(rows) == 5
    assert float(supervised_contrast(vectors, torch.tensor(labels))) == pytest.approx(sum(rows) / 5, rel=1e-5)


def test_texts_of_one_label_come_together(tmp_path: Path) -> None:
    made = contrast_job(
        tmp_path, tuning=tuning(targets=("query", "value", "dense"), batch_size=12, steps=60, learning_rate=5e-3)
    )
    run(made)
    adapted = load_peft(tiny_bert(), made.output / "adapter")
    labels = torch.tensor([int(row.answer[-1]) for row in LABELLED])
    texts = [row.prompt for row in LABELLED]
    with torch.no_grad():
        before, after = (
            float(supervised_contrast(mean_pooled(model, texts), labels)) for model in (tiny_bert(), adapted)
        )
    least = math.log(7)  # eight texts of a label in one place, the others far away
    assert after - least < 0.3 * (before - least)


def test_a_resumed_run_is_the_uninterrupted_one_with_dropout_and_validation(tmp_path: Path) -> None:
    def made(output: str) -> TrainingJob:
        validation = Validation(data_url=data(tmp_path, "held-out", HELD_OUT), every_steps=4, patience=9)
        return contrast_job(tmp_path, output, validation=validation, checkpoint_every_steps=3)

    def killed(step: Step) -> None:
        if step.step == 8:
            raise KeyboardInterrupt

    assert tiny_bert().config.hidden_dropout_prob > 0
    whole = run(made("whole"))
    with pytest.raises(KeyboardInterrupt):
        run(made("killed"), killed)
    assert run(made("killed")) == whole


def test_labels_more_than_a_batch_holds_take_turns(tmp_path: Path) -> None:
    many = [Example(prompt=f"w{index}", answer=f"label {index // 2}") for index in range(3, 43)]
    made = contrast_job(tmp_path, data_url=data(tmp_path, "many", many), tuning=tuning(targets=("query",)))
    assert all(math.isfinite(loss) for loss in run(made))


@pytest.mark.parametrize(
    "examples", [LABELLED[::3], [Example(prompt=f"w{n}", answer=f"label {n}") for n in range(3, 9)]]
)
def test_labels_with_nothing_to_compare_are_refused(tmp_path: Path, examples: list[Example]) -> None:
    with pytest.raises(TrainingError, match="nothing to attract or to repel"):
        run(contrast_job(tmp_path, data_url=data(tmp_path, "unfit", examples)))


def test_an_encoder_must_be_told_how_to_embed(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="a way to embed"):
        ExpertTrainer(contrast_job(tmp_path), tiny_bert(), tokenizer()).run()
