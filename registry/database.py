"""The catalog's database: connections, locks and schema. The only module that knows which database it talks to.

Rules: a transaction says at its start whether it writes, and all writers of a catalog, in whatever process, run one
after another (`BEGIN IMMEDIATE` on SQLite, an advisory lock on PostgreSQL); readers never wait for them. What these
modules do not know: what the tables mean (`registry.catalog`).
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import URL, Connection, Engine, MetaData, Table, create_engine, event, inspect, make_url, select
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session

from registry.errors import HomeError, RegistryError
from registry.logs import get_logger
from registry.tables import HEAD_REVISION
from registry.urls import shown

if TYPE_CHECKING:
    from alembic.config import Config

_BUSY_TIMEOUT_S = 30
_WRITER_LOCK = 0x6172726F776D6F65
"""Key of PostgreSQL's advisory lock; "arrowmoe" in ASCII."""

_READS: dict[str, dict[str, Any]] = {
    "sqlite": {},
    "postgresql": {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True},
}
_POSTGRESQL_SESSION = (
    "timezone = 'UTC'",  # the first and the last day of the calendar exist in no other zone
    f"lock_timeout = '{_BUSY_TIMEOUT_S}s'",
    "tcp_keepalives_idle = 30",  # a machine that vanished must not hold the writers' lock for hours
    "tcp_keepalives_interval = 10",
    "tcp_keepalives_count = 3",
)

_log = get_logger(__name__)


class Database:
    """A database at a URL, with its schema up to date. Safe to share among threads; one per process."""

    def __init__(self, url: URL | str) -> None:
        self.url = _url(url)
        self._engine = _engine(self.url)
        self._writer = self._engine.execution_options(arrowmoe_writes=True)
        self._reader = self._engine.execution_options(**_READS[self._engine.dialect.name])
        try:
            self._migrate()
        except BaseException:
            self._engine.dispose()
            raise

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A transaction that only reads; it sees one snapshot throughout. Raises `RegistryError`."""
        with self._errors(), Session(self._reader) as session, session.begin():
            yield session

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """A transaction that writes; all writers run one after another. Raises `RegistryError`."""
        with self._errors(), Session(self._writer) as session, session.begin():
            yield session

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def _migrate(self) -> None:
        """Bring the schema to `HEAD_REVISION`; cheap when it is there. Of several processes one does the work."""
        with self._errors():
            with self._engine.connect() as connection:
                if _revision(connection) == HEAD_REVISION:
                    return
            with _first_use(self.url), self._writer.connect() as connection:
                _make_concurrent(connection)
                with connection.begin():
                    found = _revision(connection)
                    if found != HEAD_REVISION:
                        _upgrade(connection, found)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (DBAPIError, PoolTimeoutError) as error:
            reason = error.orig if isinstance(error, DBAPIError) else error
            raise RegistryError(
                f"the catalog {_name_of(self.url)} failed: {reason}",
                hint="check that its disk is writable and not full, and that no other program holds it",
            ) from error


def sqlite_url(path: Path) -> URL:
    """The URL of an SQLite file, whatever characters its path holds."""
    return URL.create("sqlite", database=str(path))


def alembic_config() -> Config:
    """Alembic's settings for `registry/migrations`; for developers, who make a new revision with it."""
    from alembic.config import Config  # a quarter of a second, for a schema that is nearly always up to date

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")).replace("%", "%%"))
    return config


def _url(url: URL | str) -> URL:
    try:
        return make_url(url)
    except ArgumentError as error:
        raise HomeError(
            f"expected a catalog URL, got {shown(str(url))[:80]!r}",
            hint="for example postgresql+psycopg://user@host/name",
        ) from error


def _name_of(url: URL) -> str:
    return shown(url.render_as_string())


def _engine(url: URL) -> Engine:
    try:
        engine = create_engine(url, **_arguments(url))
    except (ArgumentError, ModuleNotFoundError) as error:
        raise HomeError(
            f"cannot use the catalog {_name_of(url)}: {error}",
            hint="install the driver that the URL names: pip install 'arrowmoe[postgresql]' brings psycopg",
        ) from error
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _configure_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    else:
        event.listen(engine, "connect", _configure_postgresql)
        event.listen(engine, "begin", _begin_postgresql)
        event.listen(engine, "before_cursor_execute", _without_nul, retval=True)
    return engine


def _arguments(url: URL) -> dict[str, Any]:
    match url.get_backend_name():
        case "sqlite":
            return {"connect_args": {"timeout": _BUSY_TIMEOUT_S}}
        case "postgresql":
            return {"pool_pre_ping": True, "isolation_level": "READ COMMITTED"}
        case other:
            raise HomeError(f"expected a catalog on sqlite or postgresql, got {other!r}", hint="use one of the two")


def _configure_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # else sqlite3 begins transactions by itself, and never immediate ones
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA synchronous = FULL")  # a published card survives a power cut


def _begin_sqlite(connection: Connection) -> None:
    # A reader that turns writer in the middle fails at once if another wrote meanwhile; no timeout helps there.
    writes = connection.get_execution_options().get("arrowmoe_writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _configure_postgresql(connection: Any, _record: object) -> None:
    connection.autocommit = True  # what is set in a transaction that is rolled back is lost
    with connection.cursor() as cursor:
        for setting in _POSTGRESQL_SESSION:
            cursor.execute(f"SET {setting}")
    connection.autocommit = False


def _without_nul(
    _connection: object, _cursor: object, statement: str, parameters: Any, _context: object, executemany: bool
) -> tuple[str, Any]:
    """PostgreSQL's text cannot hold U+0000, which a prompt or a peer's description may: U+FFFD stands for it."""
    return statement, [*map(_cleaned, parameters)] if executemany else _cleaned(parameters)


def _cleaned(parameters: Any) -> Any:
    if isinstance(parameters, dict):
        return {name: _clean(value) for name, value in parameters.items()}
    return tuple(map(_clean, parameters))


def _clean(value: Any) -> Any:
    return value.replace("\0", "\ufffd") if isinstance(value, str) else value


def _begin_postgresql(connection: Connection) -> None:
    if connection.get_execution_options().get("arrowmoe_writes"):
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_WRITER_LOCK})")


def _first_use(url: URL) -> Any:
    """A lock around setting up an SQLite file: switching to WAL fails at once, timeout or not, if two do it."""
    in_a_file = url.get_backend_name() == "sqlite" and url.database not in (None, "", ":memory:")
    return _locked(Path(f"{url.database}.lock")) if in_a_file else nullcontext()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed, or its process dies
        yield


def _make_concurrent(connection: Connection) -> None:
    """Switch an SQLite file to WAL, for good: its readers and its writer no longer wait for one another."""
    if connection.dialect.name == "sqlite":
        driver = connection.connection.driver_connection
        assert driver is not None
        driver.execute("PRAGMA journal_mode = WAL")


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    table = Table("alembic_version", MetaData(), autoload_with=connection)
    return connection.execute(select(table.c.version_num)).scalar()


def _upgrade(connection: Connection, found: str | None) -> None:
    from alembic import command
    from alembic.script import ScriptDirectory

    config = alembic_config()
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if found is not None and found not in known:
        raise HomeError(
            f"expected a catalog of revision {HEAD_REVISION} or before, got {found!r}, so a newer arrowmoe made it",
            hint="upgrade arrowmoe, or use another home",
        )
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
    _log.info("catalog_migrated", before=found, after=HEAD_REVISION)
