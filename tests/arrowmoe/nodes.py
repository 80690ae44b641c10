"""Homes, nodes in processes of their own, and tiny models on disk, for tests of the node and the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tests.arrowmoe.tiny import base, tokenizer
from tests.peft_models import tiny_bert, tiny_llama

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "pyarrow", "sqlalchemy", "zeroconf")
PROBE = """
import json, sys
from arrowmoe.cli.main import run
code = run(sys.argv[2:])
with open(sys.argv[1], "w") as file:
    json.dump([code, sorted({name.partition(".")[0] for name in sys.modules})], file)
"""


def save_tiny_models(directory: Path) -> tuple[Path, Path]:
    """A causal model `tiny` and an encoder `tiny-encoder` as directories that any loader reads."""
    causal, encoder = directory / "tiny", directory / "tiny-encoder"
    for path, model in ((causal, base(tiny_llama()).model), (encoder, tiny_bert())):
        model.save_pretrained(path)
        tokenizer().save_pretrained(path)
    return causal, encoder


def environment(home: Path) -> dict[str, str]:
    """A process's environment with a home of its own and no settings of the machine's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ARROWMOE_")}
    return kept | {"ARROWMOE_HOME": str(home), "ARROWMOE_DISCOVERY": "0", "OMP_NUM_THREADS": "1"}


def command(home: Path, *args: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run one `arrowmoe` command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "arrowmoe", *args],
        cwd=ROOT,
        env=environment(home) | variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@dataclass(kw_only=True)
class NodeProcess:
    """A node in a process of its own."""

    home: Path
    process: subprocess.Popen[str]

    @cached_property
    def ready(self) -> Mapping[str, Any]:
        """What it said when it was ready: one JSON object."""
        lines = []
        assert self.process.stdout is not None
        for line in self.process.stdout:
            lines.append(line)
            if line == "}\n":
                return json.loads("".join(lines))  # type: ignore[no-any-return]
        raise AssertionError(f"the node ended: {self.process.communicate()[1]}")

    def end(self, number: int) -> int:
        """Send a signal; the exit code."""
        self.process.send_signal(number)
        return self.process.wait(timeout=20)


@contextmanager
def node_process(home: Path, *args: str, **variables: str) -> Iterator[NodeProcess]:
    """A node that is ready; killed at the end if it still runs."""
    process = subprocess.Popen(
        [sys.executable, "-m", "arrowmoe", "node", "start", "--json", *args],
        cwd=ROOT,
        env=environment(home) | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        node = NodeProcess(home=home, process=process)
        assert node.ready
        yield node
    finally:
        process.kill()
        process.communicate()


def modules_after(home: Path, *args: str, **variables: str) -> set[str]:
    """The top-level modules that a command line imports."""
    seen = home.with_name("seen.json")
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(seen), *args],
        cwd=ROOT,
        env=environment(home) | variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert seen.exists(), done.stderr
    code, modules = json.loads(seen.read_text())
    assert code == 0, done.stderr
    return set(modules)
