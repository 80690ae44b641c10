"""Gates of their own for each layer: the head's logits, and a plan that holds them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from arrowmoe.errors import GateError, RoutingError
from arrowmoe.lora.manager import LoRAManager
from arrowmoe.lora.plan import Plan
from arrowmoe.routing.heads import HeadConfig
from arrowmoe.routing.per_layer import PerLayerHead, layers_of
from registry.card import LoRACard
from tests.peft_models import make_peft, outputs, sample_inputs, tiny_llama

LAYERS = ("model.layers.0", "model.layers.1")


def test_each_layer_has_logits_of_its_own_from_one_trunk() -> None:
    head = PerLayerHead(HeadConfig(d_hidden=6, n_cards=3, null=True), LAYERS).eval()
    x = torch.randn(5, 6)
    logits = head(x)
    assert logits.shape == (5, 2, 4)
    weight, bias = head.output.weight[4:], head.output.bias[4:]
    torch.testing.assert_close(logits[:, 1], head.trunk(x) @ weight.T + bias)


def test_layers_are_read_off_module_paths() -> None:
    paths = ("model.layers.10.mlp.up_proj", "model.layers.10.q_proj", "encoder.layer.2.dense", "model.embed_tokens")
    assert layers_of(paths) == ("model.layers.10", "encoder.layer.2", "model.embed_tokens")


def test_layers_must_be_distinct() -> None:
    with pytest.raises(RoutingError, match="distinct layers"):
        PerLayerHead(HeadConfig(d_hidden=6, n_cards=3), ["a", "a"])


def test_a_plan_gives_each_layer_its_own_gates(tmp_path: Path) -> None:
    """Reference: the base's weights with gate · PEFT's ΔW of that layer merged in, row by row."""
    model = tiny_llama()
    cards = [LoRACard.from_peft(make_peft(model, tmp_path / str(seed), seed=seed)) for seed in range(2)]
    manager = LoRAManager(model)
    for card in cards:
        manager.apply_card(card)
    generator = torch.Generator().manual_seed(0)
    gates = {layer: torch.rand(3, 2, generator=generator) for layer in LAYERS}
    plan = Plan(tuple(card.digest for card in cards), torch.zeros(3, 2), layers=gates)
    with manager.running(plan):
        found = outputs(model)
    for row in range(3):
        merged = tiny_llama()
        for path, module in merged.named_modules():
            layer = next((layer for layer in LAYERS if path.startswith(f"{layer}.")), None)
            if isinstance(module, torch.nn.Linear) and layer is not None:
                for k, card in enumerate(cards):
                    a, b = (torch.tensor(t.float32()) for t in _low_rank(card, path))
                    module.weight.data += gates[layer][row, k] * 1.5 * b @ a  # alpha 6, rank 4
        torch.testing.assert_close(found[row], outputs(merged)[row], rtol=1e-4, atol=1e-5)


def test_the_longest_prefix_wins_and_a_number_is_not_a_prefix_of_a_longer_one(tmp_path: Path) -> None:
    card = LoRACard.from_peft(make_peft(tiny_llama(), tmp_path / "a", seed=0))
    zero, one = torch.zeros(3, 1), torch.ones(3, 1)

    def run(gates: torch.Tensor, layers: dict[str, torch.Tensor]) -> torch.Tensor:
        model = tiny_llama()
        manager = LoRAManager(model)
        manager.apply_card(card)
        with manager.running(Plan((card.digest,), gates, layers=layers)):
            return outputs(model)

    everywhere = run(one, {})
    torch.testing.assert_close(run(zero, {"model.layers": one}), everywhere)
    torch.testing.assert_close(run(one, {"model.layer": zero}), everywhere)
    assert not run(one, {"model": one, "model.layers.1": zero}).allclose(everywhere)


def test_layers_must_have_the_plans_rows() -> None:
    with pytest.raises(GateError, match="layer 'a': expected gates for 3 rows, got 2"):
        Plan(("x",), torch.ones(3, 1), layers={"a": torch.ones(2, 1)})


def _low_rank(card: LoRACard, path: str) -> list:  # type: ignore[type-arg]
    roles = {role.value: tensor for role, tensor in card.modules[path].items()}
    return [roles[name] for name in sorted(roles)]


def test_a_gradient_reaches_each_layers_gates(tmp_path: Path) -> None:
    model = tiny_llama()
    card = LoRACard.from_peft(make_peft(model, tmp_path / "a", seed=0))
    manager = LoRAManager(model)
    manager.apply_card(card)
    gates = {layer: torch.ones(3, 1, requires_grad=True) for layer in LAYERS}
    with manager.running(Plan((card.digest,), torch.zeros(3, 1), layers=gates)):
        model(**sample_inputs()).logits.square().sum().backward()
    for own in gates.values():
        assert own.grad is not None
        assert own.grad.abs().min() > 0
