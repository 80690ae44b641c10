"""What tests of several floors share: homes that need no migration, and a check that no test leaves a thread behind."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from sqlalchemy import make_url

from registry.database import Database
from registry.store import Registry
from tests.registry.databases import KINDS, new_database

# Triton makes its functions for its interpreter or for a device when it is first imported, by whomever.
os.environ.setdefault("TRITON_INTERPRET", "1")

# A loaded machine is no defect.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


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


@pytest.fixture(params=KINDS)
def new_catalog_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database without tables, on each that a catalog can be in."""
    with new_database(request.param, tmp_path) as url:
        yield url


@pytest.fixture(scope="session")
def migrated_template(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The name of a database on PostgreSQL with its tables, to be copied as `empty_home` is."""
    with new_database("postgresql", tmp_path_factory.mktemp("template")) as url:
        Database(url).close()
        yield str(make_url(url).database)


@pytest.fixture(params=KINDS)
def catalog_url(request: pytest.FixtureRequest, tmp_path: Path, empty_home: Path) -> Iterator[str]:
    """A database with its tables and no rows, on each that a catalog can be in."""
    postgresql = request.param == "postgresql"
    template = request.getfixturevalue("migrated_template") if postgresql else ""
    with new_database(request.param, tmp_path, template) as url:
        if not postgresql:
            shutil.copy(empty_home / "catalog.sqlite", tmp_path)
        yield url


@pytest.fixture
def database(catalog_url: str) -> Iterator[Database]:
    """A database with its tables, on each that a catalog can be in."""
    database = Database(catalog_url)
    yield database
    database.close()
