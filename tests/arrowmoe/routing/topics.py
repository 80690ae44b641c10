"""An embedder of topics: `north 7` is a unit vector near the direction of north, other words are somewhere else."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from arrowmoe.features import TextFeaturizer
from arrowmoe.routing import LoRARouter, Policy
from arrowmoe.routing.acceptance import Prompts, describe
from arrowmoe.routing.statistics import CardStatistics

DIMENSION = 24
TOPICS = ("east", "north", "west", "south")
SPREAD = 0.15


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a catalog says of a card."""

    digest: str
    name: str = "card"
    base_name: str | None = "base"
    description: str = ""
    examples: tuple[str, ...] = ()


@dataclass(kw_only=True)
class Topics:
    """Counts the texts it embeds."""

    name: str = "topics"
    asked: list[str] = field(default_factory=list)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        self.asked.extend(texts)
        return np.stack([_vector(text) for text in texts]).astype(np.float32)


def _vector(text: str) -> np.ndarray:
    noise = np.random.default_rng(zlib.crc32(text.encode())).standard_normal(DIMENSION)
    topic = text.partition(" ")[0]
    if topic not in TOPICS:
        return noise
    return 3 * (np.eye(DIMENSION)[TOPICS.index(topic)] + SPREAD * noise)


def prompts(topic: str, count: int, first: int = 0) -> list[str]:
    return [f"{topic} {number}" for number in range(first, first + count)]


def router(policy: Policy | None = None) -> LoRARouter:
    """A router that knows no card."""
    return LoRARouter(TextFeaturizer(Topics()), policy=policy)


def statistics(routes: LoRARouter, topic: str, count: int = 60) -> CardStatistics:
    """Calibrated statistics of a topic's prompts."""
    vectors = routes.features(prompts(topic, count)).vectors
    held_out = routes.features(prompts(topic, 200, first=10_000)).vectors
    given = Prompts(vectors=vectors, held_out=held_out)
    return describe(given, routes.probe, min_prompts=3, budget_bytes=65_536)
