"""Several real processes in one home, and processes killed in the middle of their work."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from sqlalchemy import text

from registry.database import Database, sqlite_url
from registry.store import Registry
from registry.tables import HEAD_REVISION
from tests.registry.databases import KINDS, new_database
from tests.registry.worker import CATALOG_VARIABLE

_DEADLINE_S = 60


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture(params=KINDS)
def catalog_url(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str | None]:
    """Where the home's catalog is; None: in the home. The workers are told."""
    if request.param == "sqlite":
        yield None
        return
    with new_database(request.param, tmp_path) as url:
        monkeypatch.setenv(CATALOG_VARIABLE, url)
        yield url


@pytest.fixture
def started() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def start(stack: ExitStack, role: str, home: Path, *numbers: int) -> subprocess.Popen[str]:
    """A worker that does not outlive the test."""
    command = [sys.executable, "-m", "tests.registry.worker", role, str(home), *map(str, numbers)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    stack.enter_context(process)
    stack.callback(process.kill)
    return process


def lines_of(process: subprocess.Popen[str]) -> list[str]:
    out, errors = process.communicate(timeout=_DEADLINE_S)
    assert process.returncode == 0, errors
    return out.split()


def test_four_writers_and_a_reader_share_a_fresh_home(home: Path, catalog_url: str | None, started: ExitStack) -> None:
    writers = [start(started, "publish", home, 100 * index, 25) for index in range(4)]
    reader = start(started, "read", home, 100)
    published = [digest for writer in writers for digest in lines_of(writer)]
    assert lines_of(reader) == ["100"]
    with Registry.open(home, catalog_url=catalog_url) as registry:
        assert registry.digests() == set(published)
        assert len(published) == 100
        assert {entry.publisher for entry in registry.list()} == {registry.identity.id}
        assert all(report.ok for report in registry.verify())
    assert list((home / "tmp").iterdir()) == []


def test_processes_that_open_a_fresh_home_at_once_agree(home: Path, started: ExitStack) -> None:
    processes = [start(started, "identify", home) for _ in range(4)]
    identities = {line for process in processes for line in lines_of(process)}
    assert len(identities) == 1
    database = Database(sqlite_url(home / "catalog.sqlite"))
    with database.reading() as session:
        assert session.scalars(text("SELECT version_num FROM alembic_version")).all() == [HEAD_REVISION]
        assert session.scalar(text("PRAGMA journal_mode")) == "wal"
    database.close()


def test_publishing_and_removing_one_card_at_once_keeps_row_and_file_together(
    home: Path, catalog_url: str | None, started: ExitStack
) -> None:
    with Registry.open(home, catalog_url=catalog_url) as registry:
        fighters = [start(started, "fight", home, 25) for _ in range(3)]
        digests = {digest for fighter in fighters for digest in lines_of(fighter)}
        assert registry.digests() == set()
        assert registry.verify() == []
        assert not list((home / "cards").rglob("*.arrow"))
        assert {change.digest for change in registry.changes().tombstones} == digests


def test_a_kill_at_any_moment_loses_no_published_card(home: Path, catalog_url: str | None, started: ExitStack) -> None:
    rng = random.Random(20261121)
    kept: set[str] = set()
    removed: set[str] = set()
    undecided: set[str] = set()
    with Registry.open(home, catalog_url=catalog_url) as registry:
        for attempt in range(15):
            said = _killed_while_publishing(started, home, 1000 * attempt, rng.randrange(1, 10), rng.uniform(0.0, 0.03))
            kept |= {line[1:] for line in said if line[0] == "+"}
            removed |= {line[1:] for line in said if line[0] == "-"}
            undecided |= {line[1:] for line in said if line[0] == "?"}
            bad = [report for report in registry.verify() if not report.ok]
            assert bad == []  # nothing half-written shows, and what was interrupted is undone
        assert len(kept) > 30
        found = registry.digests()
        assert kept - undecided <= found
        assert not removed & found
        assert len(found - kept) <= 15  # committed, but killed before it could say so
    assert list(home.rglob("*.draft")) == []
    assert list(home.rglob("*.pending")) == []


def _killed_while_publishing(stack: ExitStack, home: Path, first: int, lines: int, after_s: float) -> list[str]:
    """The whole lines of a worker that was killed `after_s` after so many of them: a slow machine gets as far."""
    process = start(stack, "churn", home, first)
    assert process.stdout is not None
    said = [process.stdout.readline() for _ in range(lines)]
    time.sleep(after_s)
    process.kill()
    said += process.stdout.readlines()
    process.wait()
    return [line.strip() for line in said if line.endswith("\n")]
