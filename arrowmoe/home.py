"""A home has one node at most, and says where it listens.

The node holds an exclusive lock on HOME/node.lock while it lives, so the kernel, not a file's presence, says whether
there is one: after `kill -9` the lock is gone and HOME/node.json is known to be stale. That file (mode 0600) tells
where the node listens and holds the random token of its control channel.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from registry.errors import ArrowMoEError, HomeError
from registry.logs import get_logger

LOCK_FILE = "node.lock"
RECORD_FILE = "node.json"
MAX_RECORD_BYTES = 64 << 10
LOCK_PATIENCE_S = 1.0

log = get_logger(__name__)


class NodeError(ArrowMoEError):
    """A node cannot be started, stopped or asked."""


class HomeHeldError(NodeError):
    """Another process is the node of this home."""


@dataclass(frozen=True, kw_only=True)
class NodeRecord:
    """What HOME/node.json says of the running node. `address` is the Flight server's, `port` this channel's."""

    pid: int
    port: int
    token: str
    address: str
    node_id: str
    name: str
    started: str

    def write(self, home: Path) -> None:
        """Write it whole or not at all, readable by its owner only."""
        draft = home / f".{RECORD_FILE}.{secrets.token_hex(8)}"
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(asdict(self), file)
        draft.replace(home / RECORD_FILE)


def read_record(home: Path) -> NodeRecord | None:
    """The record as it stands, stale or not; None if there is none, or it is not one."""
    try:
        with (home / RECORD_FILE).open("rb") as file:
            return NodeRecord(**json.loads(file.read(MAX_RECORD_BYTES)))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError) as error:
        log.warning("node_record_unreadable", home=str(home), error=str(error))
        return None


def is_held(home: Path) -> bool:
    """Whether a process holds the home's lock."""
    try:
        file = (home / LOCK_FILE).open("rb")
    except (FileNotFoundError, NotADirectoryError):
        return False
    with file:
        return not _flock(file, fcntl.LOCK_SH)


def running_node(home: Path) -> NodeRecord | None:
    """The record of the node that runs on `home`; None if none does, whatever a killed one left behind."""
    return read_record(home) if is_held(home) else None


@contextmanager
def home_lock(home: Path) -> Iterator[None]:
    """Be the one node of `home`. Raises `HomeHeldError` saying who is."""
    descriptor = os.open(home / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "r+b") as file:
        deadline = time.monotonic() + LOCK_PATIENCE_S  # a command that only looks holds it for an instant
        while not _flock(file, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                raise _held(home, file.read(MAX_RECORD_BYTES))
            time.sleep(0.02)
        (home / RECORD_FILE).unlink(missing_ok=True)  # a killed node's
        file.truncate()
        file.write(json.dumps({"pid": os.getpid(), "since": now()}).encode())
        file.flush()
        try:
            yield
        finally:
            (home / RECORD_FILE).unlink(missing_ok=True)


def make_home(home: Path) -> None:
    """Make the home directory, for its owner only. Raises `HomeError`."""
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise HomeError(f"home {home} cannot be made: {error}", hint="choose another one with --home DIR") from error


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _flock(file: IO[bytes], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _held(home: Path, written: bytes) -> HomeHeldError:
    try:
        holder = json.loads(written)
        who = f"process {holder['pid']} since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        who = "another process"
    record = read_record(home)
    where = f", serving at {record.address}" if record is not None else ""
    return HomeHeldError(
        f"home {home} is held by {who}{where}, so a second node cannot start on it",
        hint="stop it with `arrowmoe node stop`, or use another home with --home DIR",
    )


__all__ = [
    "HomeHeldError",
    "NodeError",
    "NodeRecord",
    "home_lock",
    "is_held",
    "make_home",
    "now",
    "read_record",
    "running_node",
]
