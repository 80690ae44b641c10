"""Which items of earlier tasks are kept for replay: a fixed number in all, however many tasks there were.

Each group (a class of images, a task of texts) has the same share; as groups come, the ones that are there give way,
those with the lowest score first. With losses as scores that is SuRe's rule (arXiv:2511.22367), with random numbers a
random choice. Items are named, not copied: the data of earlier tasks must stay where it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from evolution.errors import TrainingError


@dataclass(frozen=True, kw_only=True)
class Item:
    """A row of a task's data; `group` tells classes of one task apart."""

    task: int
    row: int
    group: int
    score: float


def refreshed(kept: Iterable[Item], new: Iterable[Item], items: int) -> tuple[Item, ...]:
    """At most `items` of both. What a group has too few of goes to the others. Raises `TrainingError`."""
    ordered = sorted([*kept, *new], key=lambda item: (item.task, item.group, -item.score, item.row))
    groups = [list(rows) for _, rows in groupby(ordered, key=lambda item: (item.task, item.group))]
    if len(groups) > items:
        raise TrainingError(f"expected a replay of at least {len(groups)} items, one for each group, got {items}")
    return tuple(
        item for rows, room in zip(groups, _rooms([len(rows) for rows in groups], items), strict=True)
        for item in rows[:room]
    )  # fmt: skip


def _rooms(sizes: Sequence[int], items: int) -> list[int]:
    """`items` shared out to groups of these sizes, as evenly as they can take it."""
    rooms = [0] * len(sizes)
    order = sorted(range(len(sizes)), key=lambda group: sizes[group])
    for place, group in enumerate(order):
        rooms[group] = min(sizes[group], -(-(items - sum(rooms)) // (len(sizes) - place)))
    return rooms


__all__ = ["Item", "refreshed"]
