"""Taking an adapter out of a tuned model: SmolLM2-135M with planted deltas, and tuned as a whole on a CLINC150 domain.

    python -m benchmarks.extract [--quick] [--keep DIR] [--threads 1]

*Planted*: every linear weight of SmolLM2 gets a delta of rank 16, which must come back. *Tuned*: all weights train; a
child process extracts at each energy, which is scored against the tuned model, and against a LoRA of as many bytes
that was trained from the start. With `--keep` the tuned model stays in a directory, for the next run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from zlib import crc32

import torch

from benchmarks.adapters import smollm2
from benchmarks.extract_tuning import (
    LORA,
    WHOLE,
    Score,
    Task,
    put_pairs,
    put_whole,
    score,
    task_of,
    tune_whole,
    tuned_lora,
)
from benchmarks.harness import Target, report
from evolution.extractor import LoRAExtractor
from evolution.model_files import ModelFiles, Weights
from evolution.targets import linear_layers
from registry.card import LoRACard
from registry.format import LoRAFormat
from registry.low_rank import Cut
from registry.tensor import Role

RANK = 16
ENERGIES = (0.9, 0.95, 0.99)
QUICK_MODULES, QUICK_STEPS = 14, 4


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two blocks planted, four steps trained, one energy")
    parser.add_argument("--keep", type=Path, help="a directory where the base and the tuned model stay")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        run(arguments.keep or Path(scratch), Path(scratch), quick=arguments.quick)


def run(keep: Path, scratch: Path, *, quick: bool) -> None:
    """Everything; models lie in `keep`, cards in `scratch`."""
    base_dir = keep / "base"
    base = smollm2()
    if not base_dir.exists():
        base.model.save_pretrained(base_dir)
    planted = plant(ModelFiles(base_dir), QUICK_MODULES if quick else None)
    task = task_of(base.tokenizer)
    steps = QUICK_STEPS if quick else WHOLE.steps
    untuned, (tuned_dir, tuned) = score(base.model, task.test), tune(task, steps, keep)
    arms = [extracted(task, base_dir, tuned_dir, energy, scratch) for energy in ENERGIES[: 1 if quick else None]]
    trained = [train_alike(task, arm.pairs_bytes, steps) for arm in arms]
    model_bytes = sum(weight.nbytes for weight in base.model.parameters())
    gain = tuned.exact - untuned.exact
    report("extract", "the tuned model, and a LoRA of as many bytes trained from the start", [
        Target(name="planted deltas: worst relative error", value=planted.error, op="<=", bar=1e-5),
        Target(name="planted deltas: modules of another rank", value=planted.odd_ranks, op="<=", bar=0),
        Target(
            name="peak memory of an extraction, beyond Python and its libraries / one model",
            value=max(arm.peak_bytes - arm.before_bytes for arm in arms) / model_bytes,
            op="<=",
            bar=1.2,
        ),
        Target(
            name=f"gain that energy {arms[-1].energy} keeps of the tuned model's",
            value=(arms[-1].everything.exact - untuned.exact) / gain if gain else 0.0,
            op=">=",
            bar=0.95,
        ),
    ], {
        "model_mb": round(model_bytes / 1e6),
        "planted_modules": planted.modules,
        "tuning": {"steps": steps, "rows": len(task.train), "test_rows": len(task.test)},
        "untuned": asdict(untuned),
        "tuned": asdict(tuned),
        "extracted": [asdict(arm) for arm in arms],
        "lora_trained_from_the_start": [asdict(arm) for arm in trained],
    })  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Planted:
    """What came back of the deltas: the worst relative Frobenius error, and how many modules have another rank."""

    modules: int
    error: float
    odd_ranks: int


@dataclass(frozen=True, kw_only=True)
class Extracted:
    """What one energy keeps: the pairs alone, as our engine computes them, and with what else changed kept whole."""

    energy: float
    mean_rank: float
    pairs_bytes: int
    whole_bytes: int
    error: float
    pairs: Score
    everything: Score
    seconds: float
    peak_bytes: int
    before_bytes: int
    """Of the peak, what stood before the extraction began: Python and its libraries."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A LoRA that was trained at this rank, on all linear layers of the blocks."""

    rank: int
    bytes: int
    score: Score


