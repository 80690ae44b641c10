"""Anchors and replay that ship with the product and were written for it: what an expert must not unlearn.

Anchors are asked before and after a training; replay is mixed into its steps. No text is in both.
"""

from __future__ import annotations

import json
from importlib.resources import files
from itertools import groupby
from operator import itemgetter
from typing import Final

from evolution.protocols import Example

GENERAL: Final = "general"
"""The part of `anchors.jsonl` that is judged by its loss; the others are questions, judged by their answers."""


def anchors() -> dict[str, tuple[Example, ...]]:
    """Questions with short answers, by name: capitals, additions, common sense to be answered yes or no."""
    return {name: examples for name, examples in _sets().items() if name != GENERAL}


def general_texts() -> tuple[Example, ...]:
    """Short messages and replies on anything, for the loss."""
    return _sets()[GENERAL]


def replay() -> tuple[Example, ...]:
    """Short messages and replies on anything, to train on."""
    return tuple(Example(**row) for row in _rows("replay.jsonl"))


def _sets() -> dict[str, tuple[Example, ...]]:
    return {
        name: tuple(Example(prompt=row["prompt"], answer=row["answer"]) for row in rows)
        for name, rows in groupby(_rows("anchors.jsonl"), key=itemgetter("set"))
    }


def _rows(file: str) -> list[dict[str, str]]:
    text = files("evolution").joinpath(file).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


__all__ = ["GENERAL", "anchors", "general_texts", "replay"]
