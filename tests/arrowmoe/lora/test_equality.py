"""Promises 1 and 2: computing with a card equals PEFT on the same adapter; without adapters the base is bit-identical.

References are PEFT's own forward pass, and for mixtures plain weights W + Σ wₖ ΔWₖ with PEFT's merged ΔWₖ.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedModel

from arrowmoe.lora.costs import LAYOUTS
from arrowmoe.lora.manager import LoRAManager
from arrowmoe.lora.plan import Plan
from arrowmoe.routing.gates import Gates
from registry.card import LoRACard
from tests.peft_models import (
    HIDDEN,
    VOCABULARY,
    adapted_model,
    load_peft,
    make_peft,
    outputs,
    sample_inputs,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
)

RELATIVE = 1e-5
MODELS: dict[str, Callable[[], PreTrainedModel]] = {"llama": tiny_llama, "bert": tiny_bert, "gpt2": tiny_gpt2}
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True, "r": 5},
    "dora": {"use_dora": True},
    "rank_pattern": {"rank_pattern": {".*0.*": 2}, "alpha_pattern": {".*1.*": 3}},
    "bias_all": {"bias": "all"},
    "bias_lora_only": {"bias": "lora_only"},
    "dora_with_bias": {"use_dora": True, "bias": "lora_only"},
}
COMBINATIONS = [
    pytest.param(model, setting, id=f"{model}-{setting}")
    for model in MODELS
    for setting in SETTINGS
    if not (model == "llama" and "bias" in setting)  # a Llama has no biases
]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Two adapters with one setting and a plain one, as PEFT directories and as cards."""

    model: PreTrainedModel
    directories: list[Path]
    cards: list[LoRACard]

    def gates(self, rows: Sequence[Mapping[int, float]]) -> Gates:
        names = {card.digest: card.name for card in self.cards}
        return Gates.of([{self.cards[index].digest: weight for index, weight in row.items()} for row in rows], names)


@pytest.fixture
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    model_name, setting = request.param
    model = MODELS[model_name]()
    configs = [SETTINGS[setting], SETTINGS[setting] | {"r": 3}, {"r": 2}]
    directories = [make_peft(model, tmp_path / f"a{seed}", seed=seed, **config) for seed, config in enumerate(configs)]
    return Case(model=model, directories=directories, cards=[LoRACard.from_peft(path) for path in directories])


def parametrised(test: Callable[..., None]) -> Callable[..., None]:
    values = [pytest.param(tuple(param.values), id=param.id) for param in COMBINATIONS]
    return pytest.mark.parametrize("case", values, indirect=True)(test)


@parametrised
def test_one_adapter_equals_peft(case: Case) -> None:
    model = copy.deepcopy(case.model)
    manager = loaded(model, case.cards)
    for index, directory in enumerate(case.directories):
        with manager.gated(case.gates([{index: 1.0}] * 3)):
            assert_close(outputs(model), outputs(load_peft(case.model, directory)))


@parametrised
def test_mixed_rows_equal_peft_row_by_row(case: Case) -> None:
    model = copy.deepcopy(case.model)
    manager = loaded(model, case.cards)
    choices = [0, None, 2, 1, 0, 2]
    inputs = sample_inputs(rows=len(choices))
    references = [outputs(load_peft(case.model, path), inputs) for path in case.directories]
    bare = outputs(case.model, inputs)
    expected = torch.stack([bare[row] if k is None else references[k][row] for row, k in enumerate(choices)])
    with manager.gated(case.gates([{} if k is None else {k: 1.0} for k in choices])):
        assert_close(outputs(model, inputs), expected)


@parametrised
def test_a_mixture_equals_the_sum_of_peft_deltas(case: Case) -> None:
    model = copy.deepcopy(case.model)
    manager = loaded(model, case.cards)
    weights = [{0: 0.7, 1: 0.3}, {0: 0.25, 1: -0.5, 2: 1.0}, {2: 0.4}]
    inputs = sample_inputs(rows=3)
    expected = torch.stack([outputs(merged(case, mix), inputs)[row] for row, mix in enumerate(weights)])
    with manager.gated(case.gates(weights)):
        assert_close(outputs(model, inputs), expected)


