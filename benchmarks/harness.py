"""Measuring: arms run in turn within one process, so that a noisy machine is noisy for all of them.

A benchmark's figure is the median over rounds of a ratio within a round; its last line is one JSON object.
"""

from __future__ import annotations

import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

Arm = Callable[[], object]
Op = Literal[">=", "<="]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """An arm with a step before it that is not timed."""

    arm: Arm
    prepare: Arm

    def __call__(self) -> object:
        """The timed part."""
        return self.arm()


@dataclass(frozen=True, kw_only=True)
class Target:
    """A figure with the bar that it is held against; `met` says whether it clears it."""

    name: str
    value: float
    op: Op
    bar: float

    @property
    def met(self) -> bool:
        """Whether `value` `op` `bar`."""
        return self.value >= self.bar if self.op == ">=" else self.value <= self.bar


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds of each arm, one per round."""

    seconds: Mapping[str, Sequence[float]]

    def median(self, arm: str) -> float:
        """Median seconds of one arm."""
        return statistics.median(self.seconds[arm])

    def ratio(self, arm: str, to: str) -> float:
        """Median over rounds of arm ÷ `to`, each pair from one round."""
        return statistics.median(a / b for a, b in zip(self.seconds[arm], self.seconds[to], strict=True))


def interleave(arms: Mapping[str, Arm], *, rounds: int, warmup: int = 1) -> Times:
    """Run the arms in turn, `rounds` times after `warmup`, every other round backwards."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(-warmup, rounds):
        for name in list(arms) if number % 2 == 0 else list(arms)[::-1]:
            elapsed = timed(arms[name])
            if number >= 0:
                seconds[name].append(elapsed)
    return Times(seconds=seconds)


def timed(arm: Arm) -> float:
    """Seconds of one call; the garbage collector waits, and what an arm must prepare is done before."""
    if isinstance(arm, Prepared):
        arm.prepare()
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        arm()
        return time.perf_counter() - start
    finally:
        gc.enable()


def report(name: str, compared_with: str, targets: Sequence[Target], figures: Mapping[str, Any]) -> None:
    """Print the targets for people, then everything as one JSON line."""
    for target in targets:
        verdict = "met" if target.met else "MISSED"
        print(f"{verdict:>7}  {target.name}: {target.value:.4g} {target.op} {target.bar:g}")
    result = {
        "benchmark": name,
        "compared_with": compared_with,
        "machine": {"cpu": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__},
        "targets": [asdict(target) for target in targets],
        "figures": figures,
    }
    print(json.dumps(result))
