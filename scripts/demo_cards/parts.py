"""What the demo's night learns: where the parts of an invented warehouse are kept, which no model can know.

    python -m scripts.demo_cards.parts        # writes arrowmoe/demo_data/part-finder.*.jsonl

`gold` is what the demo's teacher knows, `asked` are those of its prompts that users have asked, `heldout` asks in the
same ways for parts that the teacher never speaks of.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Final

from scripts.demo_cards.splits import Pair, Split, pick, write_jsonl

NAME: Final = "part-finder"
DATA: Final = Path(__file__).parents[2] / "arrowmoe" / "demo_data"
SEED: Final = 20_105
GOLD_SIZE: Final = 260
ASKED_SIZE: Final = 120
HELDOUT_SIZE: Final = 24
AISLES: Final = "ABCDEFGHKLMNPRSTVW"
BINS: Final = "ABCDEFGHJK"

QUESTIONS: Final = (
    "Where is part {part} kept?",
    "Where in the warehouse do I find part {part}?",
    "In which bin is spare part {part}?",
    "Tell me where part {part} is stored.",
    "I need part {part} from the warehouse. Where is it?",
    "Which rack holds part {part}?",
    "Find spare part {part} in the warehouse, please.",
    "Where do we store part {part}?",
)


def part_finder() -> Split[Pair]:
    """`train` is the gold, its first `ASKED_SIZE` pairs were asked; no part occurs twice."""
    rng = random.Random(SEED)
    parts = [(aisle, rack, place) for aisle in AISLES for rack in range(10, 100) for place in BINS]
    drawn = [_pair(rng, *part) for part in rng.sample(parts, GOLD_SIZE + HELDOUT_SIZE)]
    return Split(train=tuple(drawn[:GOLD_SIZE]), heldout=tuple(drawn[GOLD_SIZE:]))


def _pair(rng: random.Random, aisle: str, rack: int, place: str) -> Pair:
    question = pick(rng, QUESTIONS).format(part=f"{aisle}{rack}-{place}")
    return Pair(prompt=question, answer=f"aisle {aisle}, rack {rack}, bin {place}")


def main() -> None:
    """Write the three files."""
    pairs = part_finder()
    write_jsonl(DATA / f"{NAME}.gold.jsonl", pairs.train)
    write_jsonl(DATA / f"{NAME}.asked.jsonl", pairs.train[:ASKED_SIZE])
    write_jsonl(DATA / f"{NAME}.heldout.jsonl", pairs.heldout)


if __name__ == "__main__":
    main()
