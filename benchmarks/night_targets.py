"""Where to adapt: the MLPs, all linear layers, or where a probe points; one task, about as many parameters each.

    python -m benchmarks.night_targets [--seeds 1] [--threads 2]

SmolLM2-135M learns to write dates in ISO 8601 from 120 examples in 40 steps, with the shipped replay, three times over:
MLP at rank 8, all at rank 5 (a third of a percent more parameters), hot for what the MLP costs. Held-out prompts share
neither sentence, instruction nor day with them. KL(bare ‖ adapted) is on the shipped general texts, none of which is in
the replay. Seconds are those of the whole training: loading, the probe, the steps.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, Final

import numpy as np
import torch

from arrowmoe.base_model import load_base_model
from arrowmoe.engine import ArrowEngine
from arrowmoe.students import EngineStudent
from arrowmoe.training import train_from_file
from benchmarks.harness import Target, report
from benchmarks.night_measures import Clock
from benchmarks.routing_measures import rounded
from evolution.anchors import general_texts, replay
from evolution.evaluation import matches
from evolution.examples import write_examples
from evolution.protocols import Example, Use
from evolution.target_plan import Plan, read_plan
from evolution.training_job import ADAPTER, ByName, FineTuning, ModelSpec, Probe, Replay, Targets, TrainingJob
from registry.card import LoRACard
from scripts.demo_cards.dates import iso_dates

BASE = "builtin:smollm2"
TRAINING, HELD_OUT, STEPS, MAX_NEW_TOKENS = 120, 40, 40, 16
RANKS: Final[dict[Targets, int]] = {"mlp": 8, "all": 5, "hot": 8}
MOST_LOST_POINTS = 5.0
Figures = dict[str, Any]


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each plan, whose mean is held to the bars")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock, pairs = Clock(), iso_dates()
    training = [Example(prompt=pair.prompt, answer=pair.answer) for pair in pairs.train[:TRAINING]]
    held_out = [Example(prompt=pair.prompt, answer=pair.answer) for pair in pairs.heldout[:HELD_OUT]]
    student = EngineStudent(ArrowEngine(load_base_model(BASE, device="cpu")))
    bare = examined(student, None, held_out)
    clock.say(f"bare base: {rounded(bare)}")
    runs: dict[Targets, list[Figures]] = {name: [] for name in RANKS}
    with tempfile.TemporaryDirectory() as directory:
        for seed in range(arguments.seeds):
            for name in RANKS:
                job = job_of(name, student.base, seed, training, Path(directory))
                runs[name].append(trained(job) | examined(student, card_of(job), held_out))
                clock.say(f"{name}, seed {seed}: {rounded(runs[name][-1])}")
    means = {name: averaged(found) for name, found in runs.items()}
    report("night_targets", "the MLPs alone, the night's default", targets(means), rounded({"bare": bare} | runs))


def job_of(name: Targets, base: str, seed: int, training: Sequence[Example], directory: Path) -> TrainingJob:
    """The night's training, at one scale, alpha / rank = 2."""
    for file, examples in (("training", training), ("replay", replay())):
        write_examples(directory / f"{file}.jsonl", examples)
    by_name: ByName = "all" if name == "all" else "mlp"
    return TrainingJob(
        base=ModelSpec(model=BASE, name=base, device="cpu"),
        objective="sft",
        tuning=tuning(RANKS[name], by_name, seed),
        data_url=(directory / "training.jsonl").as_uri(),
        output_url=(directory / f"{name}-{seed}").as_uri(),
        replay=Replay(data_url=(directory / "replay.jsonl").as_uri()),
        probe=Probe() if name == "hot" else None,
    )


def tuning(rank: int, targets: ByName, seed: int) -> FineTuning:
    """What is the same for all plans."""
    return FineTuning(rank=rank, alpha=2 * rank, targets=targets, steps=STEPS, learning_rate=2e-3, seed=seed)


def trained(job: TrainingJob) -> Figures:
    """What training it cost, and where it adapted."""
    path, began_s = job.output.with_suffix(".json"), time.perf_counter()
    job.save(path)
    done = train_from_file(path)
    plan = plan_of(job)
    return {
        "parameters": plan.parameters,
        "seconds": time.perf_counter() - began_s,
        "steps_seconds": done.seconds,
        "ranks": dict(plan.ranks) if plan.name == "hot" else {"each": job.tuning.rank, "modules": len(plan.ranks)},
    }


def plan_of(job: TrainingJob) -> Plan:
    """The plan that its training has left."""
    plan = read_plan(job.output, job.fingerprint())
    if plan is None:
        raise FileNotFoundError(f"expected a plan in {job.output}, got none")
    return plan


def card_of(job: TrainingJob) -> LoRACard:
    """Its adapter as a card."""
    return LoRACard.from_peft(job.output / ADAPTER, name=job.output.name)


def examined(student: EngineStudent, card: LoRACard | None, held_out: Sequence[Example]) -> Figures:
    """Exact match (%), nats per token of held-out answers, and KL in nats per token of general texts."""
    use, texts = None if card is None else Use(card=card), general_texts()
    replies = student.answer([one.prompt for one in held_out], [use] * len(held_out), max_new_tokens=MAX_NEW_TOKENS)
    right = [matches(one.answer, reply.text) for one, reply in zip(held_out, replies, strict=True)]
    return {
        "exact_match": 100 * float(np.mean(right)),
        "held_out_nats": float(student.losses(held_out, [use] * len(held_out)).mean()),
        "kl_nats": float(student.divergences(texts, [use] * len(texts)).mean()),
    }


def averaged(found: Sequence[Figures]) -> dict[str, float]:
    """The mean over seeds of every number."""
    return {name: mean(one[name] for one in found) for name, value in found[0].items() if not isinstance(value, dict)}


def targets(means: Mapping[Targets, Mapping[str, float]]) -> list[Target]:
    """The probe must cost no skill and forget no more, for as many parameters."""
    mlp, hot = means["mlp"], means["hot"]
    lift = hot["exact_match"] - mlp["exact_match"]
    return [
        Target(
            name="hot: KL on general texts (nats), at most the MLP's", value=hot["kl_nats"], op="<=", bar=mlp["kl_nats"]
        ),
        Target(name="hot: exact match over the MLP's (points)", value=lift, op=">=", bar=-MOST_LOST_POINTS),
        Target(name="hot: parameters", value=hot["parameters"], op="<=", bar=mlp["parameters"]),
    ]


if __name__ == "__main__":
    main()
