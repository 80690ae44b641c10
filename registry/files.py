"""Whole files or none: atomic writes, and opening a file that somebody else may have put there."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from registry.errors import NoSpaceError

DRAFT_SUFFIX = ".draft"
"""Ends the names of files that are being written; one that is left over belonged to a killed writer."""

_PUBLIC_MODE = 0o644


@contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that appears at `path` when the block ends without an error, and not before.

    It is written beside `path`, flushed to disk, and renamed, which replaces what was there; a reader that has the old
    one mapped keeps it. Mode 0644 whatever the umask. Raises `OSError`.
    """
    draft = path.parent / f".{secrets.token_hex(8)}{DRAFT_SUFFIX}"
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fchmod(file.fileno(), _PUBLIC_MODE)
            os.fsync(file.fileno())
        os.replace(draft, path)  # noqa: PTH105
    except BaseException:
        with suppress(FileNotFoundError):
            draft.unlink()
        raise
    _flush_directory(path.parent)


@contextmanager
def opened_regular(path: Path) -> Iterator[int]:
    """A descriptor of the regular file at `path`; a symbolic link, a directory or a pipe raises `OSError`."""
    # O_NONBLOCK: opening a pipe that nobody writes would wait for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is not a regular file")
        yield descriptor
    finally:
        os.close(descriptor)


def link_whole(file: Path, path: Path) -> None:
    """Let the whole and flushed `file` appear at `path` too, durably; what was there is replaced. Raises `OSError`."""
    draft = path.parent / f".{secrets.token_hex(8)}{DRAFT_SUFFIX}"
    draft.hardlink_to(file)
    try:
        os.replace(draft, path)  # noqa: PTH105
    finally:
        draft.unlink(missing_ok=True)  # a rename of one link of a file to another does nothing
    _flush_directory(path.parent)


def is_still_at(path: Path, descriptor: int) -> bool:
    """Whether the file that is open as `descriptor` is the one at `path`, which may have been unlinked meanwhile."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def room_for(what: str, directory: Path) -> Iterator[None]:
    """What a full disk under `directory` says in the block, as `NoSpaceError`."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        free = shutil.disk_usage(directory).free
        raise NoSpaceError(
            f"expected room for {what} in {directory}, got {free} bytes free",
            hint="make room on that disk, or use another --home",
        ) from error


def _flush_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
