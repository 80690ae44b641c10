"""Learning task after task: what is forgotten, and what memory it takes, of two streams and by several ways to learn.

    python -m benchmarks.continual [--only digits|clinc] [--seeds 3] [--on test|val] [--quick] [--threads 2]

Five tasks of two digits each on a small vision transformer that never saw a digit, with all classes competing and no
task named; and four CLINC150 domains on SmolLM2, a sentence's intent being the answer. Figures are means over seeds.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import torch

from benchmarks.continual_arms import OURS, SEPARATE, SEQUENTIAL, Table, learnt, summary
from benchmarks.continual_base import Pretraining
from benchmarks.continual_streams import Split, Stream, clinc, digits
from benchmarks.harness import Target, report
from benchmarks.routing_measures import rounded, show

Build = Callable[[Path, int, Split], Stream]

QUICK_STEPS: Final = 4
STREAMS: Final[Mapping[str, Build]] = {
    "digits": lambda directory, seed, on: digits(directory, seed, on, Pretraining()),
    "clinc": clinc,
}
QUICK: Final[Mapping[str, Build]] = {
    "digits": lambda directory, seed, on: digits(directory, seed, on, Pretraining(steps=20)),
    "clinc": lambda directory, seed, on: clinc(directory, seed, on, limit=2),
}


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=tuple(STREAMS), help="one stream (default: both)")
    parser.add_argument("--seeds", type=int, default=3, help="orders of the tasks (default 3)")
    parser.add_argument("--first-seed", type=int, default=0, help="0 is reported; settings were chosen from 100 on")
    parser.add_argument("--on", choices=("test", "val"), default="test", help="what is scored (default test)")
    parser.add_argument("--quick", action="store_true", help="a few steps and items: does it run?")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    start, tables = time.perf_counter(), {}
    for name in [arguments.only] if arguments.only else list(STREAMS):
        build, steps = (QUICK[name], QUICK_STEPS) if arguments.quick else (STREAMS[name], None)
        seeds = range(arguments.first_seed, arguments.first_seed + (1 if arguments.quick else arguments.seeds))
        tables[name] = summary([_of_seed(build, seed, arguments.on, steps) for seed in seeds])
        show(f"{name}, mean over {len(seeds)} seeds (points)", tables[name])
    about = {"on": arguments.on, "seconds": time.perf_counter() - start, **tables}
    goals = [target for name, table in tables.items() for target in targets(name, table)]
    report("continual", "a LoRA for each task with an oracle; one LoRA in sequence", goals, rounded(about))


def targets(stream: str, table: Table) -> list[Target]:
    """What slow and fast must show."""
    ours, separate, sequential = (table[name] for name in (OURS, SEPARATE, SEQUENTIAL))
    behind = separate["average_accuracy"] - ours["average_accuracy"]
    third = sequential["forgetting"] / 3
    return [
        Target(name=f"{stream}: forgetting, points", value=ours["forgetting"], op="<=", bar=third),
        Target(name=f"{stream}: behind separate LoRAs with oracle, points", value=behind, op="<=", bar=3),
        Target(
            name=f"{stream}: adapters, last task ÷ second",
            value=ours["adapters_growth"],
            op="<=",
            bar=1,
        ),
    ]


def _of_seed(build: Build, seed: int, on: Split, steps: int | None) -> Table:
    with tempfile.TemporaryDirectory() as directory:
        return learnt(build(Path(directory), seed, on), seed, Path(directory), steps=steps)


if __name__ == "__main__":
    main()
