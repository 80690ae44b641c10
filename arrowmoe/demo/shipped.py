"""What the package ships for the demo: four cards, their held-out sets, and the prompts that the demo asks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
CARDS, DATA = PACKAGE / "demo_cards", PACKAGE / "demo_data"
BASES = {"causal": "builtin:smollm2", "encoder": "builtin:minilm"}


@dataclass(frozen=True, kw_only=True)
class Example:
    """A text, and the answer or label that is right."""

    text: str
    wanted: str


@dataclass(frozen=True, kw_only=True)
class ShippedCard:
    """A card's file and how it is scored: `reference` holds the labelled texts that an encoder's card searches."""

    name: str
    kind: str
    metric: str
    path: Path
    heldout: tuple[Example, ...]
    reference: tuple[Example, ...]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What the demo asks, of a model of `kind`, and the card that it is written for; None: it fits nothing."""

    text: str
    kind: str
    card: str | None


# Written for the demo, in no training or held-out set; its evidence is the scores, these show what they mean.
PROMPTS = (
    Prompt(
        text="Write the date in ISO format: We moved to Lisbon on the 9th of October 2019.",
        kind="causal",
        card="iso-dates",
    ),
    Prompt(
        text="Triage this support ticket: I was charged twice. This is very urgent.",
        kind="causal",
        card="ticket-triage",
    ),
    Prompt(
        text="Which team should take this? My parcel arrived with a broken box. There is no hurry.",
        kind="causal",
        card="ticket-triage",
    ),
    Prompt(text="Write a haiku about autumn leaves.", kind="causal", card=None),
    Prompt(text="The hammock tore within a week.", kind="encoder", card="review-verdict"),
    Prompt(text="object-storage: write of block 77 failed, data is lost", kind="encoder", card="log-severity"),
)


def shipped_cards() -> tuple[ShippedCard, ...]:
    """The cards of `cards.json`, in its order."""
    return tuple(
        ShippedCard(
            name=entry["name"],
            kind=entry["kind"],
            metric=entry["evaluation"]["metric"],
            path=CARDS / f"{entry['name']}.lora.arrow",
            heldout=_examples(DATA / f"{entry['name']}.heldout.jsonl"),
            reference=_examples(DATA / f"{entry['name']}.reference.jsonl") if entry["kind"] == "encoder" else (),
        )
        for entry in json.loads((DATA / "cards.json").read_text(encoding="utf-8"))
    )


def family(part: str) -> tuple[Example, ...]:
    """What the demo's night learns: `asked` of node A and known to the teacher, or `heldout`, known to nobody."""
    return _examples(DATA / f"part-finder.{part}.jsonl")


def spread(examples: tuple[Example, ...], count: int) -> tuple[Example, ...]:
    """At most `count` examples, evenly spread: the sets are written subject by subject."""
    count = min(count, len(examples))
    return tuple(examples[index * len(examples) // count] for index in range(count))


def _examples(path: Path) -> tuple[Example, ...]:
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return tuple(
        Example(text=row.get("prompt", row.get("text")), wanted=row.get("answer", row.get("label"))) for row in rows
    )
