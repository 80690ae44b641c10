"""The probe: gradients are those of the loss, worth is the stated formula, and a budget buys what is worth most."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from evolution.errors import TrainingError
from evolution.fine_tuning import attach
from evolution.protocols import Example
from evolution.trainer import ExpertTrainer
from evolution.training_job import FineTuning
from evolution.weight_probe import WeightMapProbe, Zone, hot_zones, plans
from tests.arrowmoe.tiny import tokenizer
from tests.evolution.jobs import EXAMPLES, TEXTS, job, tuning
from tests.peft_models import tiny_gpt2, tiny_llama

GAP, REPLAY = EXAMPLES[:5], TEXTS[:4]


def zone(module: str, worth: float, shape: tuple[int, int] = (6, 4)) -> Zone:
    return Zone(module=module, shape=shape, worth=worth, gap_rms=1.0, replay_rms=1.0)


def test_worth_is_the_best_steps_gain_less_what_it_forgets() -> None:
    """One step along −G of one module's B, at every rate: the most of gain − cost is its worth."""
    zones = {zone.module: zone for zone in WeightMapProbe(tiny_llama(), tokenizer(), seed=3).zones(GAP, REPLAY)}
    name = "model.layers.1.mlp.down_proj"
    adapted = attach(tiny_llama(), FineTuning(rank=8, alpha=8, targets=tuple(zones), seed=3), base_name="")
    weight = adapted.get_base_model().get_submodule(name).lora_B["default"].weight

    def gradient(row: Example) -> torch.Tensor:
        prompt = tokenizer()(row.prompt)["input_ids"]
        ids = prompt + tokenizer()(row.answer)["input_ids"] + ([1] if row.prompt else [])
        labels = torch.tensor([-100] * len(prompt) + ids[len(prompt) :])
        loss = adapted(input_ids=torch.tensor([ids]), labels=labels[None]).loss
        return torch.autograd.grad(loss, weight)[0].flatten().double()

    wanted = torch.stack([gradient(row) for row in GAP]).mean(dim=0)
    others = torch.stack([gradient(row) for row in REPLAY])
    gain = float(wanted @ wanted)
    fisher = float(((others @ wanted) ** 2).mean()) + gain * float((others**2).sum(dim=1).mean()) / weight.numel()
    best_rate = gain / fisher
    rates = torch.linspace(0, 3 * best_rate, 3001, dtype=torch.float64)
    net = rates * gain - rates**2 * fisher / 2
    assert zones[name].worth == pytest.approx(float(net.max()), rel=1e-3)


def test_what_comes_into_a_module_is_measured_apart() -> None:
    seen: dict[str, float] = {}
    model = tiny_llama()
    zones = {zone.module: zone for zone in WeightMapProbe(model, tokenizer()).zones([GAP[0]], REPLAY)}
    name = "model.layers.0.self_attn.q_proj"
    hook = model.get_submodule(name).register_forward_pre_hook(
        lambda _, given: seen.update({name: float(given[0].square().mean().sqrt())})
    )
    model(input_ids=tokenizer()(f"{GAP[0].prompt} {GAP[0].answer} <eos>", return_tensors="pt")["input_ids"])
    hook.remove()
    assert zones[name].gap_rms == pytest.approx(seen[name], rel=1e-5)
    assert zones[name].replay_rms != zones[name].gap_rms


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_every_linear_layer_of_the_blocks_is_seen_and_the_model_left_as_it_was(
    build: Callable[[], PreTrainedModel],
) -> None:
    model, before = build(), build().state_dict()
    zones = WeightMapProbe(model, tokenizer()).zones(GAP, REPLAY)
    shapes = {zone.module: zone.shape for zone in zones}
    assert len(zones) == (14 if build is tiny_llama else 8)
    up = ("model.layers.1.mlp.up_proj", (32, 16)) if build is tiny_llama else ("transformer.h.1.mlp.c_fc", (64, 16))
    assert shapes[up[0]] == up[1]
    assert [zone.worth for zone in zones] == sorted((zone.worth for zone in zones), reverse=True)
    assert model.state_dict().keys() == before.keys()
    assert not any(weight.requires_grad for weight in model.parameters())


def test_without_examples_of_both_there_is_nothing_to_weigh() -> None:
    with pytest.raises(TrainingError, match="got 5 and 0"):
        WeightMapProbe(tiny_llama(), tokenizer()).zones(GAP, [])


def test_hot_zones_are_the_fewest_that_hold_the_share() -> None:
    zones = [zone("a", 5), zone("b", 3), zone("c", 2)]
    assert [found.module for found in hot_zones(zones, 0.5)] == ["a"]
    assert [found.module for found in hot_zones(zones, 0.6)] == ["a", "b"]
    assert [found.module for found in hot_zones(zones, 1.0)] == ["a", "b", "c"]
    assert [found.module for found in hot_zones([zone("dear", 5, (60, 60)), zone("cheap", 3)], 0.3)] == ["cheap"]


def test_the_three_plans_spend_one_budget() -> None:
    zones = [zone("h.0.attn.q", 1), zone("h.0.mlp.up", 6), zone("h.1.attn.q", 9), zone("h.1.mlp.up", 3)]
    made = plans(zones, budget_parameters=100, share=0.7)
    assert made["mlp"].ranks == {"h.0.mlp.up": 5, "h.1.mlp.up": 5}
    assert made["all"].ranks == {zone.module: 2 for zone in zones}
    assert made["hot"].ranks == {"h.1.attn.q": 6, "h.0.mlp.up": 4}  # 9 to 6, by D'Hondt
    assert {name: plan.parameters for name, plan in made.items()} == {"mlp": 100, "all": 80, "hot": 100}
    with pytest.raises(TrainingError, match="at least 40 parameters for all,"):
        plans(zones, budget_parameters=30)


def test_a_plan_trains_at_its_ranks_and_the_tunings_scale(tmp_path: Path) -> None:
    zones = WeightMapProbe(tiny_llama(), tokenizer()).zones(GAP, REPLAY)
    plan = plans(zones, budget_parameters=600)["hot"]
    made = job(tmp_path, tuning=plan.tuning(tuning(steps=2, alpha=8)), rank_pattern=dict(plan.ranks))
    ExpertTrainer(made, tiny_llama(), tokenizer()).run()
    adapted = attach(tiny_llama(), made.tuning, base_name="", rank_pattern=made.rank_pattern)
    trained = [weight for weight in adapted.parameters() if weight.requires_grad]
    assert sum(weight.numel() for weight in trained) == plan.parameters <= 600
    layers = {name: adapted.get_base_model().get_submodule(name) for name in plan.ranks}
    assert {name: layer.r["default"] for name, layer in layers.items()} == dict(plan.ranks)
    assert {layer.scaling["default"] for layer in layers.values()} == {2.0}
