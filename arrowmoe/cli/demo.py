"""`arrowmoe demo`: the main job on two nodes, told in six steps."""

from __future__ import annotations

import signal
import textwrap
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from functools import singledispatchmethod
from typing import Annotated, Any, NoReturn

import typer

from arrowmoe import demo as story
from arrowmoe.cli.app import app_of, group
from arrowmoe.cli.output import Output, short, size

app = group()
WIDTH = 96
METRICS = {"exact_match": "exact match", "nearest_neighbour_accuracy": "nearest neighbour"}
TERMINATED = 143
NEXT = (
    ("arrowmoe skills import DIR --description TEXT", "make a card of your own PEFT adapter"),
    ("arrowmoe node start --base builtin:smollm2", "run a node that shares it and answers"),
    ("arrowmoe ask TEXT", "ask that node, from another terminal"),
)


@app.command()
def demo(
    context: typer.Context,
    fast: Annotated[bool, typer.Option("--fast", help="Leave out the night, in which an expert is grown.")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep both nodes' homes, and say where they are.")] = False,
) -> None:
    """Show the main job: two nodes share cards, answer prompts with those that fit, and grow a new one. Offline."""
    invocation = app_of(context)
    out, teller = invocation.out, Teller(invocation.out)
    with invocation.logging(), _ended_by_sigterm(), closing(story.run(fast=fast, keep=keep)) as events:
        for event in _watched(out, events):
            teller.tell(event)
    out.result(teller.report, lambda: None, quiet=[f"{teller.report['ended']['seconds']:.1f}"])
    if problems := teller.report["ended"]["problems"]:
        raise story.DemoError("; ".join(problems), hint="`make cards` trains the demo's cards again")


class Teller:
    """Tells each event to people as it comes, and keeps all of them as `report` for `--json`."""

    def __init__(self, out: Output) -> None:
        self.report: dict[str, Any] = {"answers": [], "scores": []}
        self._out = out

    @singledispatchmethod
    def tell(self, event: story.Event) -> None:
        """One event."""
        raise TypeError(f"expected an event of the demo, got {type(event).__name__}")

    @tell.register
    def _(self, event: story.Started) -> None:
        self.report["started"] = asdict(event)
        self._heading(1, "Two nodes, each a process with a home of its own")
        for node in event.nodes:
            does = f"loads {' and '.join(node.bases)}" if node.bases else "no base model, it serves cards only"
            self._line(f"{node.name}  {node.address}  id {short(node.node_id)}  {node.cards} cards  {does}")

    @tell.register
    def _(self, event: story.Found) -> None:
        self.report["found"] = asdict(event)
        self._heading(2, "B finds A")
        if event.source == "mdns":
            self._line(f"by mDNS, {event.seconds:.1f} s after both were up: {event.name} at {event.address}")
        else:
            self._line(f"mDNS found nothing in {event.seconds:.0f} s, so B was told the address: {event.address}")
        self._line(f"A offers {event.cards} cards; B lacks {event.lacking} of them")

    @tell.register
    def _(self, event: story.Copied) -> None:
        self.report["copied"] = asdict(event)
        self._heading(3, "B copies what it lacks, and verifies every tensor")
        for card in event.cards:
            base = card.base_name.rpartition("/")[2]
            self._line(f"{card.name:<15} {short(card.digest)}  {size(card.nbytes):>9}  rank {card.rank}  for {base}")
        megabytes = event.bytes_moved / 1e6
        self._line(f"{megabytes:.2f} MB in {event.seconds:.2f} s ({megabytes / event.seconds:.0f} MB/s)")
        publishers = ", ".join(sorted({short(card.publisher) for card in event.cards}))
        self._line(
            f"{event.tensors_verified} tensors match their digests, {len(event.cards)} cards signed by {publishers}"
        )
        self._line(f"a second sync moves {event.again} cards")

    @tell.register
    def _(self, event: story.Ready) -> None:
        self.report["ready"] = asdict(event)
        self._heading(4, "B routes six prompts, and answers each without and with the card chosen")
        models = " and ".join(name.rpartition("/")[2] for name in event.models)
        self._line(f"{models} were ready after {event.seconds:.0f} s")

    @tell.register
    def _(self, event: story.Answered) -> None:
        self.report["answers"].append(asdict(event))
        self._line()
        self._line(f"{event.number}  {event.prompt}")
        fit = f"p {event.fit:.2f}, asked {event.asked:.2f}"
        if event.card is None:
            self._said("card", f"none fits ({event.nearest} {fit}): the bare base model answers")
            self._said("without", event.answer)
            return
        self._said("card", f"{event.card} ({fit})")
        self._said("without", event.bare)
        self._said("with", event.answer, style="green")

    @tell.register
    def _(self, event: story.Scored) -> None:
        if not self.report["scores"]:
            self._heading(5, "Held-out examples, never trained on, without and with each card")
            self._line(f"{'card':<16}{'measure':<20}{'examples':>8}{'without':>10}{'with':>8}", style="dim")
        self.report["scores"].append(asdict(event))
        metric = METRICS.get(event.metric, event.metric)
        self._line(f"{event.name:<16}{metric:<20}{event.examples:>8}{event.bare:>10.1%}{event.with_card:>8.1%}")

    @tell.register
    def _(self, event: story.Asked) -> None:
        self.report["asked"] = asdict(event)
        self._heading(6, "A night: node A learns what no card fits, from a teacher, and B has it by morning")
        self._line(f"A, now with a base model, is asked {event.prompts} questions about a warehouse, such as")
        self._said("", event.prompt)
        self._said("answer", event.answer)
        self._said("right is", event.wanted)
        self._line(f"{event.abstained} of {event.prompts} fit no card, {event.right} are answered right")
        self._line(f"`arrowmoe evolve run` on {event.node}: the training's loss, in nats per token")

    @tell.register
    def _(self, event: story.Training) -> None:
        self.report.setdefault("training", []).append(asdict(event))
        bar = "█" * round(min(8.0, event.loss_nats) * 6)
        self._line(f"   step {event.step:>3} of {event.steps}  {event.loss_nats:6.3f}  {bar}".rstrip(), style="dim")

    @tell.register
    def _(self, event: story.Grown) -> None:
        self.report["grown"] = asdict(event)
        self._line(f"the gate: {event.base:.0%} → {event.candidate:.0%} right of {event.held_out} held-out examples")
        self._line(f"   (p = {event.p_value:.1e}, asked {event.alpha:.3f}); {event.anchors} questions on other matters")
        self._line(f"   as before; the loss on other text rises by {event.rise_nats:.3f} nats as served")
        self._line(f"published as {event.label}, signed by A, {event.seconds:.0f} s after the night began")

    @tell.register
    def _(self, event: story.Learnt) -> None:
        self.report["learnt"] = asdict(event)
        self._line(f"B copies it, and is asked {event.prompts} questions that nobody taught: {event.routed} go to it,")
        self._line(f"   {event.bare:.0%} are right without, {event.with_card:.0%} with it")
        for prompt, bare, answer in event.shown:
            self._line()
            self._said("", prompt)
            self._said("without", bare)
            self._said("with", answer, style="green")

    @tell.register
    def _(self, event: story.Ended) -> None:
        self.report["ended"] = asdict(event)
        phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in event.phases.items())
        self._line()
        self._line(f"Done in {event.seconds:.1f} s; both nodes have ended", indent=0, style="bold")
        self._line(f"seconds: {phases}")
        if event.kept:
            self._line(f"their homes are kept under {event.kept}")
        self._line()
        self._line("Try next", indent=0, style="bold")
        for command, does in NEXT:
            self._line(f"{command:<48} {does}")

    def _heading(self, number: int, text: str) -> None:
        if number > 1:
            self._line()
        self._line(f"{number}  {text}", indent=0, style="bold")

    def _said(self, what: str, text: str, style: str = "") -> None:
        words = " ".join(text.split()) or "(nothing)"
        self._line(f"   {what:<8} {textwrap.shorten(words, WIDTH - 15, placeholder=' …')}", style=style)

    def _line(self, text: str = "", *, indent: int = 3, style: str = "") -> None:
        if self._out.mode == "human":
            self._out.line(" " * indent + text if text else "", style=style)


def _watched(out: Output, events: Iterator[story.Event]) -> Iterator[story.Event]:
    """The events but for those that say what is waited for, which a person sees while waiting."""
    waiting = "starting"
    while True:
        with out.progress(waiting):
            event = next(events, None)
        if event is None:
            return
        if isinstance(event, story.Waiting):
            waiting = event.text
        else:
            yield event


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the demo as Ctrl-C does: its nodes with it."""

    def end(*_: object) -> NoReturn:
        raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
