"""Two nodes of which one's clock is ten years ahead, or behind: they join, prove themselves and sync all the same."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from registry.store import Registry
from tests.arrowmoe.nodes import ROOT, command, environment, node_process
from tests.e2e.clocks import library, wrong_by

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
PUBLISH = """
import sys
from datetime import UTC, datetime
from registry.store import Registry
from tests.registry.cards import small_card
with Registry.open(sys.argv[1]) as registry:
    card = small_card(sys.argv[2], seed=int(sys.argv[3]), created=datetime.now(UTC).isoformat())
    print(registry.publish(card).digest)
"""


def published(home: Path, name: str, seed: int, clock: dict[str, str]) -> str:
    """The digest of a card that a process with this clock made and published."""
    arguments = [sys.executable, "-c", PUBLISH, str(home), name, str(seed)]
    done = subprocess.run(
        arguments, cwd=ROOT, env=environment(home) | clock, capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.strip()


def told(home: Path, *args: str, **variables: str) -> Any:
    done = command(home, *args, "--json", **variables)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def cards(home: Path, clock: dict[str, str]) -> dict[str, bool]:
    """Which cards are here, by name, and whether they may be used."""
    return {card["name"]: card["quarantined"] is None for card in told(home, "skills", "ls", **clock)}


@pytest.mark.parametrize("years", [10, -10])
def test_a_clock_that_is_ten_years_off_costs_a_question_and_no_card(tmp_path: Path, years: int) -> None:
    right: dict[str, str] = {}
    wrong = wrong_by(library(tmp_path), years)
    anna, bert = tmp_path / "anna", tmp_path / "bert"
    serving = ("--host", "0.0.0.0", "--no-discovery", "--name")
    with node_process(anna, *serving, "anna"), node_process(bert, *serving, "bert", **wrong):
        token = command(anna, "peers", "invite", "--quiet").stdout.strip()
        assert told(bert, "peers", "join", token, **wrong)["state"] == "approved"  # the token is judged by anna's clock
        of_anna = published(anna, "of-anna", 1, right)
        of_bert = published(bert, "of-bert", 2, wrong)
        with Registry.open(bert) as registry:
            created = registry.get(of_bert).manifest.created
            assert abs(created - datetime.now(UTC) - timedelta(days=365.25 * years)) < timedelta(minutes=5)
        for home, clock in ((anna, right), (bert, wrong)):
            report = told(home, "skills", "sync", **clock)
            assert report["ok"], report
        # A date in the future would win a label for years, so a card that has one waits for the owner; no other does.
        assert cards(anna, right) == {"of-anna": True, "of-bert": years < 0}
        assert cards(bert, wrong) == {"of-anna": years > 0, "of-bert": True}
        doubted, at, clock = (anna, of_bert, right) if years > 0 else (bert, of_anna, wrong)
        reason = told(doubted, "skills", "show", at, **clock)["quarantined"]
        assert "it says it was made at" in json.dumps(reason)
        assert command(doubted, "skills", "admit", at, **clock).returncode == 0
        for home, clock in ((anna, right), (bert, wrong)):
            assert cards(home, clock) == {"of-anna": True, "of-bert": True}
            assert all(one["ok"] for one in told(home, "skills", "verify", **clock))
        assert command(bert, "skills", "rm", "of-bert", "--yes", **wrong).returncode == 0
        for _ in range(2):  # removal needs no clock, and what is removed does not come back
            assert told(anna, "skills", "sync")["ok"]
            assert cards(anna, right) == {"of-anna": True}


@pytest.mark.parametrize("years", [10, -10])
def test_a_clock_that_jumps_ends_an_invitation_and_nothing_else(tmp_path: Path, years: int) -> None:
    """A host's clock jumps after it invited. Jumping ahead lets the token expire; who is a peer stays one."""
    wrong = wrong_by(library(tmp_path), years)
    anna, bert, carl = (tmp_path / name for name in ("anna", "bert", "carl"))
    serving = ("--host", "0.0.0.0", "--no-discovery", "--name")
    with node_process(bert, *serving, "bert"):
        with node_process(anna, *serving, "anna") as before:
            port = before.ready["address"].rpartition(":")[2]
            invited = [command(anna, "peers", "invite", "--quiet").stdout.strip() for _ in range(2)]
            assert told(bert, "peers", "join", invited[0])["state"] == "approved"
            digest = published(anna, "poet", 1, {})
            assert before.end(signal.SIGTERM) == 0
        with node_process(anna, *serving, "anna", "--flight-port", port, **wrong):
            joined = command(carl, "peers", "join", invited[1])
            assert (joined.returncode, "expired" in joined.stderr) == ((1, True) if years > 0 else (0, False))
            report = told(bert, "skills", "sync")
            assert [card["digest"] for peer in report["peers"] for card in peer["fetched"]] == [digest]
