"""Fine-tuning: the loss is the plain formula on the answer, only the adapter moves, what is written is portable."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from evolution.errors import TrainingError
from evolution.fine_tuning import FineTuning, Optimiser, Pair, answer_loss, attach, fine_tune, train
from tests.arrowmoe.tiny import tokenizer
from tests.peft_models import load_peft, tiny_gpt2, tiny_llama

END = 1
PAIRS = [Pair(prompt=f"w40 w{index}", answer=f"w{index + 20}") for index in range(3, 11)]
TUNING = FineTuning(rank=8, steps=60, learning_rate=2e-2)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_the_loss_is_the_mean_over_answer_tokens_and_no_other(build: Callable[[], PreTrainedModel]) -> None:
    model = build()
    rows = [([5, 6, 7], [8, END]), ([9], [10, 11, 12, END]), ([13, 14], [END])]
    total, count = 0.0, 0
    for prompt, answer in rows:
        log_probs = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(dim=-1)
        for at, token in enumerate(answer):
            total -= float(log_probs[len(prompt) - 1 + at, token])
            count += 1
    assert float(answer_loss(model, rows)) == pytest.approx(total / count, rel=1e-5)


def test_it_learns_what_it_is_shown_and_the_written_adapter_knows_it(tmp_path: Path) -> None:
    model = tiny_llama()
    losses_nats = fine_tune(model, tokenizer(), PAIRS, TUNING, base_name="tiny", directory=tmp_path)
    assert len(losses_nats) == TUNING.steps
    assert losses_nats[-1] < 0.3 * losses_nats[0]
    adapted = load_peft(tiny_llama(), tmp_path)
    for pair in PAIRS:
        ids = tokenizer()(pair.prompt, return_tensors="pt")["input_ids"]
        assert tokenizer().decode(adapted(input_ids=ids).logits[0, -1].argmax()) == pair.answer


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model, before = tiny_llama(), tiny_llama().state_dict()
    fine_tune(model, tokenizer(), PAIRS, TUNING, base_name="tiny", directory=tmp_path)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(weight.requires_grad for weight in model.parameters())


def test_a_bf16_base_trains_an_fp32_adapter() -> None:
    adapted = attach(tiny_llama().to(torch.bfloat16), TUNING, base_name="tiny")
    train(adapted, tokenizer(), PAIRS, FineTuning(rank=4, steps=2))
    trained = [weight for weight in adapted.parameters() if weight.requires_grad]
    assert {weight.dtype for weight in trained} == {torch.float32}
    assert adapted.get_base_model().lm_head.weight.dtype == torch.bfloat16


def test_what_is_written_is_bf16_of_the_layers_asked_for_and_names_its_logical_base(tmp_path: Path) -> None:
    tuning = FineTuning(rank=2, steps=1, targets=("v_proj", "q_proj"), layers=(1, 2))
    fine_tune(tiny_llama(), tokenizer(), PAIRS, tuning, base_name="maker/tiny", directory=tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    assert all(".layers.1.self_attn." in name for name in saved)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["base_model_name_or_path"], config["target_modules"]) == ("maker/tiny", ["q_proj", "v_proj"])


def test_the_seed_decides_the_adapter(tmp_path: Path) -> None:
    def adapter(name: str, seed: int) -> bytes:
        tuning = FineTuning(rank=2, steps=3, batch_size=2, seed=seed)
        fine_tune(tiny_llama(), tokenizer(), PAIRS, tuning, base_name="tiny", directory=tmp_path / name)
        return (tmp_path / name / "adapter_model.safetensors").read_bytes()

    assert adapter("one", 0) == adapter("again", 0) != adapter("other", 1)


def test_messages_are_written_by_the_chat_template(tmp_path: Path) -> None:
    said = [Pair(prompt=[{"role": "user", "content": pair.prompt}], answer=pair.answer) for pair in PAIRS]
    tuning = FineTuning(rank=2, steps=2)  # the tiny template writes a message's words and nothing else
    plain = fine_tune(tiny_llama(), tokenizer(), PAIRS, tuning, base_name="tiny", directory=tmp_path / "plain")
    assert fine_tune(tiny_llama(), tokenizer(), said, tuning, base_name="tiny", directory=tmp_path / "said") == plain


def test_the_rate_rises_linearly_then_falls_to_nothing_and_gradients_are_clipped() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    model = torch.nn.ParameterList([weight])
    tuning = FineTuning(steps=8, warmup_steps=4, learning_rate=0.1)
    optimiser, moves = Optimiser(model, tuning), []
    for _ in range(tuning.steps):
        before = weight.item()
        optimiser.step(1000 * weight.sum())
        moves.append(before - weight.item())
    # With a constant gradient a step of Adam is the learning rate.
    expected = [0.1 * factor for factor in (1 / 4, 2 / 4, 3 / 4, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8)]
    assert moves == pytest.approx(expected, rel=1e-4)
    assert weight.grad is None


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="at least one pair"):
        fine_tune(tiny_llama(), tokenizer(), [], TUNING, base_name="tiny", directory=tmp_path)
    with pytest.raises(TrainingError, match="'warmup_steps': 0"):
        FineTuning(warmup_steps=0)
