"""Slow and fast LoRAs: who is there, who is computed, who learns, and that nothing stays behind."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from evolution.errors import TrainingError
from evolution.nested import Combine, NestedLoRA, attach
from tests.evolution.nested_models import (
    ARCHITECTURES,
    TUNING,
    Architecture,
    everywhere,
    images,
    merged,
    move,
    tiny_vit,
)
from tests.peft_models import outputs, tiny_gpt2, tiny_llama

LLAMA, VIT = ARCHITECTURES["llama"], ARCHITECTURES["vit"]


def learns(nested: NestedLoRA) -> set[str]:
    """The parts that the last backward pass gave a gradient, by name; every weight of a part, or it is an error."""
    found: set[str] = set()
    for layer in nested.layers.values():
        pairs = {"slow": layer.slow} | {f"fast{task}": fast for task, fast in enumerate(layer.fast)}
        for name, pair in pairs.items():
            grads = [weight.grad is not None for weight in pair.parameters()]
            assert len(set(grads)) == 1
            found |= {name} if grads[0] else set()
    ours = {id(weight) for task in range(nested.tasks) for weight in nested.trainable(task)}
    others = [weight for weight in nested.model.parameters() if id(weight) not in ours]
    return found | {"base" for weight in others if weight.grad is not None}


def backward(kind: Architecture, nested: NestedLoRA, task: int | Tensor) -> None:
    nested.model.train()
    with nested.using(task):
        result = nested.model(**kind.inputs())
        result.logits.square().mean().backward()


@everywhere
def test_there_are_one_slow_and_k_fast_pairs_at_each_layer(kind: Architecture) -> None:
    nested = kind.nested(tasks=3)
    assert len(nested.layers) == kind.layers
    assert nested.tasks == 3
    for layer in nested.layers.values():
        assert [pair.rank for pair in (layer.slow, *layer.fast)] == [3, 3, 3, 3]
    pairs = [pair for layer in nested.layers.values() for pair in (layer.slow, layer.fast[1])]
    assert set(map(id, nested.trainable(1))) == {id(weight) for pair in pairs for weight in pair.parameters()}


@everywhere
@pytest.mark.parametrize("task", [0, 1])
def test_gradients_flow_to_slow_and_to_the_tasks_fast_only(kind: Architecture, task: int) -> None:
    nested = kind.nested(tasks=3)
    backward(kind, nested, task)
    assert learns(nested) == {"slow", f"fast{task}"}


@everywhere
def test_rows_of_two_tasks_teach_these_two(kind: Architecture) -> None:
    nested = kind.nested(tasks=3)
    backward(kind, nested, torch.tensor([2, 0, 2]))
    assert learns(nested) == {"slow", "fast0", "fast2"}


@everywhere
def test_a_task_computes_slow_and_its_fast(kind: Architecture) -> None:
    nested = kind.nested(tasks=3)
    expected = outputs(merged(kind.build(), nested, {1: 1.0}), kind.inputs())
    torch.testing.assert_close(kind.compute(nested, 1), expected, rtol=1e-5, atol=1e-5)


@everywhere
def test_without_a_task_all_fast_are_summed_or_averaged(kind: Architecture) -> None:
    ways: list[tuple[Combine, float]] = [("sum", 1.0), ("mean", 1 / 3)]
    for combine, weight in ways:
        nested = attach(kind.build(), TUNING, tasks=3, combine=combine)
        move(nested)
        expected = outputs(merged(kind.build(), nested, dict.fromkeys(range(3), weight)), kind.inputs())
        torch.testing.assert_close(kind.compute(nested), expected, rtol=1e-5, atol=1e-5)
        without_one = outputs(merged(kind.build(), nested, {0: weight, 1: weight}), kind.inputs())
        assert not torch.allclose(expected, without_one, atol=1e-3)


@everywhere
def test_each_row_may_have_a_task_of_its_own(kind: Architecture) -> None:
    nested = kind.nested(tasks=3)
    alone = [kind.compute(nested, task) for task in range(3)]
    mixed = kind.compute(nested, torch.tensor([2, 0, 2]))
    torch.testing.assert_close(mixed, torch.stack([alone[2][0], alone[0][1], alone[2][2]]), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(alone[0][1], alone[2][1], atol=1e-3)


@everywhere
def test_each_row_may_have_gates_of_its_own(kind: Architecture) -> None:
    nested = kind.nested(tasks=3)
    gates = torch.tensor([[0.3, 0.0, 0.7], [0.0, 0.0, 0.0], [1.0, -0.5, 2.0]])
    alone = [
        outputs(merged(kind.build(), nested, dict(enumerate(row.tolist()))), kind.inputs())[at]
        for at, row in enumerate(gates)
    ]
    torch.testing.assert_close(kind.compute(nested, gates), torch.stack(alone), rtol=1e-5, atol=1e-5)


@everywhere
def test_gates_may_learn_and_every_pair_with_them(kind: Architecture) -> None:
    """The gradient of a gate is that of a change of the gate: a central difference of the plain formula."""
    nested = kind.nested(tasks=2)
    gates = torch.tensor([[0.5, 0.2]] * 3, requires_grad=True)
    with nested.using(gates):
        logits = nested.model(**kind.inputs()).logits
    logits.double().square().mean().backward()
    assert gates.grad is not None

    def loss(first: float) -> float:
        plain = outputs(merged(kind.build(), nested, {0: first, 1: 0.2}), kind.inputs())
        return float(plain.double().square().mean())

    slope = (loss(0.5 + 1e-2) - loss(0.5 - 1e-2)) / 2e-2
    assert float(gates.grad[:, 0].sum()) == pytest.approx(slope, rel=0.1)
    for layer in nested.layers.values():
        assert all(pair.b.grad is not None and pair.b.grad.any() for pair in (layer.slow, *layer.fast))


def test_gates_of_another_shape_are_refused() -> None:
    nested = ARCHITECTURES["vit"].nested(tasks=3)
    for wrong in (torch.ones(3, 2), torch.ones(3), torch.ones(3, 3, 3)):
        with pytest.raises(TrainingError, match=r"gates \(rows, 3\)"), nested.using(wrong):
            pass
    with pytest.raises(TrainingError, match="each of 3 rows, got 2"), nested.using(torch.ones(2, 3)):
        nested.model(**images())


def test_autocast_leaves_the_pairs_in_fp32() -> None:
    """As without it, but for what bf16 does to the base; gradients are whole."""
    nested = ARCHITECTURES["vit"].nested(tasks=2)
    wide = ARCHITECTURES["vit"].compute(nested, 1)
    for task in (1, torch.tensor([1, 1, 1])):
        with nested.using(task), torch.autocast("cpu", torch.bfloat16):
            logits = nested.model(**images()).logits
        torch.testing.assert_close(logits.float(), wide, rtol=0.1, atol=0.1)
        logits.float().square().mean().backward()
        assert all(weight.grad is not None and weight.grad.dtype == torch.float32 for weight in nested.trainable(1))


@everywhere
def test_fresh_pairs_change_nothing_and_new_tasks_leave_the_old_as_they_are(kind: Architecture) -> None:
    plain = outputs(kind.build(), kind.inputs())
    nested = kind.nested(tasks=1, moved=False)
    assert torch.equal(kind.compute(nested), plain)
    move(nested)
    before = kind.compute(nested, 0)
    nested.grow(4)
    nested.grow(2)
    assert nested.tasks == 4
    assert torch.equal(kind.compute(nested, 0), before)
    backward(kind, nested, 3)
    assert learns(nested) == {"slow", "fast3"}


@everywhere
def test_detaching_gives_the_base_back_bit_for_bit(kind: Architecture) -> None:
    model = kind.build().requires_grad_(True)
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    modules = dict(model.named_modules())
    plain = outputs(model, kind.inputs())
    nested = attach(model, TUNING, tasks=2)
    move(nested)
    backward(kind, nested, 1)
    assert nested.detach() is model
    model.eval()
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(weight, weights[name]) for name, weight in model.named_parameters())
    assert weights.keys() == dict(model.named_parameters()).keys()
    assert all(weight.requires_grad for weight in model.parameters())
    assert torch.equal(outputs(model, kind.inputs()), plain)


def test_what_was_frozen_before_stays_frozen() -> None:
    model = tiny_vit()
    frozen = model.get_submodule("vit.embeddings")
    frozen.requires_grad_(False)
    attach(model, TUNING).detach()
    held = {id(weight) for weight in frozen.parameters()}
    assert all(weight.requires_grad != (id(weight) in held) for weight in model.parameters())


def test_two_tasks_are_learnt_and_the_second_moves_no_fast_of_the_first() -> None:
    nested = VIT.nested(tasks=2, moved=False)
    pixels, labels = images(16)["pixel_values"], torch.arange(16) % 2
    for task in range(2):
        first = {path: (layer.fast[0].a.clone(), layer.fast[0].b.clone()) for path, layer in nested.layers.items()}
        losses = train(nested, task, pixels + task, labels + 2 * task)
        assert losses[-1] < 0.5 * losses[0]
    for path, layer in nested.layers.items():
        assert torch.equal(layer.fast[0].a, first[path][0])
        assert torch.equal(layer.fast[0].b, first[path][1])


def train(nested: NestedLoRA, task: int, pixels: Tensor, labels: Tensor) -> list[float]:
    adamw = torch.optim.AdamW(nested.trainable(task), lr=0.02)
    losses: list[float] = []
    nested.model.train()
    for _ in range(40):
        with nested.using(task):
            loss = functional.cross_entropy(nested.model(pixel_values=pixels).logits, labels)
            torch.autograd.backward(loss)
        adamw.step()
        adamw.zero_grad()
        losses.append(loss.item())
    return losses


def test_targets_are_the_layers_that_end_so() -> None:
    tuning = replace(TUNING, targets=("q_proj", "mlp.up_proj"), layers=(1, 2))
    assert set(attach(tiny_llama(), tuning).layers) == {"model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"}
    assert len(attach(tiny_llama(), replace(TUNING, targets="mlp")).layers) == 6


def test_a_half_precision_base_keeps_its_dtype_and_the_pairs_theirs() -> None:
    nested = attach(tiny_vit().to(torch.bfloat16), TUNING)
    move(nested)
    result = nested.model(pixel_values=images()["pixel_values"].to(torch.bfloat16)).logits
    assert result.dtype == torch.bfloat16
    assert {weight.dtype for weight in nested.trainable(0)} == {torch.float32}


def test_training_without_a_task_is_refused() -> None:
    nested = LLAMA.nested()
    nested.model.train()
    with pytest.raises(TrainingError, match="expected a task to train on"):
        nested.model(**LLAMA.inputs())


def test_the_task_ends_with_its_block_even_after_an_error() -> None:
    nested = LLAMA.nested()
    everything = LLAMA.compute(nested)
    with pytest.raises(ZeroDivisionError), nested.using(1):
        raise ZeroDivisionError
    assert torch.equal(LLAMA.compute(nested), everything)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (3, "from 0 to 2, got 3"),
        (-1, "from 0 to 2, got -1"),
        (torch.tensor([0, 1, 3]), "got 3"),
        (torch.tensor([0.0, 1.0, 1.0]), "task ids"),
        (torch.tensor([[0, 1, 1]]), "task ids"),
        (torch.tensor([0, 1]), "each of 3 rows, got 2"),
    ],
)
def test_a_task_that_is_none_is_refused(task: int | Tensor, message: str) -> None:
    nested = LLAMA.nested()
    with pytest.raises(TrainingError, match=message):
        LLAMA.compute(nested, task)


def test_what_cannot_nest_is_refused_and_the_model_left_as_it_was() -> None:
    gpt2 = tiny_gpt2().requires_grad_(True)
    with pytest.raises(TrainingError, match="got Conv1D"):
        attach(gpt2, TUNING)
    assert all(weight.requires_grad for weight in gpt2.parameters())
    with pytest.raises(TrainingError, match="got 'nowhere'"):
        attach(tiny_llama(), replace(TUNING, targets=("q_proj", "nowhere")))
    with pytest.raises(TrainingError, match="at least 1 task"):
        attach(tiny_llama(), TUNING, tasks=0)
    with pytest.raises(TrainingError, match="bare model"):
        attach(LLAMA.nested().model, TUNING)


def test_a_layer_that_is_not_called_but_read_is_refused() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 8)])

        def get_output_embeddings(self) -> None:
            return None

    with pytest.raises(TrainingError, match="NonDynamicallyQuantizableLinear"):
        attach(Odd(), TUNING)
