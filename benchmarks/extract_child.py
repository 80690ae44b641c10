"""One extraction in a process of its own, so that its peak of memory is nobody else's.

    python -m benchmarks.extract_child BASE TUNED CARD ENERGY

Writes the card and prints one JSON line. Peaks are VmHWM, for a child's ru_maxrss counts its parent's.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from evolution.extractor import LoRAExtractor
from evolution.model_files import ModelFiles
from registry.format import LoRAFormat
from registry.low_rank import Cut


def main(base: Path, tuned: Path, card: Path, energy: float) -> None:
    """Extract at `energy`, with whatever else changed kept whole."""
    one, other = ModelFiles(base), ModelFiles(tuned)
    layout, before_bytes, began_s = one.layout, peak_bytes(), time.perf_counter()
    extractor = LoRAExtractor(cut=Cut(energy=energy), others="full")
    found = extractor.extract(other, one, layout, name="extracted", base_name=one.name)
    seconds, peak = time.perf_counter() - began_s, peak_bytes()
    LoRAFormat.save(found.card, card)
    print(json.dumps({"error": found.error, "seconds": seconds, "peak_bytes": peak, "before_bytes": before_bytes}))


def peak_bytes() -> int:
    """The most that this process has had resident."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    kibibytes = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(kibibytes)


if __name__ == "__main__":
    one, other, made = map(Path, sys.argv[1:4])
    main(one, other, made, float(sys.argv[4]))
