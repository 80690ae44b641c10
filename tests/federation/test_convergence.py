"""After a partition heals all nodes list the same cards: nothing published is lost, nothing removed comes back.

A Hypothesis state machine over real registries, whose model is a few sets; then one history over real connections.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from federation.peer import Peer
from federation.server import LoRAFlightServer
from federation.sync import sync
from registry.digest import Digest
from registry.errors import LabelTakenError, UnknownCardError
from registry.store import Registry
from tests.federation.in_process import Swarm
from tests.registry.cards import small_card

NODES = st.integers(0, 4)
PICK = st.integers(0, 1 << 16)
VERSIONS = ("1", "2", "10")
"""In natural order."""


@dataclass(frozen=True)
class Published:
    digest: Digest
    author: int
    name: str
    version: str
    epoch: int


class Federation(RuleBasedStateMachine):
    """What its author removed is `removed` everywhere, what another removed is `hidden` on that node."""

    empty_home: Path

    @initialize(count=st.integers(3, 5))
    def begin(self, count: int) -> None:
        self.stack = ExitStack()
        directory = self.stack.enter_context(tempfile.TemporaryDirectory())
        self.swarm = Swarm(Path(directory), self.empty_home)
        self.stack.callback(self.swarm.close)
        for _ in range(count):
            self.swarm.add()
        self.published: dict[Digest, Published] = {}
        self.removed: set[Digest] = set()
        self.hidden: dict[int, set[Digest]] = defaultdict(set)
        self.moved: dict[int, dict[str, Digest]] = defaultdict(dict)
        self.seed = 0

    def teardown(self) -> None:
        with self.stack:
            self.agree()

    def node(self, index: int) -> tuple[int, Registry]:
        index %= len(self.swarm.nodes)
        return index, self.swarm.nodes[index]

    def some_card(self, registry: Registry, pick: int) -> Digest | None:
        digests = sorted(registry.digests())
        return digests[pick % len(digests)] if digests else None

    @rule(node=NODES, name=st.sampled_from(["poet", "cook"]), version=st.sampled_from(VERSIONS))
    def publish(self, node: int, name: str, version: str) -> None:
        index, registry = self.node(node)
        self.seed += 1
        claims = [entry for entry in registry.list(name=name) if entry.version == version]
        taken = any(not entry.superseded for entry in claims)
        try:
            entry = registry.publish(small_card(name, version=version, seed=self.seed, modules=1))
        except LabelTakenError:
            assert taken
            return
        assert not taken
        self.published[entry.digest] = Published(entry.digest, index, name, version, entry.epoch)

    @rule(node=NODES, pick=PICK)
    def remove(self, node: int, pick: int) -> None:
        index, registry = self.node(node)
        digest = self.some_card(registry, pick)
        if digest is None:
            return
        registry.remove(digest)
        if self.published[digest].author == index:
            self.removed.add(digest)
        else:
            self.hidden[index].add(digest)

    @rule(node=NODES, pick=PICK)
    def unhide(self, node: int, pick: int) -> None:
        index, registry = self.node(node)
        hidden = sorted(card.digest for card in registry.hidden())
        if hidden:
            digest = hidden[pick % len(hidden)]
            registry.unhide(digest)
            self.hidden[index].discard(digest)

    @rule(node=NODES, pick=PICK, name=st.sampled_from(["mine", "best"]))
    def relabel(self, node: int, pick: int, name: str) -> None:
        index, registry = self.node(node)
        digest = self.some_card(registry, pick)
        if digest is not None:
            registry.label(digest, name, "1")
            self.moved[index][name] = digest

    @rule(group=st.sets(NODES, min_size=1, max_size=2))
    def partition(self, group: set[int]) -> None:
        """Nothing passes between the group and the others any more."""
        everyone = range(len(self.swarm.nodes))
        self.swarm.cut |= {
            frozenset((one, other)) for one, other in combinations(everyone, 2) if (one in group) != (other in group)
        }

    @rule()
    def heal(self) -> None:
        self.swarm.cut.clear()

    @rule(node=NODES)
    def restart(self, node: int) -> None:
        index, _ = self.node(node)
        self.swarm.restart(index)

    @rule(node=NODES, calls=st.none() | st.integers(0, 5))
    def sync(self, node: int, calls: int | None) -> None:
        index, _ = self.node(node)
        self.swarm.sync(index, calls=calls)

    @rule()
    def gossip(self) -> None:
        for index in range(len(self.swarm.nodes)):
            self.swarm.sync(index)

    @rule()
    def agree(self) -> None:
        """Quiescence: with all lines whole, sync until nobody hears anything new; then all have what they should."""
        self.swarm.cut.clear()
        for _ in range(len(self.swarm.nodes) + 1):
            reports = [self.swarm.sync(index) for index in range(len(self.swarm.nodes))]
            assert all(report.ok for report in reports)
            if not any(report.fetched or peer.removed for report in reports for peer in report.peers):
                break
        else:
            raise AssertionError("the nodes never come to rest")
        alive = self.published.keys() - self.removed
        for index, node in enumerate(self.swarm.nodes):
            assert node.digests() == alive - self.hidden[index]
            assert all(report.ok for report in node.verify())
            self.check_names(index, node)

    def check_names(self, index: int, node: Registry) -> None:
        """Every node chooses the same card of a name among those that it has, whatever came first."""
        here = [card for card in self.published.values() if card.digest in node.digests()]
        newest: dict[tuple[int, str, str], int] = defaultdict(int)
        for card in self.published.values():
            key = (card.author, card.name, card.version)
            newest[key] = max(newest[key], card.epoch)
        for name in ("poet", "cook"):
            claims = [card for card in here if card.name == name]
            claims = [card for card in claims if card.epoch == newest[card.author, card.name, card.version]]
            if claims:
                best = max(claims, key=lambda card: (VERSIONS.index(card.version), card.digest))
                assert node.entry(name).digest == best.digest
            else:
                with pytest.raises(UnknownCardError):
                    node.entry(name)

    @invariant()
    def what_was_removed_here_stays_away(self) -> None:
        for index, node in enumerate(self.swarm.nodes):
            here = node.digests()
            assert not here & self.hidden[index]
            for card in self.published.values():
                if card.author == index:
                    assert (card.digest in here) == (card.digest not in self.removed)

    @invariant()
    def a_label_that_was_moved_stays_where_it_is(self) -> None:
        for index, node in enumerate(self.swarm.nodes):
            here = node.digests()
            for name, digest in list(self.moved[index].items()):
                if digest in here:
                    assert node.entry(name).digest == digest
                else:
                    del self.moved[index][name]


def test_after_quiescence_all_catalogs_agree(empty_home: Path) -> None:
    machine = type("_Federation", (Federation,), {"empty_home": empty_home})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=15,
            stateful_step_count=25,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        ),
    )


def test_three_nodes_agree_over_real_connections(make_registry: Callable[[str], Registry]) -> None:
    with ExitStack() as stack:
        nodes = [make_registry(name) for name in ("anna", "bert", "cleo")]
        servers = [stack.enter_context(LoRAFlightServer(node, node_id=node.identity.id, name="node")) for node in nodes]
        at = [Peer.at(server.address) for server in servers]
        kept, dropped = (nodes[0].publish(small_card(name)) for name in ("kept", "dropped"))
        assert sync(nodes[1], [at[0]]).ok
        theirs = nodes[1].publish(small_card("theirs"))
        nodes[0].remove("dropped")  # while bert, who has it, hears nothing
        assert sync(nodes[2], [at[1]]).ok
        assert dropped.digest in nodes[2].digests()
        for _ in range(2):
            for one, other in combinations(range(3), 2):
                assert sync(nodes[one], [at[other]]).ok
                assert sync(nodes[other], [at[one]]).ok
        for node in nodes:
            assert node.digests() == {kept.digest, theirs.digest}
            assert all(report.ok for report in node.verify())
