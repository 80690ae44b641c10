"""Drafts: cards that are on their way here, as files on disk that a crash does not undo and that nobody else sees.

A draft is the card's final file with the tensors' bytes still missing, followed by one byte for each `BLOCK_BYTES` of
them that says whether they have come. Space is taken before the first byte comes. A tensor is hashed as its bytes come;
one that turns out wrong is thrown away whole. What an earlier process left is hashed again, so nothing that is read
here is believed: the blocks say only what need not come again. A draft has the lock of its file while it is used.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Self

from blake3 import blake3

from registry.blank import Layout, write_blank
from registry.card import LoRACard, check_finite
from registry.digest import hex_of
from registry.errors import BusyDraftError, CardIntegrityError
from registry.files import DRAFT_SUFFIX, is_still_at, room_for
from registry.logs import get_logger
from registry.spans import Span, Spans
from registry.tensor import Tensor

BLOCK_BYTES = 1 << 20
"""What a crash can make come again for each stream."""

MAX_AGE_S = 14 * 24 * 3600
"""A draft that nobody wrote to for so long is swept."""

MAX_KEPT_BYTES = 16 << 30
"""What drafts that nobody uses may take of the disk; the oldest are swept first."""

_MODE = 0o644
_STRETCH_BYTES = 4 << 20

_log = get_logger(__name__)


class Drafts:
    """The drafts in a directory; those of several processes."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def open(self, card: LoRACard) -> Draft:
        """The draft of `card`, whose tensors need not be there, with what has come of it before.

        Raises `BusyDraftError` while another transfer has it, `NoSpaceError`, `CardLimitError`, and
        `CardIntegrityError` for a card that cannot be whole.
        """
        self._directory.mkdir(mode=0o700, exist_ok=True)
        path = self._directory / f"{hex_of(card.digest)}{DRAFT_SUFFIX}"
        with ExitStack() as undo:
            descriptor = _locked(path)
            undo.callback(os.close, descriptor)
            undo.callback(path.unlink, missing_ok=True)
            with room_for(f"the {card.nbytes} bytes of card {card.digest}", self._directory):
                layout, notes = _lay_out(card, descriptor)
            draft = Draft(path, descriptor, card, layout)
            undo.pop_all()
            undo.callback(draft.close)
            draft.restore(notes)
            undo.pop_all()
            return draft

    def sweep(self, now: datetime) -> None:
        """Remove drafts that nobody uses, and that are old or are more than `MAX_KEPT_BYTES` with all later ones.

        Those that have become cards go too: who made them so was killed before it removed them.
        """
        total_bytes = 0
        for path, status in sorted(self._found(), key=lambda found: -found[1].st_mtime):
            total_bytes += status.st_blocks * 512
            is_old = abs(now.timestamp() - status.st_mtime) > MAX_AGE_S  # a clock may have gone back by years
            if is_old or total_bytes > MAX_KEPT_BYTES or status.st_nlink > 1:
                _remove(path)

    def _found(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self._directory.glob(f"*{DRAFT_SUFFIX}"):
            with suppress(FileNotFoundError):
                yield path, path.stat()


class Draft:
    """A card on its way. Several threads may write to it, each byte once; made by `Drafts.open`."""

    def __init__(self, path: Path, descriptor: int, card: LoRACard, layout: Layout) -> None:
        self.path, self.card = path, card
        self._descriptor, self._layout = descriptor, layout
        self._mapped = memoryview(mmap.mmap(descriptor, layout.file_bytes, access=mmap.ACCESS_READ))
        self._ends = [*accumulate(spec.nbytes for spec in card.manifest.tensors)]
        self._lock = threading.Lock()
        self._arrived = Spans()
        self._checks: dict[int, _Check] = {}
        self._verified: set[int] = set()

    @property
    def is_whole(self) -> bool:
        """Whether every tensor is here and verified."""
        return len(self._verified) == len(self._ends)

    @property
    def tensors_verified(self) -> int:
        """How many tensors are whole and have the right digest."""
        return len(self._verified)

    def gaps(self) -> list[Span]:
        """The spans of the card's tensor bytes that have not come."""
        with self._lock:
            return self._arrived.gaps(0, self.card.nbytes)

    def write(self, offset: int, data: memoryview) -> list[Span]:
        """Put tensor bytes in their place. Returns the tensors that turned out wrong, which are gaps again.

        Raises `ValueError` for bytes that are here already or are no tensor's, and `CardIntegrityError` for a tensor
        that is as its publisher made it and holds NaN.
        """
        end = offset + len(data)
        with self._lock:
            if end > self.card.nbytes or self._arrived.overlaps(offset, end):
                raise ValueError(f"expected tensor bytes that are not here, got those from {offset} to {end}")
        for start, until, place in self._layout.places_of(offset, end):
            _write_all(self._descriptor, data[start - offset : until - offset], place)
        with self._lock:
            self._arrived.add(offset, end)
            self._note(offset, end)
        return [wrong for index in self._tensors_in(offset, end) if (wrong := self._advance(index)) is not None]

    def take_from(self, other: LoRACard) -> None:
        """Copy the tensors that `other` has too; bytes of them that are not what its manifest says stay gaps."""
        known = {spec.digest: tensor for spec, tensor in zip(other.manifest.tensors, other.tensors, strict=True)}
        for spec, end in zip(self.card.manifest.tensors, self._ends, strict=True):
            tensor, start = known.get(spec.digest), end - spec.nbytes
            if tensor is not None and tensor.nbytes == spec.nbytes:
                with self._lock:
                    gaps = self._arrived.gaps(start, end)
                for first, last in gaps:
                    self.write(first, tensor.data[first - start : last - start])

    def finish(self) -> LoRACard:
        """The card with its tensors mapped, whole and durable in the file at `path`. Raises `CardIntegrityError`."""
        if not self.is_whole:
            raise CardIntegrityError(f"expected {len(self._ends)} verified tensors, got {self.tensors_verified}")
        os.ftruncate(self._descriptor, self._layout.file_bytes)
        os.fchmod(self._descriptor, _MODE)
        os.fsync(self._descriptor)
        return replace(self.card, tensors=tuple(self._tensor(index) for index in range(len(self._ends))))

    def discard(self) -> None:
        """Remove the file; a card that has become another link of it stays."""
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of the draft; it is kept if anything has come."""
        if self._descriptor < 0:
            return
        if self.card.nbytes and self.gaps() == [(0, self.card.nbytes)]:
            self.discard()
        descriptor, self._descriptor = self._descriptor, -1
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # the mapping has a descriptor of its own, which would keep the lock
        os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def restore(self, notes: bytes) -> None:
        """Hash what has come before, as `notes` say. Raises `CardIntegrityError` as `write` does."""
        for block in (block for block, has_come in enumerate(notes) if has_come):
            self._arrived.add(*self._block(block))
        self._note(0, self.card.nbytes)
        try:
            for index in range(len(self._ends)):
                self._advance(index)
        except CardIntegrityError:
            self.discard()
            raise

    def _advance(self, index: int) -> Span | None:
        """Hash what has come of a tensor; its span if all of it has, and is wrong."""
        start, end = self._span(index)
        while True:
            with self._lock:
                if index in self._verified:
                    return None
                check = self._checks.get(index) or _Check(hashed=start)
                until = min(end, self._arrived.end_of(check.hashed))
                if check.busy or (until == check.hashed and start < end):
                    return None
                self._checks[index], check.busy = check, True
            place = self._place(check.hashed)
            check.hasher.update(self._mapped[place : place + until - check.hashed])
            if until == end:
                return self._judge(index, check)
            with self._lock:
                check.hashed, check.busy = until, False

    def _judge(self, index: int, check: _Check) -> Span | None:
        """Keep a tensor that has come in full, or throw it away."""
        spec, found = self.card.manifest.tensors[index], f"blake3:{check.hasher.hexdigest()}"
        if found == spec.digest:
            check_finite([self._tensor(index)])
            with self._lock:
                self._verified.add(index)
                del self._checks[index]
            return None
        start, end = self._span(index)
        _log.warning("tensor_thrown_away", card=self.card.digest, tensor=spec.name, role=spec.role, found=found)
        if start == end:
            raise CardIntegrityError(f"expected {spec.digest} of the empty tensor {spec.name!r}, so no card can be it")
        with self._lock:
            self._arrived.remove(start, end)
            self._note(start, end)
            del self._checks[index]
        return start, end

    def _note(self, start: int, end: int) -> None:
        """Write down which of the blocks that [start, end) touches are whole."""
        blocks = range(start // BLOCK_BYTES, -(-end // BLOCK_BYTES))
        notes = bytes(not self._arrived.gaps(*self._block(block)) for block in blocks)
        os.pwrite(self._descriptor, notes, self._layout.file_bytes + blocks.start)

    def _tensors_in(self, start: int, end: int) -> range:
        """The numbers of the tensors that [start, end) touches."""
        return range(bisect_right(self._ends, start), bisect_left(self._ends, end) + 1) if start < end else range(0)

    def _block(self, number: int) -> Span:
        return number * BLOCK_BYTES, min((number + 1) * BLOCK_BYTES, self.card.nbytes)

    def _span(self, index: int) -> Span:
        return self._ends[index] - self.card.manifest.tensors[index].nbytes, self._ends[index]

    def _place(self, offset: int) -> int:
        """Where in the file the tensor byte `offset` lies."""
        return next((place for _, _, place in self._layout.places_of(offset, offset + 1)), 0)

    def _tensor(self, index: int) -> Tensor:
        spec, place = self.card.manifest.tensors[index], self._place(self._span(index)[0])
        return Tensor.of(spec.name, spec.role, spec.dtype, spec.shape, self._mapped[place : place + spec.nbytes])


@dataclass(kw_only=True)
class _Check:
    """How far a tensor has been hashed, and whether a thread is at it."""

    hashed: int
    hasher: blake3 = field(default_factory=blake3)
    busy: bool = False


def _locked(path: Path) -> int:
    """A descriptor of the draft at `path`, made if there is none, that has its lock. Raises `BusyDraftError`."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_still_at(path, descriptor):
                if os.fstat(descriptor).st_nlink == 1:
                    return descriptor
                path.unlink()  # it has become a card, which nobody may write to any more
        except BlockingIOError:
            os.close(descriptor)
            raise BusyDraftError(
                f"another transfer is fetching the card of {path.name} just now", hint="wait until it has ended"
            ) from None
        os.close(descriptor)


def _lay_out(card: LoRACard, descriptor: int) -> tuple[Layout, bytes]:
    """Write all but the tensors and take the space for these; also what was noted of the blocks before."""
    found, blocks = os.fstat(descriptor).st_size, -(-card.nbytes // BLOCK_BYTES)
    with open(descriptor, "r+b", closefd=False) as file:
        layout = write_blank(card, file)
    notes = b""
    if found == layout.file_bytes:  # it had been finished
        notes = b"\1" * blocks
    elif found == layout.file_bytes + blocks:
        notes = os.pread(descriptor, blocks, layout.file_bytes)
    os.ftruncate(descriptor, layout.file_bytes)
    os.posix_fallocate(descriptor, 0, layout.file_bytes + blocks)
    return layout, notes


def _remove(path: Path) -> None:
    with suppress(BusyDraftError):
        descriptor = _locked(path)
        path.unlink()
        os.close(descriptor)
        _log.info("draft_swept", draft=path.name)


def _write_all(descriptor: int, data: memoryview, place: int) -> None:
    first, last = place // _STRETCH_BYTES, (place + len(data)) // _STRETCH_BYTES
    while data:
        count = os.pwrite(descriptor, data, place)
        data, place = data[count:], place + count
    if last > first:  # the kernel drops what is clean and begins to write what is not; `finish` has less to wait for
        whole = (last - first) * _STRETCH_BYTES
        os.posix_fadvise(descriptor, first * _STRETCH_BYTES, whole, os.POSIX_FADV_DONTNEED)


__all__ = ["BLOCK_BYTES", "MAX_AGE_S", "MAX_KEPT_BYTES", "Draft", "Drafts"]
