"""Registries, servers in other processes, and a check that no test leaves a thread behind."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from federation.credentials import Credentials
from federation.server import LoRAFlightServer
from registry.identity import Identity
from registry.store import Registry
from tests.federation.liar import Liar
from tests.registry.cards import small_card


@pytest.fixture(autouse=True)
def _no_leaked_threads(no_leaked_threads: None) -> None:
    """Every test here starts servers or clients."""


@pytest.fixture
def make_registry(tmp_path: Path, empty_home: Path) -> Iterator[Callable[[str], Registry]]:
    """Opens a registry by name in this test's directory."""
    with ExitStack() as stack:

        def make(name: str) -> Registry:
            shutil.copytree(empty_home, tmp_path / name)
            return stack.enter_context(Registry.open(tmp_path / name))

        yield make


@pytest.fixture
def ours(make_registry: Callable[[str], Registry]) -> Registry:
    return make_registry("ours")


@pytest.fixture
def theirs(make_registry: Callable[[str], Registry]) -> Registry:
    return make_registry("theirs")


@pytest.fixture
def guest() -> Credentials:
    """A node that asks."""
    return Credentials.of(Identity.generate())


@pytest.fixture
def server(theirs: Registry) -> Iterator[LoRAFlightServer]:
    """Serves `theirs` from this process."""
    with LoRAFlightServer(theirs, node_id=theirs.identity.id, name="theirs") as running:
        yield running


@pytest.fixture
def liar() -> Iterator[Liar]:
    running = Liar(small_card("honest", modules=3))
    yield running
    running.shutdown()


@dataclass(frozen=True, kw_only=True)
class OtherProcess:
    """A server in another process."""

    port: int
    node_id: str


@contextmanager
def serving(home: Path, *options: str) -> Iterator[OtherProcess]:
    """A process that serves the registry at `home`."""
    command = [sys.executable, "-m", "tests.federation.serve", str(home), *options]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        yield OtherProcess(port=said["port"], node_id=said["id"])
        process.stdin.close()
        assert process.wait(10) == 0
