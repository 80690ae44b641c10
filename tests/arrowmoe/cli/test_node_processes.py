"""Real node processes: starting, holding a home, ending in every way, and syncing with each other."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
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
            assert (peer["name"], peer["state"], peer["lacking"]) == ("theirs", "online", 5)
            report = json.loads(command(ours, "skills", "sync", "--json").stdout)
            assert {card["digest"] for card in report["peers"][0]["fetched"]} == digests
            again = json.loads(command(ours, "skills", "sync", "--peer", address, "--json").stdout)
            assert (again["ok"], again["fetched"], again["bytes_moved"]) == (True, 0, 0)
            assert states(ours) == {"theirs": "up to date"}
            giver.end(signal.SIGKILL)
            assert [*states(ours).values()] == ["unreachable"]
    assert set(command(ours, "skills", "ls", "-q").stdout.split()) == digests
    assert all(one["ok"] for one in json.loads(command(ours, "skills", "verify", "--json").stdout))


def test_a_node_with_models_answers_a_command_that_imports_none(home: Path, tiny_models: tuple[Path, Path]) -> None:
    with node_process(home, "--base", str(tiny_models[0]), ARROWMOE_EMBEDDER=str(tiny_models[1])) as node:
        assert modules_after(home, "ask", "w5", "--max-new-tokens", "2").isdisjoint(HEAVY)
        assert modules_after(home, "route", "w5").isdisjoint(HEAVY)
        assert modules_after(home, "encode", "w5").isdisjoint(HEAVY)
        assert node.end(signal.SIGTERM) == 0


def test_three_nodes_become_peers_by_invitations_and_share_a_card(tmp_path: Path) -> None:
    """Off the loopback, where a stranger is not answered; the last two were never told of each other."""
    homes = [tmp_path / name for name in ("anna", "bert", "carl")]
    with ExitStack() as stack:
        for home in homes:
            stack.enter_context(node_process(home, "--host", "0.0.0.0", "--name", home.name))
        anna, bert, carl = homes
        for guest in (bert, carl):
            token = command(anna, "peers", "invite", "--quiet").stdout.strip()
            joined = json.loads(command(guest, "peers", "join", token, "--json").stdout)
            assert (joined["name"], joined["state"], joined["served"]) == ("anna", "approved", True)
        again = command(carl, "peers", "join", token.replace("arrowmoe-", "arrowmoe-x"))
        assert (again.returncode, "join token is damaged" in again.stderr) == (1, True)
        with Registry.open(bert) as registry:
            digest = registry.publish(small_card("poet")).digest
        eventually(lambda: standing(carl).get("bert") == ("approved", True))
        report = json.loads(command(carl, "skills", "sync", "--json").stdout)
        assert [card["digest"] for peer in report["peers"] for card in peer["fetched"]] == [digest]
        node_id = json.loads(command(carl, "node", "id", "--json").stdout)["node_id"]
        assert command(anna, "peers", "block", node_id).returncode == 0
        eventually(lambda: standing(bert)["carl"][0] == "pending")
        assert states(bert)["carl"] == "pending"
        assert "has blocked" in command(carl, "peers", "ls", "--json").stdout
        assert json.loads(command(anna, "peers", "rm", node_id, "--json").stdout)["state"] == "blocked"
        assert "carl" not in standing(anna)


def eventually(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def states(home: Path) -> dict[str, str]:
    """How its peers are."""
    return {row["name"]: row["state"] for row in json.loads(command(home, "peers", "ls", "--json").stdout)}


def standing(home: Path) -> dict[str, tuple[str, bool]]:
    """What a node thinks of the others, and whether they answer it."""
    rows = json.loads(command(home, "peers", "ls", "--json").stdout)
    return {row["name"]: (row["standing"], row["alive"]) for row in rows}


def test_without_a_node_peers_are_approved_and_nobody_is_invited(home: Path) -> None:
    shown = "-".join(["abcd"] * 8)
    done = json.loads(command(home, "peers", "approve", shown.upper(), "--name", "eve", "--json").stdout)
    assert (done["node_id"], done["state"], done["fingerprint"]) == ("abcd" * 8, "approved", shown)
    assert standing(home) == {"eve": ("approved", False)}
    assert command(home, "peers", "approve", "abcd").returncode == 1
    assert command(home, "peers", "rm", "0" * 32).returncode == 1
    assert "no node runs" in command(home, "peers", "invite").stderr
