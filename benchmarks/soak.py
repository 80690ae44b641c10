"""Many threads ask an engine for mixed things while cards come and go: no leak, no error, no wrong answer.

    python -m benchmarks.soak [--minutes 30] [--threads 6]

On SmolLM2-135M with room for a quarter of the cards. Requests differ in adapter (none, one, a mixture), prompt, length
and sampling; some are given up in the midst, some have a deadline that may pass. Meanwhile names are published anew
with other weights, and cards are removed and come back. Of every tenth greedy answer the same request is asked once
more of an engine that answers one row at a time, with the cards that the answer was made with.

Resident memory is read every two seconds; a straight line through the readings after the first quarter, and the
standard error of its slope from the means of twelve blocks, say whether it grows. The cache of a full batch and the
allocator's arenas take about a minute to fill, so a run of less than ten minutes tells of that and not of a leak.
"""

from __future__ import annotations

import argparse
import copy
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy import stats

from arrowmoe.base_model import BaseModel
from arrowmoe.batching import BatchLimits
from arrowmoe.engine import ArrowEngine
from arrowmoe.errors import BusyError, DeadlineError, UnknownAdapterError
from arrowmoe.generation import Chunk
from arrowmoe.routing.gates import Gates
from benchmarks.adapters import smollm2
from benchmarks.cards import resident_bytes
from benchmarks.harness import Target, report
from benchmarks.residency import card_of
from registry.errors import MissingFileError, UnknownCardError
from registry.store import Registry

NAMES = 24
HELD = 6
COMPARED = 10
BLOCKS = 12
READING_S = 2.0
CHANGE_S = 1.0
TOPICS = ("dates", "the sea", "a proof", "bread", "an old engine", "rain", "chess", "a letter to nobody")


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A greedy answer, with what made it: digest → weight."""

    prompt: str
    weights: Mapping[str, float]
    tokens: tuple[int, ...]


class Soak:
    """The threads, what they saw, and the cards that come and go."""

    def __init__(self, base: BaseModel, registry: Registry, seconds: float) -> None:
        self._base = base
        self._registry = registry
        self._serials: dict[str, int] = {}
        self._lock = threading.Lock()
        self.digests: dict[str, str] = {}
        for index in range(NAMES):
            self._publish(f"skill-{index}")
        size = sum(tensor.nbytes for tensor in card_of(base, 0).manifest.tensors)
        self.engine = ArrowEngine(
            replace(base, model=copy.deepcopy(base.model)),  # cards are made for a model without adapters
            registry=registry,
            budget_bytes=HELD * size,
            limits=BatchLimits(rows=16, waiting=64),
        )
        self._ends_at = time.monotonic() + seconds
        self.seen: Counter[str] = Counter()
        self.errors: list[str] = []
        self.sampled: list[Answered] = []
        self.sizes: list[tuple[float, int]] = []

    def run(self, threads: int) -> None:
        """Until the time is over."""
        started_at = time.monotonic()
        work = [threading.Thread(target=self._ask, args=(seed,)) for seed in range(threads)]
        work.append(threading.Thread(target=self._change))
        for thread in work:
            thread.start()
        while any(thread.is_alive() for thread in work):
            self.sizes.append((time.monotonic() - started_at, resident_bytes()))
            time.sleep(READING_S)

    def wrong(self) -> int:
        """Sampled answers that are not what each is alone."""
        alone = ArrowEngine(replace(self._base, model=copy.deepcopy(self._base.model)))
        return sum(self._alone(alone, one) != one.tokens for one in self.sampled)

    def _alone(self, engine: ArrowEngine, answered: Answered) -> tuple[int, ...]:
        """What one engine, one row, and cards made anew from their seeds give."""
        same = {digest: engine.load_lora(card_of(self._base, self._serials[digest])) for digest in answered.weights}
        mixture = {same[digest]: weight for digest, weight in answered.weights.items()}
        (made,) = engine.generate([answered.prompt], adapter=mixture, max_new_tokens=len(answered.tokens))
        for name in same.values():
            engine.remove_lora(name)
        return made.tokens

    def _ask(self, seed: int) -> None:
        dice = random.Random(seed)
        while time.monotonic() < self._ends_at:
            try:
                self._count(self._one(dice))
            except (BusyError, DeadlineError) as error:
                self._count(type(error).__name__)
            except (UnknownCardError, MissingFileError, UnknownAdapterError):
                self._count("card was removed")
            except Exception as error:  # noqa: BLE001 - counting them is what this is for
                with self._lock:
                    self.errors.append(repr(error))

    def _one(self, dice: random.Random) -> str:
        """One request; how it went."""
        weights = self._wanted(dice)
        prompt = f"Request {dice.randrange(1000)}: write about {dice.choice(TOPICS)}."
        greedy = dice.random() < 0.6
        stream = self.engine.generate(
            [prompt],
            adapter=Gates.of([weights], {digest: digest for digest in weights}),
            max_new_tokens=dice.randint(1, 16),
            temperature=0.0 if greedy else 0.8,
            top_p=1.0 if greedy else dice.choice((0.9, 1.0)),
            timeout_s=dice.choice((None, None, 2.0)),
            stream=True,
        )
        chunks: list[Chunk] = []
        for chunk in stream:
            chunks.append(chunk)
            if dice.random() < 0.03:
                return "given up"  # the stream is closed with its last reference
        made = chunks[-1].generation
        assert made is not None
        if greedy and dice.random() < 1 / COMPARED:
            with self._lock:
                self.sampled.append(Answered(prompt=prompt, weights=weights, tokens=made.tokens))
        return "answered"

    def _wanted(self, dice: random.Random) -> dict[str, float]:
        with self._lock:
            digests = list(self.digests.values())
        many = dice.choices((0, 1, 2), (1, 8, 2))[0]
        return {digest: dice.choice((1.0, 0.5)) for digest in dice.sample(digests, many)}

    def _change(self) -> None:
        """Publish a name anew, or take one out that comes back later."""
        dice = random.Random(-1)
        while time.monotonic() < self._ends_at:
            name = f"skill-{dice.randrange(NAMES)}"
            old = self.digests.get(name)
            if old is None or dice.random() < 0.7:
                self._publish(name)
            else:
                with self._lock:
                    del self.digests[name]
            if old is not None:
                self._registry.remove(old)
                self.engine.remove_lora(old)
            time.sleep(CHANGE_S)

    def _publish(self, name: str) -> None:
        serial = len(self._serials)
        digest = self._registry.publish(card_of(self._base, serial).describe(name=name, version=f"{serial}")).digest
        with self._lock:
            self._serials[digest] = serial
            self.digests[name] = digest

    def _count(self, how: str) -> None:
        with self._lock:
            self.seen[how] += 1


def slope(sizes: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """(bytes a second, half the width of its 95 % confidence interval), by least squares over means of blocks.

    Readings that follow each other are not independent; means of blocks nearly are.
    """
    settled = np.array(sizes[len(sizes) // 4 :], dtype=float)
    blocks = np.array([block.mean(axis=0) for block in np.array_split(settled, min(BLOCKS, len(settled)))])
    fitted = stats.linregress(blocks[:, 0], blocks[:, 1])
    return float(fitted.slope), float(fitted.stderr * stats.t.ppf(0.975, len(blocks) - 2))


def main() -> None:
    """Run, compare, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--threads", type=int, default=6)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, Registry.open(Path(directory)) as registry:
        soak = Soak(smollm2(), registry, 60 * arguments.minutes)
        soak.run(arguments.threads)
        show(soak, arguments.minutes)


