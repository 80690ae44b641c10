"""A thousand cards, room for 64 of them: what tiers cost against an engine that holds all, on SmolLM2-135M.

    python -m benchmarks.residency [--requests 640] [--cards 1000]

Cards are of rank 1 on the query and value maps of all 30 layers (60 modules, 0.23 MB each), so that a thousand fit on
any disk; they lie in a registry and are asked for by name, the k-th most popular one with a probability of 1/k (Zipf).
Both engines answer the same batches of 32 requests in turn, and must give the same tokens.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import nn

from arrowmoe.base_model import BaseModel
from arrowmoe.engine import BATCH_ROWS, ArrowEngine
from benchmarks.adapters import smollm2
from benchmarks.cards import resident_bytes
from benchmarks.harness import Prepared, Target, interleave, report
from registry.card import LoRACard
from registry.manifest import AdapterSpec
from registry.store import Registry
from registry.tensor import Role, Tensor

HELD = 64
NEW_TOKENS = 8
WARMUP = 2
MODULES = ("q_proj", "v_proj")


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=640)
    parser.add_argument("--cards", type=int, default=1000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, Registry.open(Path(directory)) as registry:
        run(registry, arguments.cards, arguments.requests)


def run(registry: Registry, cards: int, requests: int) -> None:
    """Both engines over one registry."""
    base = smollm2()
    names = [registry.publish(card_of(base, index)).name for index in range(cards)]
    resident = ArrowEngine(replace(base, model=copy.deepcopy(base.model)), registry=registry)
    for name in names:
        resident.load_lora(name)
    card_bytes = resident.list_loras()[0].nbytes
    tiered = ArrowEngine(base, registry=registry, budget_bytes=HELD * card_bytes)
    rounds = max(4, requests // BATCH_ROWS)
    ours, all_there = Requests(tiered, names, rounds), Requests(resident, names, rounds)
    arms = {
        "tiered": Prepared(arm=ours, prepare=ours.prepare),
        "resident": Prepared(arm=all_there, prepare=all_there.prepare),
    }
    times = interleave(arms, rounds=rounds, warmup=WARMUP)
    report("residency", "the same engine with all cards on the device", [
        Target(
            name="throughput, room for 64 of 1,000 / all resident",
            value=times.ratio("resident", "tiered"),
            op=">=",
            bar=0.8,
        ),
        Target(name="answers that differ", value=differing(ours, all_there), op="<=", bar=0),
        Target(name="growth of memory in the second half (MB)", value=ours.grown_bytes() / 1e6, op="<=", bar=16),
        Target(
            name="slots on the device / budget", value=tiered.memory().slots / (HELD * card_bytes), op="<=", bar=1.0
        ),
    ], {
        "cards": cards,
        "card_mb": round(card_bytes / 1e6, 3),
        "requests": rounds * BATCH_ROWS,
        "batch_ms": {arm: round(1000 * times.median(arm), 1) for arm in arms},
        "requests_that_found_their_card_on_the_device": round(ours.hits / len(ours.answers) / BATCH_ROWS, 3),
        "slots_mb": {"tiered": tiered.memory().slots / 1e6, "resident": resident.memory().slots / 1e6},
        "resident_memory_mb": [round(size / 1e6) for size in ours.sizes[:: max(1, rounds // 10)]],
    })  # fmt: skip


class Requests:
    """An arm: one batch of Zipf requests after another, the same for every engine."""

    def __init__(self, engine: ArrowEngine, names: Sequence[str], rounds: int) -> None:
        self._engine = engine
        self._batches: Iterator[list[str]] = batches(names, rounds + WARMUP)
        self.answers: list[tuple[tuple[int, ...], ...]] = []
        self.sizes: list[int] = []
        self._wanted: list[str] = []
        self.hits = 0

    def __call__(self) -> None:
        """Answer the next batch."""
        prompts = [f"Request {index}: tell me about {name}." for index, name in enumerate(self._wanted)]
        self.answers.append(
            tuple(
                made.tokens for made in self._engine.generate(prompts, adapter=self._wanted, max_new_tokens=NEW_TOKENS)
            )
        )

    def prepare(self) -> None:
        """Before a batch, untimed: the process's memory, and whether the cards that it will ask for are there."""
        self.sizes.append(resident_bytes())
        there = {one.name for one in self._engine.residences() if one.tier == "device"}
        self._wanted = next(self._batches)
        self.hits += sum(name in there for name in self._wanted)

    def grown_bytes(self) -> float:
        """How far memory grew over the second half: the slope of a straight line times the rounds."""
        half = self.sizes[len(self.sizes) // 2 :]
        return float(np.polyfit(range(len(half)), half, 1)[0]) * len(half)


def batches(names: Sequence[str], count: int) -> Iterator[list[str]]:
    """`count` batches of names, the k-th with a probability of 1/k."""
    random = np.random.default_rng(0)
    shares = 1 / np.arange(1, len(names) + 1)
    for _ in range(count):
        yield [names[index] for index in random.choice(len(names), BATCH_ROWS, p=shares / shares.sum())]


def differing(one: Requests, other: Requests) -> int:
    """Answers that the two engines did not agree on."""
    pairs = zip(one.answers, other.answers, strict=True)
    return sum(left != right for ours, theirs in pairs for left, right in zip(ours, theirs, strict=True))


def card_of(base: BaseModel, index: int) -> LoRACard:
    """A random card of rank 1."""
    random = np.random.default_rng(index)
    tensors = [
        Tensor.from_numpy(path, role, np.float32(0.05) * random.standard_normal(size, dtype=np.float32))
        for path, module in base.model.named_modules()
        if isinstance(module, nn.Linear) and path.endswith(MODULES)
        for role, size in ((Role.A, (1, module.in_features)), (Role.B, (module.out_features, 1)))
    ]
    adapter = AdapterSpec(rank=1, alpha=1.0, target_modules=tuple({tensor.name for tensor in tensors}))
    return LoRACard.build(name=f"skill-{index}", adapter=adapter, tensors=tensors, base_name=base.name)


if __name__ == "__main__":
    main()
