"""A home directory: made if there is none, and what the file system says of one that cannot be used."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from registry.errors import HomeError


def make_home(home: Path, folders: Iterable[str]) -> None:
    """The directory (mode 0700) and its `folders`; those that are there stay as they are. Raises `OSError`."""
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name in folders:
        (home / name).mkdir(mode=0o700, exist_ok=True)
    if not os.access(home, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(home))


@contextmanager
def home_errors(home: Path) -> Iterator[None]:
    """What the file system says while a home is opened, as `HomeError`."""
    try:
        yield
    except (FileExistsError, NotADirectoryError) as error:
        raise HomeError(
            f"expected a directory as home, got the file {error.filename}", hint="use another --home"
        ) from error
    except OSError as error:
        raise HomeError(
            f"cannot use the home {home}: {error.strerror or error}",
            hint="use a directory that you may write, with --home DIR or ARROWMOE_HOME",
        ) from error


__all__ = ["home_errors", "make_home"]
