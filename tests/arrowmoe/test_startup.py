from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from arrowmoe.cli.main import COMMANDS
from tests.arrowmoe.nodes import HEAVY, ROOT, environment, modules_after

LIMIT_S = 0.5


@pytest.mark.parametrize(
    "args",
    [
        *(["--help"], ["--version"], ["config", "show"]),
        *([noun, "--help"] for noun in ("skills", "ask", "evolve", "feedback")),
    ],
)
def test_help_imports_nothing_heavy(tmp_path: Path, args: list[str]) -> None:
    assert modules_after(tmp_path / "home", *args).isdisjoint(HEAVY)


@pytest.mark.parametrize("words", ["arrowmoe ", "arrowmoe skills ", "arrowmoe ask --"])
def test_completion_imports_nothing_heavy(tmp_path: Path, words: str) -> None:
    modules = modules_after(
        tmp_path / "home",
        _ARROWMOE_COMPLETE="complete_bash",
        COMP_WORDS=words,
        COMP_CWORD=str(len(words.split(" ")) - 1),
    )
    assert modules.isdisjoint(HEAVY)


def test_completion_knows_the_commands(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "arrowmoe"],
        cwd=ROOT,
        env=environment(tmp_path)
        | {"_ARROWMOE_COMPLETE": "complete_bash", "COMP_WORDS": "arrowmoe sk", "COMP_CWORD": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.split() == ["skills"]


def test_help_lists_every_command_and_is_quick(tmp_path: Path) -> None:
    shown = ""
    used_s = []
    for _ in range(4):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-m", "arrowmoe", "--help"],
            cwd=ROOT,
            env=environment(tmp_path),
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        shown = done.stdout
        used_s.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert all(f" {name} " in shown for name in COMMANDS)
    assert min(used_s) < LIMIT_S, f"{os.cpu_count()} cores took {used_s}"


def test_a_node_without_base_models_imports_no_torch(tmp_path: Path) -> None:
    program = "import sys, arrowmoe\nfrom pathlib import Path\n"
    program += (
        "with arrowmoe.Node(arrowmoe.Settings(home=Path(sys.argv[1]), discovery=False)) as node:\n    node.peers()\n"
    )
    program += "print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=ROOT,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "False"
