"""A real node is killed in mid-training, with SmolLM2; its next start carries the night on by itself, once."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from arrowmoe.demo import night
from arrowmoe.demo.nodes import node_process
from arrowmoe.demo.shipped import BASES, family
from evolution.journal import Journal
from registry.errors import ArrowMoEError
from registry.store import Registry
from tests.e2e.conftest import processes_in

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1500)]
BEFORE_THE_KILL = 15


def until(true: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_node_that_is_killed_in_mid_training_carries_the_night_on_at_its_next_start(tmp_path: Path) -> None:
    known, home = [one.text for one in family("asked")[: night.ASKED]], tmp_path / "a"

    def taken() -> int:
        logs = [*home.glob("nights/*/trained-1/progress.jsonl")]
        return logs[0].read_bytes().count(b'"train"') if logs else 0

    def ended() -> bool:
        return journal.nights()[0].ended is not None

    with night.teacher(tmp_path) as url, ThreadPoolExecutor(1) as pool:
        variables = night.SETTINGS | {"ARROWMOE_TEACHER__BASE_URL": url}
        with node_process("a", tmp_path, bases=(BASES["causal"],), variables=variables) as a:
            a.wait_for_models()
            a.call("generate", prompts=known, base=BASES["causal"], adapter="auto", max_new_tokens=16)
            running = pool.submit(a.call, "evolve_run")
            until(lambda: taken() >= BEFORE_THE_KILL, 600)
            os.kill(a.record.pid, signal.SIGKILL)
            with pytest.raises(ArrowMoEError):
                running.result(60)
        until(lambda: processes_in(home) == [], 30)
        with Registry.open(home) as registry:
            journal = Journal(registry.database)
            assert (registry.list(), ended()) == ([], False)
        with node_process("a", tmp_path, bases=(BASES["causal"],), variables=variables) as a:
            a.wait_for_models()
            with Registry.open(home) as registry:
                journal = Journal(registry.database)
                until(ended, 900)
    with Registry.open(home) as registry:
        journal = Journal(registry.database)
        [only], [gap], [card] = journal.nights(), journal.gaps(), registry.list()
        assert (only.state, gap.state, gap.card) == ("done", "published", card.digest)
        [grown] = [job for job in journal.jobs() if job.kind == "grow"]
        assert grown.attempts == 2
        assert [step.step for step in journal.steps(grown.id) if step.phase == "train-1"].count(1) == 1
