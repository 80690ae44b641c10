"""The demo cards' training: the loss is the formula, a saved adapter is portable bf16."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from evolution.fine_tuning import FineTuning, save_bf16
from scripts.demo_cards import adapters, encoder
from scripts.demo_cards.recipes import RECIPES

TINY = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)


def test_contrastive_loss_is_the_formula() -> None:
    torch.manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(6, 5), dim=-1)
    labels = torch.tensor([0, 0, 1, 1, 1, 0])
    total = 0.0
    for i in range(6):
        others = [j for j in range(6) if j != i]
        scores = {j: float(vectors[i] @ vectors[j]) / encoder.TEMPERATURE for j in others}
        norm = torch.logsumexp(torch.tensor(list(scores.values())), dim=0).item()
        positives = [j for j in others if labels[j] == labels[i]]
        total += -sum(scores[j] - norm for j in positives) / len(positives)
    assert abs(encoder.contrastive_loss(vectors, labels).item() - total / 6) < 1e-5


def test_a_saved_adapter_is_bf16_names_its_logical_base_and_loads_again(tmp_path: Path) -> None:
    recipe = next(recipe for recipe in RECIPES if recipe.kind == "encoder")
    recipe = replace(recipe, tuning=FineTuning(rank=2, alpha=4, targets=("query", "dense"), layers=(1, 2)))
    torch.manual_seed(0)
    base = BertModel(TINY)
    state = {name: weight.clone() for name, weight in base.state_dict().items()}
    adapted = adapters.attach(base, recipe)
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.normal_()
    save_bf16(adapted, tmp_path)

    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    assert all(".layer.1." in name for name in saved)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == recipe.base
    assert config["target_modules"] == ["dense", "query"]

    fresh = BertModel(TINY)
    fresh.load_state_dict(state)
    loaded = adapters.load(fresh, tmp_path)
    weights = {name: weight for name, weight in loaded.named_parameters() if "lora_" in name}
    assert len(weights) == len(saved)
    for name, tensor in saved.items():
        stem, end = name.rsplit(".", 1)
        assert torch.equal(weights[f"{stem}.default.{end}"], tensor.float())
