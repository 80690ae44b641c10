"""Three nodes that strangers start: two join the first, and what one of them publishes, the other answers with."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from registry.format import LoRAFormat
from tests.arrowmoe.nodes import NodeProcess, command, node_process, save_tiny_models
from tests.arrowmoe.tiny import card_for, llama_engine

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]
WITHIN_S = 10.0
PROMPT = "w5 w6"


def told(home: Path, *args: str) -> Any:
    """What a command says on this home."""
    done = command(home, *args, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def eventually(condition: Callable[[], bool], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def has_models(home: Path) -> bool:
    return {model["state"] for model in told(home, "node", "status")["models"]} == {"ready"}


def started(stack: ExitStack, home: Path, models: tuple[Path, Path]) -> NodeProcess:
    """A node off the loopback, where nobody is answered who was not let in; it finds no one by itself."""
    found = ("--host", "0.0.0.0", "--name", home.name, "--base", str(models[0]))
    return stack.enter_context(node_process(home, *found, ARROWMOE_EMBEDDER=str(models[1])))


def test_a_card_of_one_guest_is_used_by_the_other_within_ten_seconds(tmp_path: Path) -> None:
    models = save_tiny_models(tmp_path / "models")
    file = tmp_path / "dates.lora.arrow"
    LoRAFormat.save(card_for(llama_engine(), tmp_path, "dates", seed=3), file)
    anna, bert, carl = (tmp_path / name for name in ("anna", "bert", "carl"))
    with ExitStack() as stack:
        for home in (anna, bert, carl):
            started(stack, home, models)
        for guest in (bert, carl):
            token = command(anna, "peers", "invite", "--quiet").stdout.strip()
            assert told(guest, "peers", "join", token)["state"] == "approved"
        eventually(lambda: has_models(carl) and has_models(bert))
        eventually(
            lambda: all(row["alive"] for row in told(carl, "peers", "ls")) and len(told(carl, "peers", "ls")) == 2
        )
        before = told(carl, "ask", PROMPT, "--max-new-tokens", "2")
        published = told(bert, "skills", "import", str(file), "--description", "w3 w4", "--example", PROMPT)
        start_s = time.monotonic()
        while not (answer := told(carl, "ask", PROMPT, "--max-new-tokens", "2"))["adapters"]:
            assert time.monotonic() - start_s < 3 * WITHIN_S
        waited_s = time.monotonic() - start_s
        here = told(carl, "skills", "show", "dates")
    assert before["adapters"] == {}
    assert [*answer["adapters"]] == ["dates"]
    assert (here["digest"], here["quarantined"], here["publisher"]) == (
        published["digest"],
        None,
        published["publisher"],
    )
    assert waited_s <= WITHIN_S, f"{waited_s:.1f} s"