@parametrised
def test_without_adapters_the_base_is_bit_identical(case: Case) -> None:
    model = copy.deepcopy(case.model)
    modules, before = dict(model.named_modules()), outputs(case.model)
    manager = loaded(model, case.cards)
    assert torch.equal(outputs(model), before), "loaded adapters that no gate asks for change nothing"
    with manager.gated(case.gates([{0: 1.0}] * 3)):
        assert not torch.equal(outputs(model), before)
    for card in case.cards:
        assert manager.remove_card(card.digest)
    assert dict(model.named_modules()) == modules, "the original module objects are back"
    assert torch.equal(outputs(model), before)


@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize("length", [1, 5])
def test_all_layouts_give_the_same(rows: int, length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    paths = [make_peft(model, tmp_path / f"a{seed}", seed=seed, r=1 + seed) for seed in range(4)]
    cards = [LoRACard.from_peft(path) for path in paths]
    random = np.random.default_rng(0)
    case = Case(model=model, directories=paths, cards=cards)
    gates = case.gates(
        [{int(k): float(random.normal()) for k in random.choice(4, 2, replace=False)} for _ in range(rows)]
    )
    results = []
    for layout in LAYOUTS:
        monkeypatch.setattr("arrowmoe.lora.costs.cheapest", lambda *_, layout=layout: layout)
        wrapped = copy.deepcopy(model)
        with loaded(wrapped, cards).gated(gates):
            results.append(outputs(wrapped, sample_inputs(rows=rows, length=length)))
    for found in results[1:]:
        assert_close(found, results[0])


def test_gradients_reach_gates(tmp_path: Path) -> None:
    model = tiny_llama()
    card = LoRACard.from_peft(make_peft(model, tmp_path / "a", seed=1))
    manager = loaded(model, [card])
    weights = torch.full((3, 1), 0.5, requires_grad=True)
    with manager.running(Plan((card.digest,), weights)):
        model(**sample_inputs()).logits.square().mean().backward()
    assert weights.grad is not None
    assert (weights.grad != 0).all()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_embedding_adapter_equals_peft(tmp_path: Path) -> None:
    model = tiny_bert()
    path = make_peft(model, tmp_path / "a", seed=1, target_modules=["word_embeddings", "query"])
    card = LoRACard.from_peft(path)
    wrapped = copy.deepcopy(model)
    with loaded(wrapped, [card]).gated(Gates.of([{card.digest: 1.0}] * 3, {card.digest: "a"})):
        assert_close(outputs(wrapped), outputs(load_peft(model, path)))


def test_an_adapter_of_an_embedding_that_scales_what_it_gives_equals_peft(tmp_path: Path) -> None:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 32, "head_dim": 4}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **heads)).eval().requires_grad_(False)
    peft_model = adapted_model(model, seed=1, target_modules=["embed_tokens", "q_proj"])
    peft_model.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    card = LoRACard.from_peft(tmp_path / "a")
    wrapped = copy.deepcopy(model)
    with loaded(wrapped, [card]).gated(Gates.of([{card.digest: 1.0}] * 3, {card.digest: "a"})):
        assert_close(outputs(wrapped), outputs(load_peft(model, tmp_path / "a")))


def loaded(model: PreTrainedModel, cards: Sequence[LoRACard]) -> LoRAManager:
    manager = LoRAManager(model)
    for card in cards:
        manager.apply_card(card)
    return manager


def merged(case: Case, mix: Mapping[int, float]) -> PreTrainedModel:
    """The base model with every weight W + Σ wₖ (PEFT's merged Wₖ − W)."""
    model = copy.deepcopy(case.model)
    with torch.no_grad():
        total = {name: value.clone() for name, value in case.model.state_dict().items()}
        for index, weight in mix.items():
            tuned = load_peft(case.model, case.directories[index]).merge_and_unload().state_dict()
            for name, value in case.model.state_dict().items():
                total[name] += weight * (tuned[name] - value)
        model.load_state_dict(total)
    return model


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    error = (found - expected).norm() / expected.norm()
    assert error <= RELATIVE, f"relative error {error:.2e}"
