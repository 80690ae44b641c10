"""The exam: what a candidate gets right on held-out items of its gap, and what it does to everything else.

Each text is answered by the bare base, as the router serves it today, by the candidate, and as the router would serve
it with the candidate among the cards. Answers are greedy, so one that is known is not asked for again: probes of
several scales share those of base and incumbent. No item is ever dropped.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Generic, TypeVar

import numpy as np

from evolution.gate import Anchored, Bools, Losses, Results
from evolution.protocols import Cover, Example, Floats, Reply, Routes, Student, Use, Vectors
from registry.card import LoRACard

Key = TypeVar("Key")
Value = TypeVar("Value")
Asked = tuple[str, Use | None]
Arm = Callable[[str], Use | None]
Matches = Callable[[str, str], bool]


@dataclass(frozen=True, kw_only=True)
class Exam:
    """Held-out `items` of a gap, `anchors` by name, and general `texts` for the loss (a causal model's only).

    An encoder's items find their label among `support`, by default among themselves; each anchor is its own support.
    A peer that asks only for drift (`judge_drift`) has no items.
    """

    items: tuple[Example, ...]
    anchors: Mapping[str, tuple[Example, ...]] = field(default_factory=dict)
    texts: tuple[Example, ...] = ()
    support: tuple[Example, ...] = ()
    max_new_tokens: int = 32


class Examiner:
    """Puts candidates, each at several scales, to one exam on one student. Raises what student and routes raise."""

    def __init__(self, student: Student, routes: Routes, exam: Exam) -> None:
        self._student = student
        self._routes = routes
        self._exam = exam
        self._covers: _Known[LoRACard | None, Mapping[str, Cover]] = _Known()
        self._replies: _Known[Asked, Reply] = _Known()
        self._rows: _Known[Asked, Vectors] = _Known()
        self._losses: _Known[tuple[Example, Use | None], float] = _Known()

    def measure(self, candidate: LoRACard, scale: float = 1.0) -> Results:
        """Ask everything of the candidate, a card with routing statistics, applied at `scale`."""
        exam, applied = self._exam, Use(card=candidate, scale=scale)
        before, after = self._covers.of([None, candidate], self._cover)
        arms: dict[str, Arm] = {
            "base": lambda _: None,
            "today": lambda prompt: _served(before[prompt], applied),
            "served": lambda prompt: _served(after[prompt], applied),
            "applied": lambda _: applied,
        }
        support = exam.support or exam.items
        base, today, right = (
            self._right(exam.items, support, arms[arm], matches) for arm in ("base", "today", "applied")
        )
        return Results(
            base=base,
            incumbent=today,
            candidate=right,
            routed=np.array([_served(after[item.prompt], applied) is applied for item in exam.items], dtype=np.bool_),
            anchors={
                name: Anchored(**{arm: self._right(items, items, use, mentions) for arm, use in arms.items()})
                for name, items in exam.anchors.items()
            },
            losses=self._drift(arms, applied) if self._student.kind == "causal" else None,
            scale=scale,
        )

    def _right(self, items: Sequence[Example], support: Sequence[Example], arm: Arm, same: Matches) -> Bools:
        if not items:
            return np.zeros(0, dtype=np.bool_)
        if self._student.kind == "encoder":
            return nearest_is_right(items, self._encoded(items, arm), support, self._encoded(support, arm))
        replies = self._replies.of([(item.prompt, arm(item.prompt)) for item in items], self._answer)
        right = [same(item.answer, reply.text) for item, reply in zip(items, replies, strict=True)]
        return np.array(right, dtype=np.bool_)

    def _drift(self, arms: Mapping[str, Arm], applied: Use) -> Losses:
        texts = self._exam.texts
        nats = {
            arm: np.array(self._losses.of([(text, use(text.prompt)) for text in texts], self._lose), dtype=np.float64)
            for arm, use in arms.items()
        }
        return Losses(**nats, kl=self._student.divergences(texts, [applied] * len(texts)) if texts else np.zeros(0))

    def _encoded(self, items: Sequence[Example], arm: Arm) -> Vectors:
        return np.stack(self._rows.of([(item.prompt, arm(item.prompt)) for item in items], self._encode))

    def _cover(self, candidates: Sequence[LoRACard | None]) -> list[Mapping[str, Cover]]:
        exam = self._exam
        every = chain(exam.items, exam.support, *exam.anchors.values(), exam.texts)
        prompts = list(dict.fromkeys(example.prompt for example in every))
        ask = partial(self._routes.covers, prompts, base=self._student.base)
        return [dict(zip(prompts, ask(candidate=candidate), strict=True)) for candidate in candidates]

    def _answer(self, asked: Sequence[Asked]) -> list[Reply]:
        prompts, uses = zip(*asked, strict=True)
        return self._student.answer(prompts, uses, max_new_tokens=self._exam.max_new_tokens)

    def _encode(self, asked: Sequence[Asked]) -> Vectors:
        texts, uses = zip(*asked, strict=True)
        return self._student.encode(texts, uses)

    def _lose(self, asked: Sequence[tuple[Example, Use | None]]) -> Floats:
        examples, uses = zip(*asked, strict=True)
        return self._student.losses(examples, uses)


def matches(wanted: str, got: str) -> bool:
    """Whether both are the same answer but for case, white space, compatible Unicode forms and a final full stop."""
    return _plain(wanted) == _plain(got)


def mentions(wanted: str, got: str) -> bool:
    """Whether the first sentence of `got` holds the words of `wanted` in a row: what a model knows, not how it says so.

    Anchors are marked so, for an exact match would be blind to what a talkative base knows, and so to its loss.
    """
    first = re.split(r"(?<=\w)[.!?](?=\s|$)|\n", got.strip(), maxsplit=1)[0]
    return f" {' '.join(_words(wanted))} " in f" {' '.join(_words(first))} "


def nearest_is_right(items: Sequence[Example], rows: Vectors, support: Sequence[Example], found: Vectors) -> Bools:
    """Whether ŷᵢ = y_j for j = argmax ⟨rowsᵢ, found_j⟩ over the support but for the item's own text, is its label.

    `rows` (n, d) and `found` (m, d) are unit; items among their support are thus left out one by one. An item that has
    nobody else in the support is wrong.
    """
    texts, labels = np.array([one.prompt for one in support]), np.array([one.answer for one in support])
    own = np.array([item.prompt for item in items])[:, None] == texts
    likeness = np.where(own, -np.inf, rows @ found.T)
    hits = labels[likeness.argmax(axis=1)] == np.array([item.answer for item in items])
    right: Bools = hits & ~own.all(axis=1)
    return right


class _Known(Generic[Key, Value]):
    """Values by key; those that are missing are asked for together."""

    def __init__(self) -> None:
        self._values: dict[Key, Value] = {}

    def of(self, keys: Sequence[Key], ask: Callable[[Sequence[Key]], Iterable[Value]]) -> list[Value]:
        missing = list(dict.fromkeys(key for key in keys if key not in self._values))
        if missing:
            self._values.update(zip(missing, ask(missing), strict=True))
        return [self._values[key] for key in keys]


def _served(cover: Cover, candidate: Use) -> Use | None:
    """What the router would use; a card whose weights are only with a peer is not served yet."""
    if not cover.accepted or cover.digest is None:
        return None
    if isinstance(candidate.card, LoRACard) and cover.digest == candidate.card.digest:
        return candidate
    return None if cover.virtual else Use(card=cover.digest)


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(".").rstrip()


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())


__all__ = ["Exam", "Examiner", "matches", "mentions", "nearest_is_right"]
