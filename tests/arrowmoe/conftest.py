"""A clean environment, homes that need no migration, and a check that no test leaves a thread behind."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from registry.store import Registry
from tests.arrowmoe.nodes import save_tiny_models


@pytest.fixture
def no_leaked_threads() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + 5
    while (left := set(threading.enumerate()) - before) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No `ARROWMOE_*` variable of the machine's."""
    for name in list(os.environ):
        if name.startswith("ARROWMOE_"):
            monkeypatch.delenv(name)
    return monkeypatch


@pytest.fixture(scope="session")
def empty_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with its catalog migrated and no identity, to be copied: migrating one for each test takes longer."""
    home = tmp_path_factory.mktemp("empty") / "home"
    Registry.open(home).close()
    (home / "identity.key").unlink()
    return home


@pytest.fixture
def make_home(tmp_path: Path, empty_home: Path) -> Callable[[str], Path]:
    """Makes a home by name in this test's directory."""

    def make(name: str) -> Path:
        shutil.copytree(empty_home, tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture
def home(make_home: Callable[[str], Path]) -> Path:
    return make_home("home")


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Directories of a tiny causal model and a tiny encoder."""
    return save_tiny_models(tmp_path_factory.mktemp("models"))
