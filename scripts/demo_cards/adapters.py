"""PEFT adapters: attach a fresh one, save it in bf16, load it again for scoring."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from scripts.demo_cards.recipes import CausalRecipe, EncoderRecipe

TASK_TYPES: Final = {"causal": "CAUSAL_LM", "encoder": "FEATURE_EXTRACTION"}


def attach(model: Any, recipe: CausalRecipe | EncoderRecipe) -> Any:
    """The model with a fresh adapter in fp32, the only weights that train."""
    config = LoraConfig(
        r=recipe.shape.rank,
        lora_alpha=recipe.shape.alpha,
        target_modules=list(recipe.shape.target_modules),
        layers_to_transform=list(range(*recipe.shape.layers)),
        task_type=TASK_TYPES[recipe.kind],
    )
    adapted = get_peft_model(model, config)
    # PEFT would write the absolute path that the base was loaded from.
    adapted.peft_config["default"].base_model_name_or_path = recipe.base
    return adapted


def save_bf16(adapted: Any, directory: Path) -> None:
    """Rounds the adapter to bf16 in place and writes it as a PEFT directory."""
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.data = weight.data.to(torch.bfloat16)
    adapted.save_pretrained(str(directory), save_embedding_layers=False)
    (directory / "README.md").unlink(missing_ok=True)
    _sort_targets(directory / "adapter_config.json")


def load(model: Any, directory: Path) -> Any:
    """The model with the saved adapter, ready to be scored."""
    return PeftModel.from_pretrained(model, str(directory)).eval()


def _sort_targets(path: Path) -> None:
    # PEFT keeps the targets as a set, whose order changes from run to run.
    config = json.loads(path.read_text(encoding="utf-8"))
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
