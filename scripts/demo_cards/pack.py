"""Packs trained adapters as the cards that the package ships.

`python -m scripts.demo_cards.pack .build/demo-peft arrowmoe/demo_cards`. The same weights and the same `cards.json`
give the same card, but for its time of creation. Cards leave here unsigned: the node that publishes one signs it.

The router's statistics are of training prompts, and calibrated on half of the held-out ones: those are worded unlike
the training templates, as users' prompts will be. The other half measures (docs/demo.md).
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from arrowmoe import ArrowEngine, CardStatistics, Prompts, TextFeaturizer, describe
from arrowmoe.routing.probe import Probe, measured
from arrowmoe.routing.statistics import MIN_PROMPTS
from arrowmoe.routing.texts import phrases
from registry.card import LoRACard
from registry.format import LoRAFormat
from registry.logs import get_logger
from scripts.demo_cards import cards
from scripts.demo_cards.recipes import RECIPES

DATA_DIRECTORY: Final = Path(__file__).parents[2] / "arrowmoe" / "demo_data"
EMBEDDER: Final = "builtin:minilm"
PROMPTS: Final = 600
BUDGET_BYTES: Final = 32 << 10
CALIBRATION_SEED: Final = 11
ABOUT: Final = ("description", "domains", "examples", "licence", "training", "evaluation")

log = get_logger(__name__)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m scripts.demo_cards.pack", description=__doc__)
    parser.add_argument("adapters", type=Path, help="where the PEFT directories are, one per card")
    parser.add_argument("out", type=Path, help="where the .lora.arrow files go")
    parser.add_argument("--data", type=Path, default=DATA_DIRECTORY, help="where cards.json is")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    featurizer = TextFeaturizer(ArrowEngine.from_pretrained(EMBEDDER))
    probe = measured(featurizer)
    for entry in json.loads((options.data / "cards.json").read_text(encoding="utf-8")):
        statistics = statistics_of(entry, featurizer, probe)
        path = pack(entry, adapters=options.adapters, out=options.out, statistics=statistics)
        log.info("packed", card=entry["name"], path=str(path), file_bytes=path.stat().st_size)


def statistics_of(entry: dict[str, Any], featurizer: TextFeaturizer, probe: Probe) -> CardStatistics:
    """What the router learns of a card's prompts."""
    split = next(recipe for recipe in RECIPES if recipe.name == entry["name"]).data()
    prompts = list(dict.fromkeys(cards.prompts(split.train)))[:PROMPTS]
    given = Prompts(
        vectors=featurizer.features(prompts).vectors,
        public=featurizer.features(phrases(entry["description"])).vectors,
        held_out=featurizer.features(calibration_half(cards.prompts(split.heldout))).vectors,
    )
    return describe(given, probe, min_prompts=MIN_PROMPTS, budget_bytes=BUDGET_BYTES)


def calibration_half(heldout: Sequence[str]) -> list[str]:
    """A fixed half of the held-out prompts, drawn at random."""
    return random.Random(CALIBRATION_SEED).sample(list(heldout), len(heldout) // 2)


def pack(entry: dict[str, Any], *, adapters: Path, out: Path, statistics: CardStatistics | None = None) -> Path:
    """One card out of its entry in `cards.json` and the PEFT directory of its name."""
    about = {field: entry[field] for field in ABOUT}
    card = LoRACard.from_peft(adapters / entry["name"], name=entry["name"], base_name=entry["base"], **about)
    card = card if statistics is None else statistics.put_into(card)
    path = out / f"{entry['name']}.lora.arrow"
    LoRAFormat.save(card, path)
    return path


if __name__ == "__main__":
    main()
