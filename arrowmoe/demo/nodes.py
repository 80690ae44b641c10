"""Node processes of the demo: started as a user starts them, asked through the control channel, ended in any case."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from arrowmoe import control
from arrowmoe.home import NodeRecord, read_record
from registry.errors import ArrowMoEError

START_TIMEOUT_S = 60.0
END_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 300.0
LOG_LINES = 20
POLL_S = 0.2
KEPT_VARIABLES = frozenset({"ARROWMOE_CACHE_DIR", "ARROWMOE_DEBUG"})


class DemoError(ArrowMoEError):
    """A step of the demo failed, or a card does not help."""


class NodeProcess:
    """A node in a process of its own; whatever it says goes to `log`."""

    def __init__(self, process: subprocess.Popen[bytes], *, name: str, home: Path, log: Path) -> None:
        self.name, self.home, self.log = name, home, log
        self._process = process
        self._record: NodeRecord | None = None

    @property
    def record(self) -> NodeRecord:
        """Where the node serves; waits until it does. Raises `DemoError` if it ends instead."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while self._record is None:
            found = read_record(self.home)
            if found is not None and found.pid == self._process.pid:
                self._record = found
            elif self._process.poll() is not None:
                raise DemoError(f"node {self.name} ended with exit code {self._process.returncode} before it served")
            elif time.monotonic() > deadline:
                raise DemoError(f"node {self.name} did not serve within {START_TIMEOUT_S:g} s")
            else:
                time.sleep(0.02)
        return self._record

    def call(self, method: str, *, on_progress: control.Progress | None = None, **params: Any) -> Any:
        """Ask the node, as the command line does."""
        return control.call(self.record, method, params, on_progress=on_progress, timeout_s=ANSWER_TIMEOUT_S)

    def wait_for_models(self) -> tuple[str, ...]:
        """Their names, once all are loaded. Raises `DemoError` for one that could not be."""
        models = self.call("status")["models"]
        while any(model["state"] in ("waiting", "loading") for model in models):
            time.sleep(POLL_S)
            models = self.call("status")["models"]
        for model in models:
            if model["error"]:
                raise DemoError(f"{self.name} could not load {model['model']}: {model['error']}")
        return tuple(model["name"] for model in models)

    def log_tail(self) -> str:
        """The last lines that the node said."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines() if self.log.exists() else []
        return "\n".join(lines[-LOG_LINES:]) or "nothing"

    def ask_to_end(self) -> None:
        """Send SIGTERM, and do not wait."""
        self._process.terminate()

    def end(self) -> None:
        """End the node as SIGTERM does, or else by force."""
        self.ask_to_end()
        try:
            self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextmanager
def node_process(
    name: str, directory: Path, *, bases: Sequence[str] = (), variables: Mapping[str, str] | None = None
) -> Iterator[NodeProcess]:
    """A node called `name`, its home and its log under `directory`, until the exit; `variables` are settings of it."""
    home, log = directory / name, directory / f"{name}.log"
    options = [option for base in bases for option in ("--base", base)]
    command = [sys.executable, "-m", "arrowmoe", "--home", str(home), "node", "start", "--name", name, *options]
    with log.open("ab") as stream:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=_environment(os.environ, directory) | dict(variables or {}),
            start_new_session=True,  # a Ctrl-C is for the demo, which ends its nodes in order
        )
    node = NodeProcess(process, name=name, home=home, log=log)
    try:
        yield node
    finally:
        node.end()


def _environment(given: Mapping[str, str], directory: Path) -> dict[str, str]:
    """The demo runs on defaults, offline, whatever the user's own nodes are told; torch's caches go with the homes.

    Nodes of others on this network may offer cards too; the demo uses those of its own.
    """
    kept = {name: value for name, value in given.items() if not name.startswith("ARROWMOE_") or name in KEPT_VARIABLES}
    return kept | {
        "ARROWMOE_LOG__FORMAT": "human",
        "ARROWMOE_ROUTE_TO_OFFERS": "0",
        "HF_HUB_OFFLINE": "1",
        "TMPDIR": str(directory),
    }
