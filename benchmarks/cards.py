"""From a file to a usable adapter and back: cards against PEFT's `load_adapter`, on SmolLM2-135M, rank 8, 210 modules.

    python -m benchmarks.cards [--rounds 9]

"Verified" reads and hashes every byte (BLAKE3), so no page of the mapped file is left for later; "mapped" leaves them
to the first use. Both models hold one adapter already, so each arm brings the second; then they hold 16. Files are warm
in the page cache, but for the arms that say "cold", where the kernel is told to drop them first.
"""

from __future__ import annotations

import argparse
import copy
import os
import resource
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel

from arrowmoe.base_model import BaseModel
from arrowmoe.lora.manager import LoRAManager
from benchmarks.adapters import smollm2, write_adapters
from benchmarks.harness import Arm, Prepared, Target, Times, interleave, report
from registry.card import LoRACard
from registry.format import LoRAFormat

HELD = 16
MEMORY_RANK = 16
MEMORY_COUNT = 8
OURS = ("load_verified", "inject")


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as directory, torch.inference_mode():
        run(Path(directory), rounds)


def run(directory: Path, rounds: int) -> None:
    """All arms over one adapter, then the memory of several."""
    base = smollm2()
    newcomer, *others = write_adapters(base, directory, 1 + HELD)
    file = save_card(newcomer, directory)
    times = interleave(arms(base, others[:1], newcomer, file), rounds=rounds, warmup=2)
    among_many = interleave(arms(base, others, newcomer, file), rounds=rounds, warmup=1)
    slot_mb, grown_mb = memory_per_adapter(base, directory / "memory")
    report("cards", "PEFT load_adapter and a bare copy of the bytes", targets(times, among_many, grown_mb), {
        "ms": {arm: round(1000 * times.median(arm), 2) for arm in times.seconds},
        f"ms, {HELD} held": {arm: round(1000 * among_many.median(arm), 2) for arm in ("inject", "peft_load")},
        "file_mb": round(file.stat().st_size / 1e6, 2),
        "memory_per_rank_16_adapter_mb": {"held": round(slot_mb, 2), "resident_growth": round(grown_mb, 2)},
        "cold: verified load + inject / bare copy": round(
            both(times, "load_cold", "inject") / times.median("copy_cold"), 2
        ),
    })  # fmt: skip


def save_card(adapter: Path, directory: Path) -> Path:
    """The adapter as a card file."""
    path = directory / f"{adapter.name}.lora.arrow"
    LoRAFormat.save(LoRACard.from_peft(adapter), path)
    return path


def arms(base: BaseModel, held: Sequence[Path], newcomer: Path, file: Path) -> dict[str, Arm]:
    """Load, inject and remove on one model; PEFT's load and delete on another; a copy of the file's bytes."""
    manager = LoRAManager(copy.deepcopy(base.model))
    peft = PeftModel.from_pretrained(copy.deepcopy(base.model), str(held[0]), adapter_name="held-0")
    for number, path in enumerate(held):
        manager.apply_card(LoRACard.from_peft(path))
        if number:
            peft.load_adapter(str(path), f"held-{number}")
    card = LoRAFormat.load(file)

    def inject() -> None:
        manager.apply_card(card)

    def remove() -> None:
        manager.remove_card(card.digest)

    def copied(file: Path) -> object:
        return bytearray(file.read_bytes())

    def loaded(file: Path) -> object:
        return LoRAFormat.load(file, verify=True)

    cold = file.with_name(f"cold-{file.name}")  # `card` keeps the pages of its own file
    shutil.copyfile(file, cold)
    return {
        "copy": lambda: copied(file),
        "copy_cold": Prepared(arm=lambda: copied(cold), prepare=lambda: drop_from_cache(cold)),
        "load_mapped": lambda: LoRAFormat.load(file, verify=False),
        "load_verified": lambda: loaded(file),
        "load_cold": Prepared(arm=lambda: loaded(cold), prepare=lambda: drop_from_cache(cold)),
        "inject": Prepared(arm=inject, prepare=remove),
        "remove": Prepared(arm=remove, prepare=inject),
        "peft_load": Prepared(arm=lambda: peft.load_adapter(str(newcomer), "new"), prepare=lambda: delete(peft)),
    }


def drop_from_cache(file: Path) -> None:
    """Have the kernel forget the pages of a file, so that the next read comes from the disk."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def delete(peft: PeftModel) -> None:
    """Take PEFT's newcomer out if it is in."""
    if "new" in peft.peft_config:
        peft.delete_adapter("new")


def memory_per_adapter(base: BaseModel, directory: Path) -> tuple[float, float]:
    """MB of one rank-16 adapter: what the slots hold, and how much the process grew after every byte was used."""
    directory.mkdir()
    adapters = write_adapters(base, directory, MEMORY_COUNT, rank=MEMORY_RANK)
    files = [save_card(path, directory) for path in adapters]
    for path in adapters:
        shutil.rmtree(path)
    manager = LoRAManager(copy.deepcopy(base.model))
    manager.apply_card(LoRAFormat.load(files[0]))
    before = resident_bytes()
    entries = [manager.apply_card(LoRAFormat.load(file, verify=True)) for file in files[1:]]
    return entries[0].nbytes / 1e6, (resident_bytes() - before) / len(entries) / 1e6


def resident_bytes() -> int:
    """Resident memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def both(times: Times, *names: str) -> float:
    """Sum of medians."""
    return sum(times.median(name) for name in names)


def targets(times: Times, among_many: Times, grown_mb: float) -> list[Target]:
    """The specification's bars; and PEFT as the peer, whose time grows with what a model holds already."""
    usable = both(times, *OURS)
    return [
        Target(name="load, verified (ms)", value=1000 * times.median("load_verified"), op="<=", bar=100),
        Target(name="inject into 30 layers (ms)", value=1000 * times.median("inject"), op="<=", bar=500),
        Target(name="remove (ms)", value=1000 * times.median("remove"), op="<=", bar=100),
        Target(name="memory per rank-16 adapter (MB)", value=grown_mb, op="<=", bar=50),
        *(
            Target(
                name=f"PEFT load_adapter / verified load and inject, {held} held",
                value=found.median("peft_load") / both(found, *OURS),
                op=">=",
                bar=20,
            )
            for held, found in ((1, times), (HELD, among_many))
        ),
        Target(name="verified load and inject / bare copy", value=usable / times.median("copy"), op="<=", bar=3),
    ]


if __name__ == "__main__":
    main()
