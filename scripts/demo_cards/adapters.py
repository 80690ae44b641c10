"""PEFT adapters: attach a fresh one for a recipe, load a saved one for scoring."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from peft import PeftModel

from evolution import fine_tuning
from scripts.demo_cards.recipes import CausalRecipe, EncoderRecipe

TASK_TYPES: Final = {"causal": "CAUSAL_LM", "encoder": "FEATURE_EXTRACTION"}


def attach(model: Any, recipe: CausalRecipe | EncoderRecipe) -> Any:
    """The model with a fresh adapter in fp32, the only weights that train."""
    return fine_tuning.attach(model, recipe.tuning, base_name=recipe.base, task_type=TASK_TYPES[recipe.kind])


def load(model: Any, directory: Path) -> Any:
    """The model with the saved adapter, ready to be scored."""
    return PeftModel.from_pretrained(model, str(directory)).eval()
