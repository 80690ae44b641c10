"""The same night for an encoder: an unseen domain is noticed, learnt by a contrastive loss, and routed around.

What is scored is the intent of the nearest example; texts that other cards or none answer must come out bit for bit.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from arrowmoe.demo.shipped import shipped_cards
from arrowmoe.features import Vectors
from arrowmoe.settings import EvolutionSettings
from benchmarks.night_home import EMBEDDER, Home, opened
from benchmarks.night_measures import Bools, Clock, Part, compared, noticed
from benchmarks.night_tasks import Family, labelled, stray
from evolution.evaluation import nearest_is_right
from evolution.protocols import Example
from evolution.skill_distiller import Recipe

CARDS = ("review-verdict", "log-severity")
RECIPE = Recipe(asks_prompts=True, writes=False, most_examples=400)
STRAY = 40


def encoder(clock: Clock) -> Part:
    """One night of MiniLM on a domain of CLINC150."""
    part, family, others = Part(), labelled(), [*map(_shipped, CARDS)]
    covered = {one.prompt: other.name for other in others for one in other.test}
    rest = [*covered, *stray()[:STRAY]]
    with (
        tempfile.TemporaryDirectory() as directory,
        opened(
            Path(directory), family.traffic, settings=EvolutionSettings(), recipe=RECIPE, base=EMBEDDER, cards=CARDS
        ) as home,
    ):
        home.encoded([*_texts(family.traffic), *rest], "auto", watched=True)
        before = Seen.of(home, [family, *others], rest)
        found = noticed(home, 0, covered | dict.fromkeys(_texts(family.traffic), family.name), family.name, {*CARDS})
        clock.say(f"encoder: auroc {found.auroc:.3f}, clustered {found.clustered:.2f}, gaps {found.gaps}")
        night = home.evolution.run()
        assert night is not None
        clock.say(f"encoder: {night.to_json()}")
        after = Seen.of(home, [family, *others], rest)
    scores = {name: compared(after.right[name], before.right[name]) for name in after.right}
    moved = np.array([one != other for one, other in zip(after.cards, before.cards, strict=True)])
    changed = (after.vectors != before.vectors).any(axis=1)
    part.figures |= {"scores": scores, "night": night.to_json(), "auroc": found.auroc, "clustered": found.clustered}
    part.figures |= {"other_texts": len(rest), "decided_otherwise": int(moved.sum())}
    own = scores[family.name]
    part.ask("encoder: detector AUROC", found.auroc, ">=", 0.85)
    part.ask("encoder: rise of the nearest neighbour's accuracy (points)", own["after"] - own["before"], ">=", 5.0)
    part.ask("encoder: McNemar p", own["p_value"], "<=", 0.001)
    part.ask("encoder: other texts that changed, decided as before", int((changed & ~moved).sum()), "<=", 0)
    for other in others:
        score = scores[other.name]
        part.ask(f"encoder: fall of {other.name} (points)", score["before"] - score["after"], "<=", 2.0)
    clock.say(f"encoder: {scores}")
    return part


@dataclass(frozen=True, kw_only=True)
class Seen:
    """How things stand: test items whose nearest example has their label, and of other texts the card and vector."""

    right: dict[str, Bools]
    cards: list[tuple[str, ...]]
    vectors: Vectors

    @classmethod
    def of(cls, home: Home, families: Sequence[Family], texts: Sequence[str]) -> Seen:
        """Now; each text in a batch of its own, for in a mixed one the cards of other rows decide how sums round."""
        gates = home.engine.resolve("auto", texts)
        return cls(
            right={family.name: _right(home, family) for family in families},
            cards=[gates.rows([row]).adapters for row in range(len(texts))],
            vectors=np.concatenate([home.encoded([text], "auto") for text in texts]),
        )


def _shipped(name: str) -> Family:
    """What ships with a card: the texts that it searches, and those that it is scored on."""
    [card] = [card for card in shipped_cards() if card.name == name]
    traffic, test = (
        [Example(prompt=one.text, answer=one.wanted) for one in some] for some in (card.reference, card.heldout)
    )
    return Family(name=name, traffic=tuple(traffic), test=tuple(test))


def _right(home: Home, family: Family) -> Bools:
    """Whether each test item's nearest text of the traffic has its intent, all as they are served."""
    items, support = ([*some] for some in (family.test, family.traffic))
    rows, found = (home.encoded(_texts(some), "auto") for some in (items, support))
    return nearest_is_right(items, rows, support, found)


def _texts(examples: Sequence[Example]) -> list[str]:
    return [one.prompt for one in examples]
