"""Measures what the layouts of the gated sum cost on this device, and fits the prices that choose between them.

Each trial runs one layout over many modules' adapters in turn, as a forward pass does, so that weights come from memory
and not from a cache. Prices minimise the relative error, and none is negative.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from itertools import product

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from arrowmoe.lora.costs import Layout, Prices, Work, layouts_on, work
from arrowmoe.lora.grouped import Grouped, add_grouped
from arrowmoe.lora.layouts import ModuleLayouts
from arrowmoe.lora.mixing import Form, Mixing
from evolution import gated
from evolution.gated import Concatenated, LowRank

Shape = tuple[int, int]
Clock = Callable[[], float]
MODULES_BYTES = 32 << 20  # more than a CPU's caches hold
MAX_MODULES = 24
ROUNDS = 4


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A batch at modules of one shape (d_in, d_out): rows, tokens per row, and the ranks of the adapters they share."""

    shape: Shape
    rows: int
    tokens: int
    ranks: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Seconds that a layout took at one module, and its work."""

    trial: Trial
    layout: Layout
    work: Work
    seconds: float


def trials(shapes: Sequence[Shape]) -> list[Trial]:
    """Decode steps and prefills of small and large batches, with one to 32 adapters of equal or unequal ranks."""
    ranks = [(8,), (8,) * 4, (8,) * 32, (64, 1, 1, 1)]
    return [
        Trial(shape=shape, rows=rows, tokens=tokens, ranks=some)
        for shape, rows, tokens, some in product(shapes, (8, 32), (1, 16), ranks)
        if len(some) <= rows
    ]


def measure(trial: Trial, device: torch.device, dtype: torch.dtype, clock: Clock = time.perf_counter) -> list[Sample]:
    """Each layout, in turn within a round; the fastest round, which other work on the machine disturbed least."""
    gates = torch.eye(len(trial.ranks))[torch.arange(trial.rows) % len(trial.ranks)]
    modules = [_adapters(trial, device, dtype) for _ in range(_count(trial))]
    mixing = Mixing(gates.to(device, dtype), gates, Form.of(list(enumerate(modules[0]))))
    x = torch.randn((trial.rows, trial.tokens, trial.shape[0]), device=device).to(dtype)
    y = torch.zeros((trial.rows, trial.tokens, trial.shape[1]), device=device, dtype=dtype)
    layouts = layouts_on(device)
    passes = {layout: list(_passes(layout, modules, mixing, x, y)) for layout in layouts}
    seconds: dict[Layout, list[float]] = {layout: [] for layout in layouts}
    for _ in range(ROUNDS):
        for layout, calls in passes.items():
            seconds[layout].append(_timed(calls, device, clock) / len(calls))
    return [
        Sample(trial=trial, layout=layout, work=amount, seconds=min(seconds[layout]))
        for layout in layouts
        if (amount := work(layout, mixing.sizes(), trial.tokens, sum(trial.shape))) is not None
    ]


def fit(samples: Sequence[Sample]) -> Prices:
    """The prices, none negative, with the least squared relative error."""
    seconds = np.array([sample.seconds for sample in samples])
    amounts = np.array([astuple(sample.work) for sample in samples]) / seconds[:, None]
    scale = np.maximum(amounts.max(axis=0), np.finfo(float).tiny)
    found, _ = nnls(amounts / scale, np.ones(len(samples)))
    return Prices(**dict(zip((field.name for field in fields(Prices)), map(float, found / scale), strict=True)))


def regret(samples: Sequence[Sample], prices: Prices) -> float:
    """Mean over trials of (seconds of the layout that `prices` choose ÷ those of the fastest) − 1."""
    by_trial: dict[Trial, list[Sample]] = {}
    for sample in samples:
        by_trial.setdefault(sample.trial, []).append(sample)
    return statistics.mean(
        min(some, key=lambda one: one.work.seconds(prices)).seconds / min(one.seconds for one in some) - 1
        for some in by_trial.values()
    )


def _passes(
    layout: Layout, modules: Sequence[Sequence[LowRank]], mixing: Mixing, x: Tensor, y: Tensor
) -> Iterator[Callable[[], object]]:
    for adapters in modules:
        layouts = ModuleLayouts()
        if layout == "by_row":
            rows = layouts.by_row(mixing.rows(adapters))
            yield lambda rows=rows: gated.add_by_row(y, x, rows)  # type: ignore[misc]
        elif layout == "segmented":
            segments = mixing.segments(adapters)
            yield lambda segments=segments: gated.add_segments(y, x, segments, mixing.units)  # type: ignore[misc]
        elif layout == "grouped":
            grouped = Grouped(groups=mixing.groups(x.shape[1]), pieces=layouts.pieces(adapters))
            yield lambda grouped=grouped: add_grouped(y, x, grouped, mixing.units)  # type: ignore[misc]
        else:
            a, b = layouts.concatenated(adapters)
            joined = Concatenated(a=a, b=b, coefficients=mixing.coefficients())
            yield lambda joined=joined: gated.add_joined(y, x, joined)  # type: ignore[misc]


def _timed(calls: Sequence[Callable[[], object]], device: torch.device, clock: Clock) -> float:
    with torch.inference_mode():
        _wait(device)
        start = clock()
        for call in calls:
            call()
        _wait(device)
        return clock() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _adapters(trial: Trial, device: torch.device, dtype: torch.dtype) -> list[LowRank]:
    d_in, d_out = trial.shape
    return [
        LowRank(
            a=torch.randn((rank, d_in), device=device).to(dtype),
            b=torch.randn((d_out, rank), device=device).to(dtype).T / rank,
            scaling=1.0,
        )
        for rank in trial.ranks
    ]


def _count(trial: Trial) -> int:
    """How many modules it takes until no cache holds them."""
    return max(2, min(MAX_MODULES, MODULES_BYTES // (4 * sum(trial.ranks) * sum(trial.shape))))


__all__ = ["Sample", "Trial", "fit", "measure", "regret", "trials"]
