"""Work on cards that is under way, or was when its process died.

A file per folder of the blob store: locked while a process works there, and listing the digests it works on. The
kernel drops the lock with its process, so a file that nobody has locked tells what was interrupted. Opening a
registry is then cheap: nearly always there is no such file.
"""

from __future__ import annotations

import fcntl
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from registry.digest import Digest, hex_of, is_digest
from registry.files import is_still_at

_SUFFIX = ".pending"


class Pending:
    """Locks and notes in a directory of their own; for the processes and threads of one machine."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @contextmanager
    def working_on(self, *digests: Digest) -> Iterator[None]:
        """Keep others off the digests' folders; if the block does not end well, `interrupted` will name the digests."""
        folders: dict[Path, list[Digest]] = {}
        for digest in digests:
            folders.setdefault(self._path_of(digest), []).append(digest)
        with ExitStack() as stack:
            for path in sorted(folders):  # all who want several take them in one order, so nobody waits for ever
                stack.enter_context(self._noted(path, folders[path]))
            yield

    @contextmanager
    def _noted(self, path: Path, digests: Iterable[Digest]) -> Iterator[None]:
        with self._locked(path) as file:
            assert file is not None
            before = file.read()
            file.writelines(f"{digest}\n" for digest in digests)
            file.flush()
            yield
            if before:
                file.truncate(len(before))
            else:
                Path(file.name).unlink()

    @contextmanager
    def looking_at(self, digest: Digest) -> Iterator[None]:
        """Keep others off the digest's folder, without a note of it."""
        with self._locked(self._path_of(digest)) as file:
            assert file is not None
            before = file.read()
            yield
            if not before:
                Path(file.name).unlink()

    def interrupted(self) -> Generator[Digest]:
        """The digests of work that its process did not finish; each is done with once the next one is asked for."""
        for path in sorted(self._directory.glob(f"*{_SUFFIX}")):
            with self._locked(path, wait=False) as file:
                if file is None:
                    continue
                for line in file.read().splitlines():
                    if is_digest(line):
                        yield Digest(line)
                path.unlink()

    def _path_of(self, digest: Digest) -> Path:
        return self._directory / f"{hex_of(digest)[:2]}{_SUFFIX}"

    @contextmanager
    def _locked(self, path: Path, *, wait: bool = True) -> Iterator[IO[str] | None]:
        """The file, locked and read from its start; None if `wait` is not wanted and another has it."""
        while True:
            with path.open("a+", encoding="ascii") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    yield None
                    return
                if is_still_at(path, file.fileno()):
                    file.seek(0)
                    yield file
                    return
