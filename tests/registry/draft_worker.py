"""Fills a draft until it is whole or the process is killed.

Prints how many bytes it found, then the number of each that it wrote.

python -m tests.registry.draft_worker CARD DRAFTS
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from registry.drafts import Drafts
from registry.format import LoRAFormat


def main(path: str, directory: str) -> None:
    card = LoRAFormat.load(path)
    data = memoryview(b"".join(tensor.data for tensor in card.tensors))
    with Drafts(Path(directory)).open(replace(card, tensors=())) as draft:
        print(card.nbytes - sum(end - start for start, end in draft.gaps()), flush=True)
        for start, end in draft.gaps():
            for at in range(start, end, 70_000):
                part = data[at : min(at + 70_000, end)]
                draft.write(at, part)
                print(len(part), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
