"""Real node processes: starting, holding a home, ending in every way, and syncing with each other."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from registry.store import Registry
from tests.arrowmoe.nodes import HEAVY, command, modules_after, node_process
from tests.registry.cards import small_card

pytestmark = pytest.mark.e2e


def test_a_second_start_says_who_holds_the_home(home: Path) -> None:
    with node_process(home, "--name", "first") as node:
        assert "token" not in node.ready
        second = command(home, "node", "start")
        assert (second.returncode, second.stdout) == (1, "")
        assert f"is held by process {node.process.pid} since" in second.stderr
        assert node.ready["address"] in second.stderr
        assert "hint: " in second.stderr
        status = json.loads(command(home, "node", "status", "--json").stdout)
        assert (status["running"], status["name"], status["pid"]) == (True, "first", node.process.pid)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_node_cleanly(home: Path, number: int) -> None:
    with node_process(home) as node:
        assert (home / "node.json").exists()
        assert node.end(number) == 0
        assert not (home / "node.json").exists()
        log = (home / "logs" / "arrowmoe.log").read_text()
        assert [json.loads(line)["event"] for line in log.splitlines()][-1] == "node_ended"


def test_stop_waits_until_the_home_is_free(home: Path) -> None:
    with node_process(home) as node:
        assert command(home, "node", "stop").returncode == 0
        assert node.process.wait(timeout=10) == 0
    nobody = command(home, "node", "stop")
    assert (nobody.returncode, "no node runs on" in nobody.stderr) == (1, True)
    status = command(home, "node", "status", "--json")
    assert (status.returncode, json.loads(status.stdout)["running"]) == (1, False)


def test_after_kill_9_the_next_start_works(home: Path) -> None:
    with node_process(home) as node:
        node.end(signal.SIGKILL)
    assert (home / "node.json").exists()
    assert command(home, "node", "status").returncode == 1
    assert command(home, "skills", "ls", "--json").stdout == "[]\n"
    with node_process(home) as node:
        assert node.end(signal.SIGTERM) == 0


def test_two_nodes_sync_cards(make_home: Callable[[str], Path]) -> None:
    ours, theirs = make_home("ours"), make_home("theirs")
    with Registry.open(theirs) as registry:
        digests = {registry.publish(small_card(f"card-{index}", seed=index)).digest for index in range(5)}
    with node_process(theirs, "--name", "theirs") as giver:
        address = giver.ready["address"]
        with node_process(ours, "--name", "ours", "--peer", address):
            (peer,) = json.loads(command(ours, "peers", "ls", "--json").stdout)
            assert (peer["name"], peer["alive"], peer["lacking"]) == ("theirs", True, 5)
            report = json.loads(command(ours, "skills", "sync", "--json").stdout)
            assert {card["digest"] for card in report["peers"][0]["fetched"]} == digests
            again = json.loads(command(ours, "skills", "sync", "--peer", address, "--json").stdout)
            assert (again["ok"], again["fetched"], again["bytes_moved"]) == (True, 0, 0)
    assert set(command(ours, "skills", "ls", "-q").stdout.split()) == digests
    assert all(one["ok"] for one in json.loads(command(ours, "skills", "verify", "--json").stdout))


def test_a_node_with_models_answers_a_command_that_imports_none(home: Path, tiny_models: tuple[Path, Path]) -> None:
    with node_process(home, "--base", str(tiny_models[0]), ARROWMOE_EMBEDDER=str(tiny_models[1])) as node:
        assert modules_after(home, "ask", "w5", "--max-new-tokens", "2").isdisjoint(HEAVY)
        assert modules_after(home, "route", "w5").isdisjoint(HEAVY)
        assert modules_after(home, "encode", "w5").isdisjoint(HEAVY)
        assert node.end(signal.SIGTERM) == 0


def test_off_loopback_a_node_wants_to_be_told(home: Path) -> None:
    refused = command(home, "node", "start", "--host", "0.0.0.0")
    assert refused.returncode == 1
    assert "--open" in refused.stderr
    with node_process(home, "--host", "0.0.0.0", "--open") as node:
        assert node.ready["address"].startswith("0.0.0.0:")
