"""What tests of several floors share: homes that need no migration, and a check that no test leaves a thread behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from registry.store import Registry


@pytest.fixture
def no_leaked_threads() -> Iterator[None]:
    before = _threads()
    yield
    deadline = time.monotonic() + 5
    while (left := _threads() - before) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left


def _threads() -> set[threading.Thread]:
    """Python's own threads; a thread of gRPC's that once logged stays listed as a dummy."""
    return {thread for thread in threading.enumerate() if not isinstance(thread, threading._DummyThread)}


@pytest.fixture(scope="session")
def empty_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with its catalog migrated and no identity, to be copied: migrating one for each test takes longer."""
    home = tmp_path_factory.mktemp("empty") / "home"
    Registry.open(home).close()
    (home / "identity.key").unlink()
    return home
