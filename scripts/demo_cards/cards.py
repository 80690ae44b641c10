"""What `cards.json` says of a card, and keeping that file up to date one card at a time."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from scripts.demo_cards.recipes import RECIPES, CausalRecipe, EncoderRecipe
from scripts.demo_cards.splits import Labelled, Pair

COMMAND: Final = "python -m scripts.demo_cards.train --out DIR"
LICENCE: Final = "Apache-2.0"
EXAMPLE_COUNT: Final = 24
EXAMPLE_SEED: Final = 7

Entry = dict[str, Any]


def entry(
    recipe: CausalRecipe | EncoderRecipe,
    *,
    prompts: Sequence[str],
    heldout: int,
    seconds: float,
    base_score: float,
    card_score: float,
) -> Entry:
    """One card's description; `prompts` are its training prompts."""
    return {
        "name": recipe.name,
        "base": recipe.base,
        "kind": recipe.kind,
        "description": recipe.description,
        "domains": list(recipe.domains),
        "examples": random.Random(EXAMPLE_SEED).sample(list(prompts), EXAMPLE_COUNT),
        "licence": LICENCE,
        "training": {
            "steps": recipe.tuning.steps,
            "examples": min(len(prompts), recipe.tuning.steps * recipe.tuning.batch_size),
            "lr": recipe.tuning.learning_rate,
            "seconds": round(seconds, 1),
            "command": f"{COMMAND} --only {recipe.name}",
        },
        "evaluation": {
            "metric": recipe.metric,
            "heldout": heldout,
            "base": round(base_score, 4),
            "card": round(card_score, 4),
        },
    }


def prompts(examples: Sequence[Pair | Labelled]) -> list[str]:
    """What a user would type, for either kind of example."""
    return [row.prompt if isinstance(row, Pair) else row.text for row in examples]


def put(path: Path, new: Entry) -> None:
    """Replaces the card's entry, keeping the order of `RECIPES`."""
    old: list[Entry] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    by_name = {card["name"]: card for card in [*old, new]}
    ordered = [by_name[recipe.name] for recipe in RECIPES if recipe.name in by_name]
    text = json.dumps(ordered, indent=2, ensure_ascii=False)
    path.write_text(f"{text}\n", encoding="utf-8")
