"""Three real nodes behind lines that break, stall and part, while cards are published, removed and relabelled.

Once the lines are whole again, all nodes come to list the same cards: nothing that was published is lost, and nothing
that was removed comes back.
"""

from __future__ import annotations

import os
import random
import signal
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from arrowmoe.demo.nodes import NodeProcess, node_process
from federation.peer import parse_address
from registry.digest import Digest
from registry.errors import LabelTakenError
from registry.store import Registry
from tests.federation.proxy import Proxy
from tests.registry.cards import module_shapes, small_card

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
NAMES = ("anna", "bert", "carl")
PARTITIONS: tuple[set[str], ...] = (set(), {"anna"}, {"anna"}, set(), {"bert"}, {"bert"}, {"carl"}, set())
"""Who is alone in each round."""
KILLED_IN = {2: "bert", 6: "anna"}
SHAPES = module_shapes(1, 1 << 13, 1 << 13)
"""256 KiB; with an alpha so small that no norm keeps the card in quarantine."""
CUT_CHANCE = 0.04
"""Of each chunk; a card takes 5 or so."""
DELAY_S = 0.002


@dataclass
class World:
    """Three nodes, a line from each to each other, and what their owners did: the model of what must be."""

    directory: Path
    stack: ExitStack
    dice: random.Random
    nodes: dict[str, NodeProcess] = field(default_factory=dict)
    lines: dict[tuple[str, str], Proxy] = field(default_factory=dict)
    author: dict[Digest, str] = field(default_factory=dict)
    removed: set[Digest] = field(default_factory=set)
    hidden: dict[str, set[Digest]] = field(default_factory=lambda: defaultdict(set))
    labelled: dict[str, Digest] = field(default_factory=dict)

    def build(self) -> None:
        for pair in permutations(NAMES, 2):
            self.lines[pair] = self.stack.enter_context(Proxy(0, dice=random.Random(self.dice.random())))
        for name in NAMES:
            self.start(name)

    def start(self, name: str) -> None:
        """Start a node, and lead the lines to it."""
        peers = ",".join(line.address for (one, _), line in self.lines.items() if one == name)
        variables = {"ARROWMOE_PEERS": peers, "ARROWMOE_DISCOVERY": "0", "OMP_NUM_THREADS": "1"}
        self.nodes[name] = self.stack.enter_context(node_process(name, self.directory, variables=variables))
        port = parse_address(self.nodes[name].record.address)[1]
        for (_, other), line in self.lines.items():
            if other == name:
                line.target_port = port

    def kill(self, name: str) -> None:
        os.kill(self.nodes[name].record.pid, signal.SIGKILL)
        self.start(name)

    def weather(self, *, cut_chance: float, delay_s: float, alone: set[str]) -> None:
        for pair, line in self.lines.items():
            line.cut_chance, line.delay_s = cut_chance, delay_s
            if alone & {*pair}:
                line.part()
            else:
                line.heal()

    def sync(self, name: str) -> Any:
        return self.nodes[name].call("sync")

    def registry(self, name: str) -> Registry:
        return Registry.open(self.directory / name)

    def publish(self, name: str, registry: Registry, version: str, seed: int) -> None:
        """All three publish the same names; who has heard of another's may not."""
        for card in ("poet", f"of-{name}"):
            with suppress(LabelTakenError):
                made = small_card(card, version=version, seed=seed, modules=SHAPES, alpha=1e-3)
                self.author[registry.publish(made).digest] = name

    def remove(self, name: str, registry: Registry) -> None:
        """One of its own, for everyone, and one of another's, which is only hidden here."""
        here = sorted(registry.digests())
        own = [digest for digest in here if self.author[digest] == name]
        if own:
            digest = self.dice.choice(own)
            registry.remove(digest)
            self.removed.add(digest)
        others = [
            entry.digest for entry in registry.list() if entry.name in {f"of-{one}" for one in NAMES} - {f"of-{name}"}
        ]
        if others:
            digest = self.dice.choice(sorted(others))
            registry.remove(digest)
            self.hidden[name].add(digest)

    def relabel(self, name: str, registry: Registry) -> None:
        digest = self.dice.choice(sorted(registry.digests()))
        registry.label(digest, "mine", "1")
        self.labelled[name] = digest


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with ExitStack() as stack:
        world = World(tmp_path, stack, random.Random(20261121))
        world.build()
        yield world


def storm(world: World) -> int:
    """Rounds of work on every node, under weather; how many syncs went wrong."""
    failed = 0
    for number, alone in enumerate(PARTITIONS):
        world.weather(cut_chance=CUT_CHANCE, delay_s=DELAY_S, alone=alone)
        for place, name in enumerate(NAMES):
            with world.registry(name) as registry:
                world.publish(name, registry, str(number), 10 * number + place)
                if number % 2:
                    world.remove(name, registry)
                world.relabel(name, registry)
        if number in KILLED_IN:
            world.kill(KILLED_IN[number])
        for name in world.dice.sample(NAMES, 2):
            failed += not world.sync(name)["ok"]
    return failed


def calm(world: World) -> None:
    """Sync until nobody hears anything new."""
    world.weather(cut_chance=0.0, delay_s=0.0, alone=set())
    for _ in range(len(NAMES) + 2):
        before = {name: listed(world, name) for name in NAMES}
        for name in NAMES:
            report = world.sync(name)
            assert report["ok"], report
        if before == {name: listed(world, name) for name in NAMES}:
            return
    raise AssertionError("the nodes never come to rest")


def listed(world: World, name: str) -> set[Digest]:
    with world.registry(name) as registry:
        return registry.digests()


def test_after_a_storm_all_catalogs_agree(world: World, record_property: Callable[[str, object], None]) -> None:
    failed, cuts = storm(world), sum(line.cuts for line in world.lines.values())
    assert failed > 0
    assert cuts > 0
    for name, value in {
        "failed": failed,
        "cuts": cuts,
        "cards": len(world.author),
        "removed": len(world.removed),
    }.items():
        record_property(name, value)
    calm(world)
    alive = world.author.keys() - world.removed
    assert len(world.removed) >= len(NAMES)
    assert any(world.hidden.values())
    winners = set()
    for name in NAMES:
        with world.registry(name) as registry:
            assert registry.digests() == alive - world.hidden[name]
            assert all(report.ok for report in registry.verify())
            winners.add(registry.entry("poet").digest)
            if world.labelled[name] in registry.digests():
                assert registry.entry("mine").digest == world.labelled[name]
        log = (world.directory / name / "logs" / "arrowmoe.log").read_text()
        assert "Traceback" not in log
    assert len(winners) == 1
