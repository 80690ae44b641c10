"""What the processes of `test_processes` run: `python -m tests.registry.worker ROLE HOME …`, reporting on stdout."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path

from registry.card import LoRACard
from registry.errors import UnknownCardError
from registry.store import Registry
from tests.registry.cards import small_card

CATALOG_VARIABLE = "ARROWMOE_WORKER_CATALOG"
LARGE = {"model.layers.0.mlp.up_proj": (4096, 4096)}  # 128 KiB at rank 4: writing it takes a while


def publish(home: Path, first: int, number: int) -> Iterator[str]:
    """Publish `number` cards, named by their seeds; a line for each, once it is published."""
    with _opened(home) as registry:
        for seed in range(first, first + number):
            yield registry.publish(small_card(f"card-{seed}", seed=seed), tags=["made"]).digest


def churn(home: Path, first: int) -> Iterator[str]:
    """Publish without end, and remove every third card again."""
    with _opened(home) as registry:
        for seed in count(first):
            entry = registry.publish(_large(seed))
            yield f"+{entry.digest}"
            if seed % 3 == 0:
                yield f"?{entry.digest}"
                registry.remove(entry.digest)
                yield f"-{entry.digest}"


def fight(home: Path, rounds: int) -> Iterator[str]:
    """Publish and remove one and the same card, as others do at the same time."""
    with _opened(home) as registry:
        for _ in range(rounds):
            digest = registry.publish(small_card("bone")).digest
            with suppress(UnknownCardError):
                registry.remove(digest)
            yield digest


def read(home: Path, number: int) -> Iterator[str]:
    """List until `number` cards are there, and load every card that was listed."""
    with _opened(home) as registry:
        seen: set[str] = set()
        while len(seen) < number:
            entries = registry.list()
            assert seen <= {entry.digest for entry in entries}, "a published card was lost"
            for entry in (entry for entry in entries if entry.digest not in seen):
                seen.add(entry.digest)
                assert registry.get(entry.digest, verify=True).name == entry.name
                assert entry.tags == ("made",)
                assert entry.labels == (f"{entry.name}@1",)
            time.sleep(0.02)
        yield str(len(seen))


def identify(home: Path) -> Iterator[str]:
    """Open the home and say who we are."""
    with _opened(home) as registry:
        yield registry.identity.id


def _opened(home: Path) -> Registry:
    return Registry.open(home, catalog_url=os.environ.get(CATALOG_VARIABLE))


def _large(seed: int) -> LoRACard:
    return small_card(f"card-{seed}", seed=seed, modules=LARGE)


ROLES: dict[str, Callable[..., Iterator[str]]] = {
    role.__name__: role for role in (publish, churn, fight, read, identify)
}


if __name__ == "__main__":
    for line in ROLES[sys.argv[1]](Path(sys.argv[2]), *map(int, sys.argv[3:])):
        print(line, flush=True)
