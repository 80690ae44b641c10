"""The mixed model: PEFT's numbers for each row's adapter, one base, gradients to the head, cards read back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from arrowmoe.errors import RoutingError, UnknownAdapterError, UnsupportedCardError
from arrowmoe.routing.heads import HeadConfig, RouterHead
from arrowmoe.routing.hidden import HiddenFeaturizer
from arrowmoe.routing.mixed import MultiLoRAWithRouter
from registry.card import LoRACard
from tests.arrowmoe import tiny
from tests.arrowmoe.routing.toy import Toy
from tests.peft_models import HIDDEN, load_peft, make_peft, sample_inputs, tiny_bert, tiny_llama

INPUTS = sample_inputs()


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return Toy(tmp_path_factory.mktemp("toy"), cards=3)


@torch.no_grad()
def test_each_row_equals_peft_with_the_adapter_that_was_chosen(toy: Toy) -> None:
    made = toy.mixed()(**INPUTS)
    assert made.gates.sum(dim=1).tolist() == [1, 1, 1]
    for row, chosen in enumerate(made.gates.argmax(dim=1).tolist()):
        expected = toy.peft[chosen](**INPUTS).logits[row]
        torch.testing.assert_close(made.output[row], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_gates_are_the_heads_of_what_the_featurizer_sees(toy: Toy) -> None:
    mixed = toy.mixed()
    states = tiny_llama().base_model(**INPUTS, output_hidden_states=True).hidden_states[1].mean(dim=1)
    expected = torch.softmax(mixed.head(states / states.norm(dim=1, keepdim=True)) / 2.0, dim=1)
    made = mixed(**INPUTS, routing_mode="soft", temperature=2.0)
    torch.testing.assert_close(made.gate_probs, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made.gates, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_adapters_can_be_named_row_by_row(toy: Toy) -> None:
    mixed = toy.mixed()
    made = mixed(**INPUTS, routing_mode="manual", adapter=["card2", None, toy.lora_cards[0].digest])
    assert made.gates.tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 0]]
    torch.testing.assert_close(made.output[0], toy.peft[2](**INPUTS).logits[0], rtol=1e-4, atol=1e-5)
    assert made.output[1].equal(tiny_llama()(**INPUTS).logits[1])
    assert mixed(**INPUTS, adapter="card1").gates.tolist() == [[0, 1, 0]] * 3


@torch.no_grad()
@pytest.mark.parametrize(("top_k", "used"), [(1, 1), (2, 2), (3, 3)])
def test_top_k_uses_that_many(toy: Toy, top_k: int, used: int) -> None:
    gates = toy.mixed()(**INPUTS, routing_mode="soft", top_k=top_k).gates
    assert (gates > 0).sum(dim=1).tolist() == [used] * 3
    torch.testing.assert_close(gates.sum(dim=1), torch.ones(3))


@torch.no_grad()
@pytest.mark.parametrize("per_layer", [False, True])
def test_masked_cards_are_not_used(toy: Toy, per_layer: bool) -> None:
    mask = torch.tensor([[True, False, False], [False, True, True], [False, False, False]])
    made = toy.mixed(per_layer=per_layer)(**INPUTS, routing_mode="soft", mask=mask)
    for gates in made.gates.unbind(dim=1) if per_layer else [made.gates]:
        assert not gates[~mask].any()
        torch.testing.assert_close(gates.sum(dim=1), torch.tensor([1.0, 1.0, 0.0]))
    assert made.output[2].equal(tiny_llama()(**INPUTS).logits[2])


@torch.no_grad()
def test_what_is_not_the_prompt_does_not_move_the_gates(toy: Toy) -> None:
    mixed, inputs = toy.mixed(), {key: value.clone() for key, value in INPUTS.items()}
    prompt_mask = torch.ones_like(inputs["input_ids"])
    prompt_mask[:, 4:] = 0
    before = mixed(**inputs, prompt_mask=prompt_mask)
    inputs["input_ids"][:, 4:] = 7
    after = mixed(**inputs, prompt_mask=prompt_mask)
    torch.testing.assert_close(after.gate_logits, before.gate_logits)
    assert not after.output.allclose(before.output)


@pytest.mark.parametrize("mode", ["top1", "top2", "soft"])
@pytest.mark.parametrize("per_layer", [False, True])
def test_a_gradient_reaches_the_head_alone(toy: Toy, mode: str, per_layer: bool) -> None:
    mixed = toy.mixed(per_layer=per_layer)
    mixed(**INPUTS, routing_mode=mode).output.square().mean().backward()
    for name, parameter in mixed.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert all(parameter.grad is None for parameter in mixed.base.model.parameters())


def test_the_gradient_of_soft_gates_is_that_of_a_finite_difference(toy: Toy) -> None:
    mixed = toy.mixed()
    bias = mixed.head.output.bias

    def loss() -> torch.Tensor:
        made: torch.Tensor = mixed(**INPUTS, routing_mode="soft").output.square().mean()
        return made

    loss().backward()  # type: ignore[no-untyped-call]
    assert bias.grad is not None
    with torch.no_grad():
        values = []
        for shift in (0.01, -0.01):
            bias[0] += shift
            values.append(float(loss()))
            bias[0] -= shift
    assert float(bias.grad[0]) == pytest.approx((values[0] - values[1]) / 0.02, rel=0.02, abs=1e-4)


def test_the_base_is_not_copied_and_no_parameter_of_the_module(toy: Toy) -> None:
    mixed = toy.mixed()
    own = {parameter.data_ptr() for parameter in mixed.parameters()}
    assert own == {parameter.data_ptr() for parameter in mixed.head.parameters()}


@torch.no_grad()
def test_an_encoder_gives_its_hidden_states(tmp_path: Path) -> None:
    directory = make_peft(tiny_bert(), tmp_path / "a", seed=0)
    base = tiny.base(tiny_bert())
    head = RouterHead(HeadConfig(d_hidden=HIDDEN, n_cards=1, width=4)).eval()
    mixed = MultiLoRAWithRouter(base, [LoRACard.from_peft(directory)], head, HiddenFeaturizer(base, layer=1))
    expected = load_peft(tiny_bert(), directory)(**INPUTS).last_hidden_state
    torch.testing.assert_close(mixed(**INPUTS).output, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_trained_adapters_are_read_back_as_cards_that_peft_computes_alike(toy: Toy, tmp_path: Path) -> None:
    mixed = toy.mixed()
    weights = mixed.unfreeze_adapters()
    assert len(weights) == 3 * 2 * len(toy.lora_cards[0].modules)
    for weight in weights:
        weight.add_(0.05)
    mixed.freeze_adapters()
    card = mixed.trained_cards("2")[1]
    assert (card.name, card.version, card.manifest.parents) == ("card1", "2", (toy.lora_cards[1].digest,))
    card.to_peft(tmp_path / "out")
    expected = load_peft(tiny_llama(), tmp_path / "out")(**INPUTS).logits
    torch.testing.assert_close(mixed(**INPUTS, adapter="card1").output, expected, rtol=1e-4, atol=1e-5)
    assert not expected.allclose(toy.peft[1](**INPUTS).logits, atol=1e-2)


def test_untouched_adapters_read_back_bit_for_bit(toy: Toy) -> None:
    for card, old in zip(toy.mixed().trained_cards("2"), toy.lora_cards, strict=True):
        assert [bytes(tensor.data) for tensor in card.tensors] == [bytes(tensor.data) for tensor in old.tensors]


def test_dora_is_not_trained(tmp_path: Path) -> None:
    card = LoRACard.from_peft(make_peft(tiny_llama(), tmp_path / "a", seed=0, use_dora=True))
    base = tiny.base(tiny_llama())
    head = RouterHead(HeadConfig(d_hidden=HIDDEN, n_cards=1))
    with pytest.raises(UnsupportedCardError, match="DoRA"):
        MultiLoRAWithRouter(base, [card], head, HiddenFeaturizer(base, layer=1)).unfreeze_adapters()


def test_what_cannot_be_meant_is_refused(toy: Toy) -> None:
    mixed = toy.mixed()
    with pytest.raises(RoutingError, match="needs an adapter"):
        mixed(**INPUTS, routing_mode="manual")
    with pytest.raises(UnknownAdapterError, match="expected one card called 'card9', got 0"):
        mixed(**INPUTS, adapter="card9")
    with pytest.raises(RoutingError, match="one adapter for each of 3 rows, got 2"):
        mixed(**INPUTS, adapter=["card1", None])
    with pytest.raises(RoutingError, match="a card for each of the head's 3 columns, got 1"):
        MultiLoRAWithRouter(mixed.base, toy.lora_cards[:1], mixed.head, HiddenFeaturizer(mixed.base, layer=1))
