"""The demo's sixth step: node A is asked what no card fits, learns it overnight, and node B answers it.

The teacher is a process on loopback that speaks as OpenAI's service does and knows the answers of one invented
warehouse; what is asked of B afterwards was never asked of the teacher.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from arrowmoe import views
from arrowmoe.demo.events import Asked, Grown, Learnt, Training, Waiting
from arrowmoe.demo.nodes import DemoError, NodeProcess, node_process
from arrowmoe.demo.scores import share
from arrowmoe.demo.shipped import BASES, DATA, Example, family
from registry.store import Registry

ASKED = 40
SHOWN = 2
ANSWER_TOKENS = 16
TOLD_EVERY = 4
"""Training steps between two lines about the loss."""
SETTINGS = {
    "ARROWMOE_TEACHER__MODEL": "warehouse-handbook",
    "ARROWMOE_TEACHER__KEY_VARIABLE": "ARROWMOE_DEMO_KEY",
    "ARROWMOE_DEMO_KEY": "any word will do",
    "ARROWMOE_TEACHER__DISCLOSURE": "full",
    "ARROWMOE_EVOLUTION__MOST_EXAMPLES": "160",
    "ARROWMOE_EVOLUTION__STEPS": "40",
    "ARROWMOE_EVOLUTION__ANCHORS": "60",
}
"""Prompts leave node A in full: its teacher is on this machine, and the warehouse invented."""

NightEvent = Waiting | Asked | Training | Grown | Learnt


def night(directory: Path, b: NodeProcess) -> Generator[NightEvent, None, tuple[str, ...]]:
    """Grow an expert on node A, which is started again with a base model; returns what is not as it should be."""
    known, unseen = family("asked")[:ASKED], family("heldout")
    with teacher(directory) as url:
        variables = SETTINGS | {"ARROWMOE_TEACHER__BASE_URL": url}
        with node_process("demo-a", directory, bases=(BASES["causal"],), variables=variables) as a:
            yield Waiting(text="A starts again, with a base model and a teacher")
            a.wait_for_models()
            yield Waiting(text=f"A is asked {len(known)} questions of a kind that it does not know")
            yield _asked(a, known)
            grown = yield from _grown(a)
            yield grown
            yield Waiting(text="B copies the expert, and is asked what nobody taught")
            b.call("sync", peers=[a.record.address])
            yield (learnt := _learnt(b, unseen))
    return _problems(learnt, grown)


@contextmanager
def teacher(directory: Path) -> Iterator[str]:
    """The address of a teacher process, until the exit."""
    log = directory / "teacher.log"
    gold = DATA / "part-finder.gold.jsonl"
    command = [sys.executable, "-m", "evolution.loopback_teacher", str(gold), "--log", str(log)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            if not said:
                raise DemoError("the teacher ended before it served")
            yield str(json.loads(said)["url"])
        finally:
            process.terminate()


def _asked(a: NodeProcess, known: tuple[Example, ...]) -> Asked:
    made = _answers(a, known)
    return Asked(
        node=a.record.name,
        prompts=len(known),
        abstained=sum(not one["adapters"] for one in made),
        right=sum(one["text"].strip() == example.wanted for one, example in zip(made, known, strict=True)),
        prompt=known[0].text,
        answer=made[0]["text"],
        wanted=known[0].wanted,
    )


def _grown(a: NodeProcess) -> Generator[Waiting | Training, None, Grown]:
    """`evolve run` on A, its progress as events."""
    said: queue.Queue[Mapping[str, Any] | None] = queue.Queue()
    pool = ThreadPoolExecutor(1, thread_name_prefix="arrowmoe-demo-night")
    report = pool.submit(a.call, "evolve_run", on_progress=said.put)
    report.add_done_callback(lambda _: said.put(None))
    pool.shutdown(wait=False)
    stage, told = "", -TOLD_EVERY
    yield Waiting(text="A looks for what its cards do not cover")
    while (one := said.get()) is not None:
        if one["stage"] != stage:
            stage = one["stage"]
            yield Waiting(text=f"A's night: {stage}")
        if one["loss_nats"] is not None and one["step"] >= told + TOLD_EVERY:
            told = one["step"]
            yield Training(step=told, steps=one["steps"], loss_nats=one["loss_nats"])
            yield Waiting(text="A's night: train")
    return _of_report(a, report.result())


def _of_report(a: NodeProcess, report: Mapping[str, Any]) -> Grown:
    """What A published, with the evidence that the card itself carries."""
    (found,) = report["nights"]
    if not found["published"]:
        why = "; ".join(gap["why"] for gap in found["gaps"]) or f"it found {found['found'] or 'nothing'}"
        raise DemoError(f"A's night published nothing: {why}")
    label = found["published"][0]
    with Registry.open(a.home) as registry:
        card = registry.get(label)
    gate = views.gate(card.manifest.evaluation["gate"])
    assert gate is not None
    return Grown(
        name=card.name,
        label=label,
        prompts=card.manifest.training["gap"]["prompts"],
        held_out=int(gate["items"]),
        base=gate["base"],
        candidate=gate["candidate"],
        p_value=gate["p_value"],
        alpha=gate["alpha"],
        anchors=int(gate["anchors"]),
        rise_nats=gate["served_rise_nats"][0],
        seconds=found["seconds"],
    )


def _learnt(b: NodeProcess, unseen: tuple[Example, ...]) -> Learnt:
    texts, wanted = [one.text for one in unseen], [one.wanted for one in unseen]
    bare = b.call("generate", prompts=texts, base=BASES["causal"], max_new_tokens=ANSWER_TOKENS)
    made = _answers(b, unseen)
    return Learnt(
        node=b.record.name,
        prompts=len(unseen),
        routed=sum(bool(one["adapters"]) for one in made),
        bare=share([one["text"] for one in bare], wanted),
        with_card=share([one["text"] for one in made], wanted),
        shown=tuple((texts[at], bare[at]["text"], made[at]["text"]) for at in range(SHOWN)),
    )


def _answers(node: NodeProcess, examples: tuple[Example, ...]) -> list[Mapping[str, Any]]:
    """Routed answers."""
    texts = [one.text for one in examples]
    made: list[Mapping[str, Any]] = node.call(
        "generate", prompts=texts, base=BASES["causal"], adapter="auto", max_new_tokens=ANSWER_TOKENS
    )
    return made


def _problems(learnt: Learnt, grown: Grown) -> tuple[str, ...]:
    if learnt.with_card > max(0.5, learnt.bare):
        return ()
    return (f"{grown.name} answers {learnt.with_card:.0%} of what nobody taught, the bare model {learnt.bare:.0%}",)


__all__ = ["ASKED", "SETTINGS", "NightEvent", "night", "teacher"]
