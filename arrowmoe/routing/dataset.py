"""The routing dataset: which card should handle a text, as rows of JSON.

A row is read in plain form, `{"text", "card", "label"?, "answer"?, "image"?, "id"?}`, or as a conversation, `{"id",
"image"?, "conversations": [{"from", "value"}, …], "metadata": {"adapter", …}}`, the form that is written. A card of
null is out of scope. Images are named, never opened.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from arrowmoe.generation import Message
from registry.errors import ArrowMoEError

NONE: Final = "none"
"""What a routing row answers when no card fits; no card may be called so."""
QUESTION: Final = "Which adapter should handle this?"
SPLITS: Final = ("train", "val", "eval")
_IMAGE: Final = "<image>"
_SHOWN_PROBLEMS: Final = 20


class RoutingDataError(ArrowMoEError):
    """Rows of a routing dataset are not of the expected form, or too few."""


@dataclass(frozen=True, kw_only=True)
class RoutingExample:
    """A text and the card that should handle it; None is no card. `label` is finer than the card, an intent."""

    text: str
    card: str | None
    label: str | None = None
    answer: str | None = None
    image: str | None = None
    id: str | None = None


@dataclass(frozen=True, kw_only=True)
class DatasetReport:
    """What `write_dataset` wrote: rows by split and card, and what it left out.

    `repeated` texts stood more than once in one source and were kept once; `ambiguous` ones (text → cards) stood in
    several sources, so nothing says which card is right, and were left out of all.
    """

    directory: Path
    counts: Mapping[str, Mapping[str, int]]
    repeated: int
    ambiguous: Mapping[str, tuple[str, ...]]


def routing_prompt(text: str, names: Sequence[str]) -> list[Message]:
    """The messages that ask a language model which of the adapters `names` should handle `text`."""
    return [
        {"role": "system", "content": f"You are a routing classifier. Adapters: {', '.join(names)}."},
        {"role": "user", "content": f"{text}\n{QUESTION}"},
    ]


def read_examples(path: Path, *, card: str | None = None) -> list[RoutingExample]:
    """The rows of a JSONL file; plain rows that name no card are of `card`, if that is given.

    Raises one `RoutingDataError` that lists every bad row with its line.
    """
    examples: list[RoutingExample] = []
    problems: list[str] = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            examples.append(_example(_of_card(json.loads(line), card)))
        except ValueError as error:  # JSON's own errors and UTF-8's are ValueErrors
            problems.append(f"{path}:{number}: {error}")
    if problems:
        raise RoutingDataError(_listed(problems), hint="mend these rows; none of the file was used")
    return examples


def _of_card(row: Any, card: str | None) -> Any:
    plain = isinstance(row, dict) and "text" in row
    return row | {"card": card} if plain and card is not None and "card" not in row else row


def write_dataset(
    sources: Mapping[str | None, Sequence[RoutingExample]],
    directory: Path,
    *,
    seed: int = 0,
    val: float = 0.1,
    eval: float = 0.1,
) -> DatasetReport:
    """Write `train.jsonl`, `val.jsonl`, `eval.jsonl` and `metadata.json`, with equally many rows of every card.

    The smallest source decides how many; `val` and `eval` are shares of it. Rows out of scope come under the key None
    and may be fewer. No text is in two splits. Raises `RoutingDataError`.
    """
    if min(val, eval) < 0 or val + eval >= 1:
        raise RoutingDataError(f"expected shares val and eval that leave something to train on, got {val} and {eval}")
    distinct, repeated, ambiguous = _distinct(sources)
    names = [name for name in distinct if name is not None]
    splits = _split(distinct, random.Random(seed), val=val, held_out=eval)
    directory.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        lines = [json.dumps(_row(example, names), ensure_ascii=False) for example in rows]
        (directory / f"{split}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    counts = {split: _counted(rows, distinct) for split, rows in splits.items()}
    report = DatasetReport(directory=directory, counts=counts, repeated=repeated, ambiguous=ambiguous)
    _write_metadata(report, names, seed)
    return report


def _example(row: Any) -> RoutingExample:
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {_shown(row)}")
    return _from_conversation(row) if "conversations" in row else _from_plain(row)


def _from_plain(row: Mapping[str, Any]) -> RoutingExample:
    text = _text(row, "text")
    if not text.strip():
        raise ValueError("expected a text of at least one character, got none")
    optional = {key: _optional(row, key) for key in ("label", "answer", "image", "id")}
    return RoutingExample(text=text, card=_card(row, "card"), **optional)


def _from_conversation(row: Mapping[str, Any]) -> RoutingExample:
    metadata = row.get("metadata")
    if not isinstance(metadata, dict):
        raise ValueError(f'expected "metadata" to be an object, got {_shown(metadata)}')
    card, image = _card(metadata, "adapter"), _optional(row, "image")
    asked, said = _turns(row["conversations"])
    text = (asked if image is None else asked.replace(_IMAGE, "")).strip().removesuffix(QUESTION).strip()
    if not text and image is None:
        raise ValueError("expected a text or an image, got neither")
    # Where the conversation is the task itself, not the question of who should do it, its end is the task's answer.
    answer = _optional(metadata, "answer") if said == (card or NONE) else said
    return RoutingExample(
        text=text, card=card, label=_optional(metadata, "intent"), answer=answer, image=image, id=_optional(row, "id")
    )


def _turns(conversations: Any) -> tuple[str, str]:
    """What the human said last, and the answer to it."""
    if not isinstance(conversations, list) or not all(isinstance(turn, dict) for turn in conversations):
        raise ValueError(f'expected "conversations" to be a list of objects, got {_shown(conversations)}')
    said = {_text(turn, "from"): _text(turn, "value") for turn in conversations}
    if missing := {"human", "gpt"} - said.keys():
        raise ValueError(f"expected turns from human and gpt, got none from {sorted(missing)[0]}")
    return said["human"], said["gpt"]


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise ValueError(f'expected "{key}" to be a string, got {_shown(value)}')
    return value


def _optional(row: Mapping[str, Any], key: str) -> str | None:
    return None if row.get(key) is None else _text(row, key)


def _card(row: Mapping[str, Any], key: str) -> str | None:
    if key not in row:
        raise ValueError(f'expected "{key}", the name of a card or null for out of scope, got none')
    if row[key] is None:
        return None
    name = _text(row, key)
    if name in ("", NONE):
        raise ValueError(f'expected "{key}" to name a card, got {name!r}; write null for out of scope')
    return name


def _distinct(
    sources: Mapping[str | None, Sequence[RoutingExample]],
) -> tuple[dict[str | None, list[RoutingExample]], int, dict[str, tuple[str, ...]]]:
    """The sources with every text once and no text twice, how many repeats went, and the texts of several cards."""
    owners: dict[str, set[str]] = defaultdict(set)
    for card, examples in sources.items():
        for example in examples:
            if example.card != card:
                raise RoutingDataError(f"expected examples of card {card!r}, got one of {example.card!r}")
            owners[_key(example)].add(card or NONE)
    ambiguous = {text: tuple(sorted(cards)) for text, cards in owners.items() if len(cards) > 1}
    distinct = {card: list({_key(example): example for example in rows}.values()) for card, rows in sources.items()}
    repeated = sum(map(len, sources.values())) - sum(map(len, distinct.values()))
    kept = {card: [row for row in rows if _key(row) not in ambiguous] for card, rows in distinct.items()}
    return kept, repeated, ambiguous


def _split(
    sources: Mapping[str | None, Sequence[RoutingExample]], rng: random.Random, *, val: float, held_out: float
) -> dict[str, list[RoutingExample]]:
    smallest = min((len(rows) for card, rows in sources.items() if card is not None), default=0)
    splits: dict[str, list[RoutingExample]] = {split: [] for split in SPLITS}
    for card, rows in sorted(sources.items(), key=lambda source: len(source[1])):
        count = min(len(rows), smallest)
        first, second = round(count * val), round(count * val) + round(count * held_out)
        if count <= second:
            raise RoutingDataError(f"expected more distinct texts of card {card!r}, got {len(rows)}, so no row trains")
        drawn = rng.sample(rows, count)
        splits["val"] += drawn[:first]
        splits["eval"] += drawn[first:second]
        splits["train"] += drawn[second:]
    return {split: rng.sample(rows, len(rows)) for split, rows in splits.items()}


def _row(example: RoutingExample, names: Sequence[str]) -> dict[str, Any]:
    """The row's conversation form; `label` is the card's index, as in `metadata.json`."""
    system, user = routing_prompt(example.text, names)
    asked = user["content"] if example.image is None else f"{_IMAGE}\n{user['content']}"
    metadata = {
        "adapter": example.card,
        "label": None if example.card is None else names.index(example.card),
        "intent": example.label,
        "answer": example.answer,
    }
    row = {
        "id": example.id,
        "image": example.image,
        "conversations": [
            {"from": "system", "value": system["content"]},
            {"from": "human", "value": asked},
            {"from": "gpt", "value": example.card or NONE},
        ],
        "metadata": {key: value for key, value in metadata.items() if value is not None or key == "adapter"},
    }
    return {key: value for key, value in row.items() if value is not None}


def _counted(rows: Iterable[RoutingExample], cards: Iterable[str | None]) -> dict[str, int]:
    held = [example.card for example in rows]
    return {card or NONE: held.count(card) for card in cards}


def _write_metadata(report: DatasetReport, names: Sequence[str], seed: int) -> None:
    fields = {key: value for key, value in asdict(report).items() if key != "directory"}
    metadata = {
        "cards": {name: index for index, name in enumerate(names)},
        "seed": seed,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **fields,
    }
    text = json.dumps(metadata, indent=2, ensure_ascii=False)
    (report.directory / "metadata.json").write_text(f"{text}\n", encoding="utf-8")


def _key(example: RoutingExample) -> str:
    """Two examples with the same key are the same prompt: case and white space do not count, the image does."""
    text = " ".join(example.text.casefold().split())
    return text if example.image is None else f"{text} {_IMAGE}{example.image}"


def _listed(problems: Sequence[str]) -> str:
    more = len(problems) - _SHOWN_PROBLEMS
    shown = "\n  ".join(problems[:_SHOWN_PROBLEMS])
    return f"{len(problems)} bad rows:\n  {shown}" + (f"\n  … and {more} more" if more > 0 else "")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}…"


__all__ = [
    "NONE",
    "QUESTION",
    "DatasetReport",
    "RoutingDataError",
    "RoutingExample",
    "read_examples",
    "routing_prompt",
    "write_dataset",
]
