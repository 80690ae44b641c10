"""What is measured of a night: what it noticed, what an expert can do, and what the rest has lost."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import adjusted_rand_score

from arrowmoe.generation import Generation
from arrowmoe.students import EngineStudent
from benchmarks.harness import Op, Target
from benchmarks.night_home import Home
from evolution.anchors import anchors, general_texts
from evolution.combiner import auroc
from evolution.evaluation import Matches, matches, mentions
from evolution.paired import least_difference, mcnemar, upper_mean
from evolution.protocols import Example, Use

Bools = npt.NDArray[np.bool_]
Placed = dict[str, tuple[str, str]]
"""By prompt: the gap it was put into, and the family that it is of."""
OTHER = "other"


@dataclass(kw_only=True)
class Part:
    """What one question found."""

    targets: list[Target] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def ask(self, name: str, value: float, op: Op, bar: float) -> None:
        """Hold a figure against its bar."""
        self.targets.append(Target(name=name, value=value, op=op, bar=bar))


class Clock:
    """Says what is done, and when."""

    def __init__(self) -> None:
        self._began_s = time.monotonic()

    def say(self, text: str) -> None:
        """Print a line with the seconds so far."""
        print(f"{time.monotonic() - self._began_s:6.0f} s  {text}", flush=True)


@dataclass(frozen=True, kw_only=True)
class Noticed:
    """What a survey saw of a night's new family among everything else that was asked."""

    auroc: float
    auroc_against_all: float
    clustered: float
    strangers: float
    gaps: int
    placed: Placed


def noticed(home: Home, night: int, family_of: Mapping[str, str], new: str, ordinary: Collection[str]) -> Noticed:
    """`auroc` is of the new family against requests of kinds that a card is there for, then against all others.

    `clustered` is the share of its prompts that are in gaps, `strangers` that of others among the prompts in gaps.
    """
    signals, scores = home.evolution.surveyor.scored(home.engine.name)
    wanted = np.array([family_of.get(signal.prompt) == new for signal in signals])
    known = np.array([family_of.get(signal.prompt) in ordinary for signal in signals])
    found = home.evolution.surveyor.look(home.engine.name)
    placed = {
        prompt: (f"{night}/{number}", family_of.get(prompt, OTHER))
        for number, one in enumerate(found)
        for prompt in one.gap.prompts
    }
    families = [family for _, family in placed.values()]
    total = len({signal.prompt for signal, new_one in zip(signals, wanted, strict=True) if new_one})
    return Noticed(
        auroc=auroc(scores[wanted | known], wanted[wanted | known]),
        auroc_against_all=auroc(scores, wanted),
        clustered=families.count(new) / total,
        strangers=1 - families.count(new) / max(1, len(families)),
        gaps=len(found),
        placed=placed,
    )


def purity(placed: Sequence[tuple[str, str]]) -> float:
    """Adjusted Rand index of gaps against families, over prompts that are in gaps."""
    gaps, families = zip(*placed, strict=True)
    return float(adjusted_rand_score(families, gaps))


def right(items: Sequence[Example], made: Sequence[Generation], same: Matches = matches) -> Bools:
    """(items,): whether each answer is the one wanted."""
    return np.array([same(item.answer, one.text) for item, one in zip(items, made, strict=True)])


def compared(after: Bools, before: Bools) -> dict[str, float]:
    """Accuracy of both (%), and McNemar's one-sided p-value that the first is no better."""
    gains, losses = int((after & ~before).sum()), int((before & ~after).sum())
    return {
        "after": 100 * float(after.mean()),
        "before": 100 * float(before.mean()),
        "p_value": mcnemar(gains, losses),
    }


def anchored(home: Home) -> dict[str, float]:
    """The shipped anchors, bare and served: accuracy (%), and the most that it may have fallen (points, 95 %)."""
    items = [item for some in anchors().values() for item in some]
    prompts = [item.prompt for item in items]
    bare, served = (right(items, ask(prompts), mentions) for ask in (home.bare, home.served))
    gains, losses = int((served & ~bare).sum()), int((bare & ~served).sum())
    return {
        "bare": 100 * float(bare.mean()),
        "served": 100 * float(served.mean()),
        "most_fall_points": -100 * least_difference(gains, losses, len(items)),
    }


def nll(home: Home) -> dict[str, float]:
    """General texts, bare and served: nats per token, and the most that they may have risen by (95 %)."""
    texts = general_texts()
    gates = home.engine.resolve("auto", [text.prompt for text in texts])
    rows = (gates.rows([row]).adapters for row in range(len(texts)))
    uses = [Use(card=digests[0]) if digests else None for digests in rows]
    student = EngineStudent(home.engine)
    bare, served = student.losses(texts, [None] * len(texts)), student.losses(texts, uses)
    return {
        "bare": float(bare.mean()),
        "served": float(served.mean()),
        "rise_nats": float((served - bare).mean()),
        "most_rise_nats": upper_mean(served - bare),
        "given_to_a_card": sum(use is not None for use in uses) / len(uses),
    }