@dataclass(frozen=True, kw_only=True)
class WithDeltas:
    """The weights of `base` with a random delta of rank 16 in each of `modules`, a tenth as large as the weight."""

    base: Weights
    modules: Collection[str]

    @property
    def names(self) -> Collection[str]:
        """Those of the base."""
        return self.base.names

    def tensor(self, name: str) -> torch.Tensor:
        """A weight, with its delta where it has one."""
        weight = self.base.tensor(name)
        return weight + self.delta(name.removesuffix(".weight")) if self._has(name) else weight

    def delta(self, module: str) -> torch.Tensor:
        """The planted delta (d_out, d_in)."""
        weight = self.base.tensor(f"{module}.weight")
        seeded = torch.Generator().manual_seed(crc32(module.encode()))
        b, a = (torch.randn(size, generator=seeded) for size in ((weight.shape[0], RANK), (RANK, weight.shape[1])))
        scale = 0.1 * float(weight.std()) / RANK**0.5
        delta: torch.Tensor = scale * torch.mm(b, a)
        return delta

    def _has(self, name: str) -> bool:
        return name.endswith(".weight") and name.removesuffix(".weight") in self.modules


def plant(files: ModelFiles, first: int | None) -> Planted:
    """Plant deltas in the `first` linear modules, or in all, and extract them by an error bound."""
    modules = list(files.layout.linear)[:first]
    deltas = WithDeltas(base=files, modules=frozenset(modules))
    extractor = LoRAExtractor(cut=Cut(error=1e-4))
    card = extractor.extract(deltas, files, files.layout, name="planted", base_name=None).card
    errors = [relative_error(card, module, deltas.delta(module)) for module in modules]
    odd = sum(card.manifest.adapter.rank_of(module) != RANK for module in modules)
    return Planted(modules=len(modules), error=max(errors), odd_ranks=odd)


def relative_error(card: LoRACard, module: str, delta: torch.Tensor) -> float:
    """‖B A - delta‖ / ‖delta‖ (Frobenius); an extracted card has scaling 1."""
    a, b = (torch.tensor(card.modules[module][role].float32()) for role in (Role.A, Role.B))
    return float((b @ a - delta).norm() / delta.norm())


def tune(task: Task, steps: int, keep: Path) -> tuple[Path, Score]:
    """The directory of the tuned model, trained where `keep` lacks it, and its score."""
    directory, base = keep / f"tuned-{steps}", smollm2()
    if not directory.exists():
        tune_whole(base.model, base.tokenizer, task, replace(WHOLE, steps=steps))
        base.model.save_pretrained(directory)
    model = type(base.model).from_pretrained(directory, dtype=torch.float32)
    return directory, score(model, task.test)


def extracted(task: Task, base: Path, tuned: Path, energy: float, scratch: Path) -> Extracted:
    """Extract in a child process, and score what it found on a fresh base model."""
    path = scratch / f"{energy}.lora.arrow"
    command = [sys.executable, "-m", "benchmarks.extract_child", str(base), str(tuned), str(path), str(energy)]
    told = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
    card, model = LoRAFormat.load(path), smollm2().model
    put_pairs(model, card)
    pairs = score(model, task.test)
    put_whole(model, card)
    whole_bytes = sum(tensor.nbytes for tensor in card.tensors if tensor.role is Role.FULL)
    ranks = [card.manifest.adapter.rank_of(module) for module in card.manifest.adapter.target_modules]
    return Extracted(
        energy=energy,
        mean_rank=sum(ranks) / len(ranks),
        pairs_bytes=sum(tensor.nbytes for tensor in card.tensors) - whole_bytes,
        whole_bytes=whole_bytes,
        pairs=pairs,
        everything=score(model, task.test),
        **told,
    )


def train_alike(task: Task, size: int, steps: int) -> Trained:
    """Train a LoRA of about as many bytes, of one rank throughout, as long as the whole model was."""
    base = smollm2()
    rank = max(1, round(size / 4 / sum(map(sum, linear_layers(base.model).values()))))
    found, took = tuned_lora(base.model, base.tokenizer, task, replace(LORA, steps=steps, rank=rank))
    return Trained(rank=rank, bytes=took, score=found)


if __name__ == "__main__":
    main()
