"""Three nights with SmolLM2-135M: each evening brings a kind of request that no card is for, the night an expert.

    python -m benchmarks.night [--quick] [--only nights|encoder|controls] [--threads 2]

Requests are asked of an engine with a router; what it notices, clusters, asks the teacher, trains in a child process,
examines and publishes is the product's own path. The teacher is a process on loopback that knows the training gold
only, is wrong one time in ten, refuses, stalls and fails; it is asked up to three times. Prompts go to it in full
(policy `full`), since nobody could describe facts that are invented. Headroom is up to gold, all of it right, which is
more than the teacher itself gets right. `--quick`: one night.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from arrowmoe.evolving import TRAIN
from arrowmoe.settings import EvolutionSettings
from benchmarks.harness import report
from benchmarks.night_controls import controls
from benchmarks.night_encoder import encoder
from benchmarks.night_home import MAX_NEW_TOKENS, Home, opened
from benchmarks.night_measures import Bools, Clock, Part, anchored, compared, nll, noticed, purity, right
from benchmarks.night_tasks import SEED, Around, Family, around, families
from benchmarks.routing_measures import rounded
from evolution.examples import read_examples, sieved, split, write_examples
from evolution.executors import LocalProcess
from evolution.journal import Job
from evolution.protocols import Example, Theme
from evolution.skill_distiller import Recipe
from evolution.training_job import FineTuning, TrainingJob, Validation
from registry.card import LoRACard

PARTS = ("nights", "encoder", "controls")
SETTINGS = EvolutionSettings(budget_tokens=5_000_000)
ORDINARY = (400, 72, 72)
STRAY, AGAIN, MIXED = 48, 12, 60
"""Requests of one evening beside the new family: covered by a card, on anything, and of each family learnt before.

