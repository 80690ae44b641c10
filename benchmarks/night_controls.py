"""What must publish nothing: a night after ordinary requests only, and one whose teacher's answers are shuffled."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

from arrowmoe.settings import EvolutionSettings
from benchmarks.night_home import Home, opened
from benchmarks.night_measures import Clock, Part
from benchmarks.night_tasks import SEED, around, intents
from evolution.protocols import Example
from evolution.skill_distiller import Recipe

ORDINARY, STRAY = 72, 16


def controls(clock: Clock, recipe: Recipe, settings: EvolutionSettings) -> Part:
    """Two nights in one home."""
    part, other, family = Part(), around(), intents()
    covered = [one.prompt for one in other.covered[: 2 * ORDINARY]]
    with (
        tempfile.TemporaryDirectory() as directory,
        opened(Path(directory), _shuffled(family.traffic), settings=settings, recipe=recipe) as home,
    ):
        quiet = _night(clock, home, [*covered[:ORDINARY], *other.stray[:STRAY]])
        shuffled = _night(clock, home, [*(one.prompt for one in family.traffic), *covered[ORDINARY:]])
    part.figures |= {"without_a_gap": quiet, "shuffled": shuffled}
    part.ask("published in a night without a gap", len(quiet["published"]), "<=", 0)
    part.ask("published from shuffled answers", len(shuffled["published"]), "<=", 0)
    part.ask("rejected for shuffled answers", len(shuffled["rejected"]), ">=", 1)
    return part


def _night(clock: Clock, home: Home, prompts: Sequence[str]) -> dict[str, list[str]]:
    """What a night after these requests published, and why it did not."""
    home.served(prompts, watched=True)
    night = home.evolution.run()
    assert night is not None
    said = night.to_json()
    clock.say(f"control: {said}")
    return {"published": said["published"], "rejected": [*said["rejected"].values()]}


def _shuffled(items: Sequence[Example]) -> list[Example]:
    """The same prompts and answers, put together by chance."""
    answers = [one.answer for one in items]
    random.Random(SEED).shuffle(answers)
    return [Example(prompt=one.prompt, answer=answer) for one, answer in zip(items, answers, strict=True)]
