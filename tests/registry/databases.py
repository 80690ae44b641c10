"""The databases that a catalog can be in, for contracts that run on all of them.

`scripts/with_postgresql.sh` starts a PostgreSQL and names it in ARROWMOE_TEST_CATALOG_URL; the tests make databases of
their own on that server and drop them, so what else is there stays as it is.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import URL, Engine, create_engine, make_url, text

from registry.database import sqlite_url

KINDS = ("sqlite", "postgresql")
VARIABLE = "ARROWMOE_TEST_CATALOG_URL"


@contextmanager
def new_database(kind: str, directory: Path, template: str = "template0") -> Iterator[str]:
    """The URL of a new database, on PostgreSQL a copy of `template`; skips the test where there is no server."""
    if kind == "sqlite":
        yield _text(sqlite_url(directory / "catalog.sqlite"))
        return
    if not os.environ.get(VARIABLE):
        pytest.skip(f"{VARIABLE} names no server: run the tests under scripts/with_postgresql.sh")
    server = make_url(os.environ[VARIABLE])
    name = f"arrowmoe_test_{secrets.token_hex(8)}"
    engine = create_engine(server, isolation_level="AUTOCOMMIT")
    try:
        _run(engine, f"CREATE DATABASE {name} TEMPLATE {template}")
        try:
            yield _text(server.set(database=name))
        finally:
            _run(engine, f"DROP DATABASE {name} WITH (FORCE)")
    finally:
        engine.dispose()


def cut_off_others(url: str) -> None:
    """End all other connections to a database on PostgreSQL, as its server does when it is killed."""
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    try:
        _run(
            engine,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()",
        )
    finally:
        engine.dispose()


def _run(engine: Engine, command: str) -> None:
    with engine.connect() as connection:
        connection.execute(text(command))


def _text(url: URL) -> str:
    return url.render_as_string(hide_password=False)
