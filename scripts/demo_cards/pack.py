"""Packs trained adapters as the cards that the package ships.

`python -m scripts.demo_cards.pack .build/demo-peft arrowmoe/demo_cards`. The same weights and the same `cards.json`
give the same card, but for its time of creation. Cards leave here unsigned: the node that publishes one signs it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from registry.card import LoRACard
from registry.format import LoRAFormat
from registry.logs import get_logger

DATA_DIRECTORY: Final = Path(__file__).parents[2] / "arrowmoe" / "demo_data"
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
    for entry in json.loads((options.data / "cards.json").read_text(encoding="utf-8")):
        path = pack(entry, adapters=options.adapters, out=options.out)
        log.info("packed", card=entry["name"], path=str(path), file_bytes=path.stat().st_size)


def pack(entry: dict[str, Any], *, adapters: Path, out: Path) -> Path:
    """One card out of its entry in `cards.json` and the PEFT directory of its name."""
    about = {field: entry[field] for field in ABOUT}
    card = LoRACard.from_peft(adapters / entry["name"], name=entry["name"], base_name=entry["base"], **about)
    path = out / f"{entry['name']}.lora.arrow"
    LoRAFormat.save(card, path)
    return path


if __name__ == "__main__":
    main()
