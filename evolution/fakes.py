"""Stand-ins to try the night with, without a model, a router's space or a teacher: words are topics.

A text's topic is its first word. Texts of one topic lie near each other in `FakeRoutes`, and a card takes the topics
that it was described with.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from evolution.protocols import Cover, Example, Floats, Kind, Reply, Theme, Use, Uses, Vectors
from registry.card import LoRACard
from registry.entries import CardEntry

DIMENSION = 48
SPREAD = 0.08

Knows = Callable[[str, Use | None], str]
"""Prompt and what is applied → answer."""


@dataclass(frozen=True, kw_only=True)
class FakeStudent:
    """A `Student` that answers as `knows` says, surely; `drift_nats` is what any card costs on other texts."""

    knows: Knows
    base: str = "maker/tiny"
    kind: Kind = "causal"
    drift_nats: float = 0.0

    def answer(
        self,
        prompts: Sequence[str],
        uses: Uses,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> list[Reply]:
        """What `knows` says of each prompt."""
        said = [self.knows(prompt, use) for prompt, use in zip(prompts, uses, strict=True)]
        return [Reply(text=text, tokens=len(text.split()), sequence_nats=0.0) for text in said]

    def losses(self, examples: Sequence[Example], uses: Uses) -> Floats:
        """One nat (n,), and the drift where a card is applied."""
        return np.array([1.0 if use is None else 1.0 + self.drift_nats for use in uses])

    def divergences(self, examples: Sequence[Example], uses: Uses) -> Floats:
        """The drift (n,) where a card is applied."""
        return np.array([0.0 if use is None else self.drift_nats for use in uses])

    def encode(self, texts: Sequence[str], uses: Uses) -> Vectors:
        """Unit rows (n, d) by topic."""
        return np.stack([vector(text) for text in texts])


@dataclass(frozen=True, kw_only=True)
class FakeStudents:
    """`Students` of one base each; `opened` lists what was loaded, in order."""

    students: Mapping[str, FakeStudent]
    opened: list[str] = field(default_factory=list)

    def kind(self, base: str) -> Kind:
        """Whether `base` writes answers or encodes texts."""
        return self.students[base].kind

    @contextmanager
    def open(self, base: str) -> Iterator[FakeStudent]:
        """The student of `base`."""
        self.opened.append(base)
        yield self.students[base]


@dataclass(frozen=True, kw_only=True)
class FakeRoutes:
    """`Routes` by topic: `cards` lists the cards here, `offers` those that are with peers only."""

    cards: Callable[[], Iterable[CardEntry]]
    offers: Callable[[], Iterable[CardEntry]] = tuple
    embedder: str = "topics"

    def features(self, texts: Sequence[str]) -> Vectors:
        """Unit rows (n, d), near each other for one topic."""
        return np.stack([vector(text) for text in texts]) if texts else np.zeros((0, DIMENSION), np.float32)

    def covers(self, texts: Sequence[str], *, base: str, candidate: LoRACard | None = None) -> list[Cover]:
        """The first card with the text's topic: the candidate, one that is here, one that is offered."""
        known: dict[str, Cover] = {}
        for card in () if candidate is None else (candidate,):
            cover = Cover(accepted=True, digest=card.digest, name=card.name, p_value=0.5)
            known |= dict.fromkeys(card.manifest.domains, cover)
        for cards, virtual in ((self.cards(), False), (self.offers(), True)):
            for entry in (entry for entry in cards if entry.base_name == base):
                cover = Cover(accepted=True, digest=entry.digest, name=entry.name, p_value=0.5, virtual=virtual)
                known = dict.fromkeys(entry.domains, cover) | known
        return [known.get(topic(text), Cover(accepted=False)) for text in texts]

    def describe(self, card: LoRACard, prompts: Sequence[str], held_out: Sequence[str]) -> LoRACard:
        """`card` for the topics of `prompts`."""
        return card.describe(domains=sorted({topic(prompt) for prompt in prompts}))


@dataclass(frozen=True, kw_only=True)
class ScriptedTeacher:
    """A `Teacher` that says what `knows` does, and writes `writes`; `asked` holds every prompt that it was sent."""

    knows: Callable[[str], str | None]
    writes: Sequence[Example] = ()
    name: str = "scripted"
    asked: list[str] = field(default_factory=list)

    def answer(self, prompts: Sequence[str], *, theme: Theme) -> list[str | None]:
        """What it knows of each prompt."""
        self.asked.extend(prompts)
        return [self.knows(prompt) for prompt in prompts]

    def write(self, theme: Theme, count: int, *, avoid: Sequence[str] = ()) -> list[Example]:
        """The first of its examples that are not to be avoided."""
        return [one for one in self.writes if one.prompt not in set(avoid)][:count]


def topic(text: str) -> str:
    """The first word."""
    return text.split(maxsplit=1)[0].casefold() if text.strip() else ""


def vector(text: str) -> Vectors:
    """A unit vector (d,): the topic's direction, and a little of the text's own."""
    centre, own = (_drawn(word) for word in (topic(text), text))
    mixed = centre / np.linalg.norm(centre) + SPREAD * own
    return np.asarray(mixed / np.linalg.norm(mixed), np.float32)


def _drawn(text: str) -> Floats:
    return np.random.default_rng(zlib.crc32(text.encode())).standard_normal(DIMENSION)


__all__ = ["FakeRoutes", "FakeStudent", "FakeStudents", "ScriptedTeacher", "topic", "vector"]
