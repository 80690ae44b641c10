"""The demo, step by step: start, find, copy, load, answer, score, grow an expert, end."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from arrowmoe.demo import asking, events
from arrowmoe.demo.events import Answered, Event, Scored, Waiting
from arrowmoe.demo.night import night
from arrowmoe.demo.nodes import POLL_S, DemoError, NodeProcess, node_process
from arrowmoe.demo.shipped import BASES, ShippedCard, shipped_cards
from registry.errors import ArrowMoEError
from registry.format import LoRAFormat
from registry.store import Registry

FIND_TIMEOUT_S = 12.0
EXAMPLES = 20


class Clock:
    """Seconds since the start, and of each phase; a phase lasts until the next one begins."""

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}
        self._start_s = self._phase_s = time.monotonic()

    def total(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start_s

    def lap(self, phase: str) -> float:
        """Ends `phase`, and returns its seconds."""
        before, self._phase_s = self._phase_s, time.monotonic()
        self.phases[phase] = self._phase_s - before
        return self.phases[phase]


def run(*, fast: bool = False, keep: bool = False) -> Generator[Event, None, None]:
    """Run the demo, without its night if `fast`.

    Nothing of it is left when the iterator ends or is closed, but the homes if `keep`.
    Raises `DemoError` where a step fails.
    """
    cards, clock = shipped_cards(), Clock()
    with ExitStack() as stack:
        directory = _directory(stack, keep=keep)
        # B first: its models take longest.
        b = stack.enter_context(node_process("demo-b", directory, bases=tuple(BASES.values())))
        yield Waiting(text="starting two nodes")
        _publish(cards, directory / "demo-a")
        a = stack.enter_context(node_process("demo-a", directory))
        stack.callback(b.ask_to_end)  # both at once; what entered first waits last
        stack.callback(a.ask_to_end)
        stack.enter_context(_explained(a, b))
        yield from _share(a, b, clock)
        yield from _load(b, clock)
        problems = yield from _work(b, cards, clock)
        if not fast:
            a.end()
            problems += yield from night(directory, b)
            clock.lap("night")
        yield Waiting(text="ending both nodes")
    clock.lap("end")
    kept = str(directory) if keep else None
    yield events.Ended(seconds=clock.total(), phases=clock.phases, kept=kept, problems=problems)


def _directory(stack: ExitStack, *, keep: bool) -> Path:
    prefix = "arrowmoe-demo-"
    if keep:
        return Path(tempfile.mkdtemp(prefix=prefix))
    return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=prefix)))


def _publish(cards: Sequence[ShippedCard], home: Path) -> None:
    """Put the shipped cards into A's home, signed by A's identity, which is made there and then."""
    with Registry.open(home) as registry:
        for card in cards:
            registry.publish(LoRAFormat.load(card.path))


def _share(a: NodeProcess, b: NodeProcess, clock: Clock) -> Iterator[Event]:
    """B finds A and copies its cards."""
    nodes = tuple(_started(node) for node in (a, b))
    yield events.Started(nodes=nodes, seconds=clock.lap("start"))
    yield Waiting(text="B looks for A")
    seen = _find(a, b)
    yield events.Found(
        name=a.record.name,
        address=a.record.address,
        source=seen["source"],
        cards=seen["cards"],
        lacking=seen["lacking"],
        seconds=clock.lap("find"),
    )
    yield Waiting(text="B copies A's cards")
    yield _copy(a, b)
    clock.lap("copy")


def _started(node: NodeProcess) -> events.StartedNode:
    status = node.call("status")
    return events.StartedNode(
        name=status["name"],
        address=status["address"],
        node_id=status["node_id"],
        pid=status["pid"],
        home=status["home"],
        cards=status["cards"],
        bases=tuple(model["model"] for model in status["models"]),
    )


def _find(a: NodeProcess, b: NodeProcess) -> dict[str, Any]:
    """A as B sees it, by mDNS; where that does not work here, as B sees A once it is told the address."""
    deadline = time.monotonic() + FIND_TIMEOUT_S
    while time.monotonic() < deadline:
        seen: list[dict[str, Any]] = b.call("peers")
        for peer in seen:
            if peer["node_id"] == a.record.node_id and peer["alive"]:
                return peer
        time.sleep(POLL_S)
    told: dict[str, Any] = _only_peer(b.call("sync", peers=[a.record.address], dry_run=True))
    return told | {"source": "static", "cards": told["offered"], "lacking": len(told["missing"])}


def _copy(a: NodeProcess, b: NodeProcess) -> events.Copied:
    copied = _only_peer(b.call("sync", peers=[a.record.address]))
    again = b.call("sync", peers=[a.record.address])
    return events.Copied(
        cards=tuple(
            events.CopiedCard(**{name: card[name] for name in events.CopiedCard.__dataclass_fields__})
            for card in copied["fetched"]
        ),
        bytes_moved=copied["bytes_moved"],
        seconds=copied["seconds"],
        tensors_verified=copied["tensors_verified"],
        again=again["fetched"],
    )


def _only_peer(report: dict[str, Any]) -> dict[str, Any]:
    """What a sync with A says of A. Raises `DemoError` if anything failed."""
    (peer,) = report["peers"]
    if not report["ok"]:
        raise DemoError(f"B could not copy A's cards: {peer['error'] or peer['failed']}")
    return dict(peer)


def _load(b: NodeProcess, clock: Clock) -> Iterator[Event]:
    """Wait for B's models, which were loading all the while."""
    yield Waiting(text="B loads its models (at the first start ever, it converts one)")
    models = b.wait_for_models()
    clock.lap("load")
    yield events.Ready(models=models, seconds=clock.total())


def _work(b: NodeProcess, cards: Sequence[ShippedCard], clock: Clock) -> Generator[Event, None, tuple[str, ...]]:
    """B answers the prompts and scores the cards; returns what is not as it should be."""
    answered: list[Answered] = []
    scored: list[Scored] = []
    yield Waiting(text="B routes and answers")
    for answer in asking.answers(b, cards):
        answered.append(answer)
        yield answer
    clock.lap("answer")
    for card in cards:
        yield Waiting(text=f"B scores {card.name} on held-out examples")
        scored.append(asking.score(b, card, examples=EXAMPLES))
        yield scored[-1]
    clock.lap("score")
    return _problems(answered, scored)


def _problems(answered: Sequence[Answered], scored: Sequence[Scored]) -> tuple[str, ...]:
    """What the demo is there to show, and did not."""
    astray = [f"prompt {one.number} went to {one.card}, not {one.expected}" for one in answered if not one.as_expected]
    useless = [f"{one.name} does not help ({one.bare:.2f} → {one.with_card:.2f})" for one in scored if not one.helps]
    return (*astray, *useless)


@contextmanager
def _explained(*nodes: NodeProcess) -> Iterator[None]:
    """A failure comes with the last lines of both nodes' logs, for their homes go with it."""
    try:
        yield
    except ArrowMoEError as error:
        logs = "\n".join(f"{node.name} said last:\n{node.log_tail()}" for node in nodes)
        hint = f"{error.hint}\n{logs}" if error.hint else logs
        raise DemoError(str(error), hint=hint) from error
