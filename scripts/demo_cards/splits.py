"""The values every task's data is made of, and the JSON-lines form they are shipped in."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Generic, TypeVar

Example = TypeVar("Example")
Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One example for a language model: a user's message and the whole answer expected."""

    prompt: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """One example for an encoder."""

    text: str
    label: str


@dataclass(frozen=True, kw_only=True)
class Split(Generic[Example]):
    """What is trained on, what is scored, and (encoders) the labelled set that is searched."""

    train: tuple[Example, ...]
    heldout: tuple[Example, ...]
    reference: tuple[Example, ...] = ()


def pick(rng: random.Random, items: Sequence[Item]) -> Item:
    """One item, uniformly."""
    return items[rng.randrange(len(items))]


def write_jsonl(path: Path, examples: Iterable[Pair | Labelled]) -> None:
    """One JSON object a line, keys in field order."""
    lines = (json.dumps(asdict(example), ensure_ascii=False) for example in examples)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
