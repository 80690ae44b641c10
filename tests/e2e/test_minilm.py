"""Promises 1 and 2 on real weights: all-MiniLM-L6-v2 with random PEFT adapters, through the engine's own API.

The reference is PEFT's forward pass, mean-pooled and scaled to unit length as sentence-transformers defines it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from arrowmoe.engine import ArrowEngine
from registry.card import LoRACard
from tests.peft_models import load_peft, make_peft

pytestmark = pytest.mark.e2e

TEXTS = [
    "A cat sat on the mat.",
    "Interest rates rose again, which nobody had expected so soon.",
    "Yes",
    "Where is my order?",
]
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["query", "value"], "r": 8},
    "rslora": {"use_rslora": True, "target_modules": ["query", "key", "value"], "r": 16},
    "dora": {"use_dora": True, "target_modules": ["query", "value"]},
    "pattern": {"rank_pattern": {"layer.0.*": 2}, "alpha_pattern": {"layer.1.*": 3}},
    "bias": {"bias": "all", "target_modules": ["query", "value"]},
}


@pytest.fixture(scope="module")
def engine() -> ArrowEngine:
    return ArrowEngine.from_pretrained("builtin:minilm", device="cpu")


@pytest.fixture(scope="module")
def adapters(engine: ArrowEngine, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: make_peft(engine.base.model, root / name, seed=seed, scale=0.05, **config)
        for seed, (name, config) in enumerate(SETTINGS.items())
    }


@pytest.fixture(scope="module")
def pristine(engine: ArrowEngine) -> torch.nn.Module:
    return copy.deepcopy(engine.base.model)


@pytest.fixture
def loaded(engine: ArrowEngine, adapters: dict[str, Path]) -> Iterator[ArrowEngine]:
    for path in adapters.values():
        engine.load_lora(LoRACard.from_peft(path, base_name=engine.name))
    yield engine
    for name in adapters:
        engine.remove_lora(name)


def reference(engine: ArrowEngine, model: torch.nn.Module, texts: Sequence[str]) -> np.ndarray:
    batch = engine.base.tokenizer(list(texts), padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1).numpy()


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("name", SETTINGS)
def test_one_adapter_equals_peft(
    name: str, loaded: ArrowEngine, adapters: dict[str, Path], pristine: torch.nn.Module
) -> None:
    expected = reference(loaded, load_peft(pristine, adapters[name]), TEXTS)
    assert relative_error(loaded.encode_with_lora(TEXTS, adapter=name), expected) <= 1e-5
    assert relative_error(loaded.encode(TEXTS), expected) > 1e-3, "the adapter does something"


def test_mixed_rows_equal_peft(loaded: ArrowEngine, adapters: dict[str, Path], pristine: torch.nn.Module) -> None:
    choices = ["dora", None, "bias", "lora"]
    models = [pristine if name is None else load_peft(pristine, adapters[name]) for name in choices]
    expected = np.concatenate([reference(loaded, model, [text]) for model, text in zip(models, TEXTS, strict=True)])
    assert relative_error(loaded.encode_with_lora(TEXTS, adapter=choices), expected) <= 1e-5


def test_a_mixture_equals_the_sum_of_peft_deltas(
    loaded: ArrowEngine, adapters: dict[str, Path], pristine: torch.nn.Module
) -> None:
    mixture = {"lora": 0.6, "dora": 0.3, "rslora": 0.1}
    model = copy.deepcopy(pristine)
    total = {name: value.clone() for name, value in pristine.state_dict().items()}
    for name, weight in mixture.items():
        tuned = load_peft(pristine, adapters[name]).merge_and_unload().state_dict()
        for key, value in pristine.state_dict().items():
            total[key] += (weight * (tuned[key] - value)).to(value.dtype)
    model.load_state_dict(total)
    assert relative_error(loaded.encode_with_lora(TEXTS, adapter=mixture), reference(loaded, model, TEXTS)) <= 1e-5


def test_removing_every_adapter_gives_back_the_base_bit_for_bit(engine: ArrowEngine, adapters: dict[str, Path]) -> None:
    modules, before = dict(engine.base.model.named_modules()), engine.encode(TEXTS)
    for path in adapters.values():
        engine.load_lora(LoRACard.from_peft(path, base_name=engine.name))
    assert dict(engine.base.model.named_modules()) != modules
    for name in adapters:
        assert engine.remove_lora(name)
    assert dict(engine.base.model.named_modules()) == modules
    assert np.array_equal(engine.encode(TEXTS), before)