def show(soak: Soak, minutes: float) -> None:
    """The targets and the figures."""
    grown, noise = slope(soak.sizes)
    wrong = soak.wrong()
    stale = sum(one.digest not in soak.digests.values() for one in soak.engine.list_loras())
    loads, asked = soak.engine.loads(), sum(soak.seen.values()) + len(soak.errors)
    report("soak", "each sampled answer with one row by itself", [
        Target(name="wrong answers", value=wrong, op="<=", bar=0),
        Target(name="unexpected errors", value=len(soak.errors), op="<=", bar=0),
        Target(name="answers that were compared", value=len(soak.sampled), op=">=", bar=10),
        Target(name="adapters that stayed when their card was removed", value=stale, op="<=", bar=0),
        Target(name="growth (MB/h) less its 95 % confidence", value=(grown - noise) * 3600 / 1e6, op="<=", bar=0),
    ], {
        "minutes": minutes,
        "requests": asked,
        "how_they_went": dict(soak.seen),
        "errors": soak.errors[:10],
        "compared": len(soak.sampled),
        "growth_mb_per_h": round(grown * 3600 / 1e6, 2),
        "growth_confidence_mb_per_h": round(noise * 3600 / 1e6, 2),
        "resident_mb": [round(size / 1e6) for _, size in soak.sizes[:: max(1, len(soak.sizes) // 12)]],
        "loads": {"ahead": loads.ahead, "stalls": loads.stalls, "stalled_s": round(loads.stalled_s, 2)},
        "adapters_known_at_the_end": len(soak.engine.list_loras()),
    })  # fmt: skip


if __name__ == "__main__":
    main()