The first evening is mostly ordinary, as evenings are: what is drawn from it at random is seldom of the family. `MIXED`:
of each family, where all come in one evening.
"""
COVERED = "tickets"
RECIPE = Recipe(
    tuning=FineTuning(alpha=32, layers=(12, 30), steps=100, learning_rate=2e-3),
    asks_prompts=True,
    writes=False,
    most_examples=320,
    precision="bfloat16",
    max_new_tokens=MAX_NEW_TOKENS,
)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="one night of the language model, no arm of random prompts, no encoder"
    )
    parser.add_argument("--only", choices=PARTS, help="one part")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = Clock()
    measures: dict[str, Callable[[], Part]] = {
        "nights": lambda: nights(clock, quick=arguments.quick),
        "encoder": lambda: encoder(clock),
        "controls": lambda: controls(clock, RECIPE, SETTINGS),
    }
    parts = {
        name: measures[name]() for name in PARTS[: 1 if arguments.quick else None] if arguments.only in (None, name)
    }
    targets = [target for part in parts.values() for target in part.targets]
    figures = {name: rounded(part.figures) for name, part in parts.items()}
    clock.say("done")
    print()
    report("night", "the bare base; the same recipe on prompts drawn at random from the traffic", targets, figures)


def nights(clock: Clock, *, quick: bool) -> Part:
    """One night for each family, and what is left of everything after the last."""
    chosen, other = families()[: 1 if quick else None], around()
    gold = [*(one for family in chosen for one in family.traffic), *other.covered]
    with (
        tempfile.TemporaryDirectory() as directory,
        opened(Path(directory), gold, settings=SETTINGS, recipe=RECIPE) as home,
    ):
        line = Line(home=home, clock=clock, families=chosen, around=other)
        for number in range(len(chosen)):
            line.night(number)
        line.remains()
        if not quick:
            if line.grown:
                line.random_arm()
            line.mixed()
    return line.part


@dataclass(kw_only=True)
class Line:
    """Nights in one home, one after another, and what they found."""

    home: Home
    clock: Clock
    families: Sequence[Family]
    around: Around
    part: Part = field(default_factory=Part)
    placed: list[tuple[str, str]] = field(default_factory=list)
    bare: dict[str, Bools] = field(default_factory=dict)
    served: dict[str, list[Bools]] = field(default_factory=dict)
    grown: list[str] = field(default_factory=list)

    def night(self, number: int) -> None:
        """An evening of requests, what was noticed of them, the night, and what its family is answered like now."""
        family = self.families[number]
        self.bare[family.name] = right(family.test, self.home.bare(_prompts(family.test)))
        self.home.served(self._evening(number), watched=True)
        self.clock.say(f"night {number + 1}, {family.name}: all requests asked")
        self._notice(number)
        found = self.home.evolution.run()
        assert found is not None
        self.grown += found.to_json()["published"]
        self.clock.say(f"night {number + 1}: {found.to_json()}")
        self._score(number)
        self.part.figures[f"night {number + 1}"] |= {"report": found.to_json(), "jobs": _jobs(found.jobs)}

    def random_arm(self) -> None:
        """The first night's training again, on as many prompts drawn at random from that evening.

        Both experts are applied to every test item, so that no router decides between them.
        """
        family, job = self.families[0], min(self.home.registry.home.glob("nights/job-*/job-1.json"))
        asked = len(read_examples(job.parent / "taught.jsonl"))
        prompts = random.Random(SEED).sample(self._evening(0), asked)
        answers = self.home.teacher.answer(prompts, theme=Theme(name="requests", description="Any requests."))
        taught = [Example(prompt=one, answer=said) for one, said in zip(prompts, answers, strict=True) if said]
        card = _trained(job, taught)
        self.home.engine.load_lora(card)
        chosen, drawn = (
            right(family.test, self.home.with_card(_prompts(family.test), one)) for one in (self.grown[0], card.name)
        )
        self.home.engine.remove_lora(card.name)
        found = compared(chosen, drawn)
        self.clock.say(f"random prompts, {len(taught)} of {asked} answered: {found}")
        own = {one.prompt for one in family.traffic}
        self.part.figures["random_arm"] = found | {
            "prompts": asked,
            "of_the_family": sum(one in own for one in prompts),
        }
        self.part.ask(f"{family.name}: accuracy over that of random prompts (points)", _lift(found), ">=", 0.1)
        self.part.ask(f"{family.name}: McNemar p against random prompts", found["p_value"], "<=", 0.05)

    def mixed(self) -> None:
        """All families in one evening of a new home: how purely gaps tell them apart."""
        families, other = self.families, self.around
        asked = [one for family in families for one in family.traffic[:MIXED]]
        with (
            tempfile.TemporaryDirectory() as directory,
            opened(Path(directory), asked, settings=SETTINGS, recipe=RECIPE) as home,
        ):
            home.served([*_prompts([*asked, *other.covered[: ORDINARY[0] // 2]]), *other.stray], watched=True)
            found = noticed(home, 0, self._family_of(), families[0].name, {COVERED})
        placed = [*found.placed.values()]
        share = sum(family in {one.name for one in families} for _, family in placed) / len(asked)
        self.clock.say(f"all families at once: {found.gaps} gaps, ARI {purity(placed):.3f}, {share:.2f} clustered")
        self.part.figures["mixed"] = {"gaps": found.gaps, "purity": purity(placed), "clustered": share}
        self.part.ask("purity of gaps, all families in one evening (ARI)", purity(placed), ">=", 0.8)

    def remains(self) -> None:
        """What the nights together have left of anchors, of general text, and of the first night's skill."""
        anchors, texts = anchored(self.home), nll(self.home)
        self.clock.say(f"anchors {anchors}, general text {texts}")
        self.part.figures |= {"anchors": anchors, "general_text": texts}
        if len(self.families) > 1:
            self.part.ask("purity of all nights' gaps (ARI)", purity(self.placed), ">=", 0.8)
        self.part.ask("anchors, most they may have fallen (points)", anchors["most_fall_points"], "<=", 5.0)
        self.part.ask("general text, rise of the NLL as served (nats)", texts["rise_nats"], "<=", 0.02)
        first, *_, last = self.served[self.families[0].name] * 2
        if len(self.families) > 1:
            name = f"{self.families[0].name}, fall since its own night (points)"
            self.part.ask(name, 100 * float(first.mean() - last.mean()), "<=", 2.0)
        sent = self.home.sent()
        leaked = sum(json.dumps(one.prompt)[1:-1] in sent for family in self.families for one in family.test)
        self.part.ask("test items in what the teacher was sent", leaked, "<=", 0)

    def _evening(self, number: int) -> list[str]:
        """What is asked before night `number`: the new family, covered and stray requests, and families of before."""
        start, stray = sum(ORDINARY[:number]), number * STRAY
        again = [one for family in self.families[:number] for one in family.traffic[:AGAIN]]
        others = [*self.around.covered[start : start + ORDINARY[number]], *again]
        return [*_prompts(self.families[number].traffic), *_prompts(others), *self.around.stray[stray : stray + STRAY]]

    def _notice(self, number: int) -> None:
        new, ordinary = self.families[number].name, {COVERED, *(one.name for one in self.families[:number])}
        found = noticed(self.home, number, self._family_of(), new, ordinary)
        self.placed += found.placed.values()
        said = {name: value for name, value in asdict(found).items() if name != "placed"}
        self.clock.say(f"noticed {said}")
        self.part.figures[f"night {number + 1}"] = {"family": new, "noticed": said}
        self.part.ask(f"{new}: detector AUROC", found.auroc, ">=", 0.85)

    def _family_of(self) -> dict[str, str]:
        families = {one.prompt: family.name for family in self.families for one in family.traffic}
        return families | {one.prompt: COVERED for one in self.around.covered}

    def _score(self, number: int) -> None:
        for family in self.families[: number + 1]:
            made = self.home.served(_prompts(family.test))
            self.served.setdefault(family.name, []).append(right(family.test, made))
            routed = sum(bool(one.adapters) for one in made) / len(made)
        name = self.families[number].name
        found = compared(self.served[name][-1], self.bare[name])
        closed = _lift(found) / max(1e-9, 100 - found["before"])
        self.clock.say(f"{found}, closed {closed:.2f}, routed {routed:.2f}; " + _shares(self.served))
        self.part.figures[f"night {number + 1}"]["test"] = found | {"closed": closed, "routed": routed}
        self.part.ask(f"{name}: headroom closed", closed, ">=", 0.8)
        self.part.ask(f"{name}: McNemar p", found["p_value"], "<=", 0.001)


def _trained(job_path: Path, taught: Sequence[Example]) -> LoRACard:
    """The card of that job's training on other examples."""
    directory = Path(tempfile.mkdtemp(dir=job_path.parent))
    job, recipe = TrainingJob.load(job_path), RECIPE
    exam = split(sieved(taught).kept, held_out_share=recipe.held_out_share, seed=recipe.seed)
    trial = split(exam.training, held_out_share=recipe.validation_share, seed=recipe.seed + 1)
    write_examples(directory / "training.jsonl", trial.training)
    write_examples(directory / "validation.jsonl", trial.held_out)
    other = job.model_copy(
        update={
            "data_url": (directory / "training.jsonl").as_uri(),
            "validation": Validation(data_url=(directory / "validation.jsonl").as_uri()),
            "output_url": (directory / "output").as_uri(),
        }
    )
    other.save(directory / "job.json")
    trained = LocalProcess(TRAIN).run(directory / "job.json", on_progress=lambda step: None)
    return LoRACard.from_peft(trained.adapter_dir, name="random-prompts", base_name=job.base.name)


def _jobs(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """What the gate said of each job, and how long its training took."""
    kept = ("teacher", "examples", "steps", "training_s", "label", "rejected", "round")
    return [{"key": job.key} | {name: job.outcome[name] for name in kept if name in job.outcome} for job in jobs]


def _prompts(items: Sequence[Example]) -> list[str]:
    return [one.prompt for one in items]


def _lift(found: dict[str, float]) -> float:
    return found["after"] - found["before"]


def _shares(served: dict[str, list[Bools]]) -> str:
    return ", ".join(f"{name} {100 * float(now[-1].mean()):.1f} %" for name, now in served.items())


if __name__ == "__main__":
    main()
