"""A card's file before its tensors are there: all that is known from the manifest, and where the rest belongs.

Which bytes stand around the tensors follows from the manifest and the signature alone, so Arrow's own writer is given
the card's batches over memory that nobody reads, and where it would write that, the file keeps a hole.
"""

from __future__ import annotations

import mmap
import os
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import IO

import pyarrow as pa

from registry.card import LoRACard
from registry.format import batch_of, batch_rows, card_schema


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where a card's tensor bytes lie in its file. Batch i holds those from `starts[i]` on, at `places[i]`."""

    starts: tuple[int, ...]
    places: tuple[int, ...]
    file_bytes: int

    def places_of(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """The parts of the tensor bytes [start, end), each as start, end, and place in the file."""
        index = bisect_right(self.starts, start) - 1
        while start < end:
            until = min(end, self.starts[index + 1]) if index + 1 < len(self.starts) else end
            yield start, until, self.places[index] + start - self.starts[index]
            start, index = until, index + 1


def write_blank(card: LoRACard, file: IO[bytes]) -> Layout:
    """Write the file of `card`, whose tensors need not be there, from the start of `file` on, with holes for them."""
    groups = [*batch_rows(card.manifest.tensors)]
    sizes = [sum(spec.nbytes for spec in group) for group in groups]
    blank = pa.py_buffer(_nothing(max(sizes, default=0)))
    sink = _Sink(file, blank)
    places = []
    with pa.ipc.new_file(pa.PythonFile(sink, mode="w"), card_schema(card)) as writer:
        for group, size in zip(groups, sizes, strict=True):
            writer.write_batch(batch_of(group, blank.slice(0, size)))
            places.append(sink.hole)
    file.flush()
    return Layout(starts=(0, *accumulate(sizes[:-1])), places=tuple(places), file_bytes=file.tell())


def _nothing(nbytes: int) -> mmap.mmap:
    """Memory that costs nothing, for no page of it is ever touched."""
    return mmap.mmap(-1, max(1, nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ)


class _Sink:
    """Writes to `file`, and skips what is `blank`; `hole` is where it last did."""

    closed = False

    def __init__(self, file: IO[bytes], blank: pa.Buffer) -> None:
        self._file, self._blank = file, blank
        self.hole = 0

    def tell(self) -> int:
        return self._file.tell()

    def write(self, data: bytes | pa.Buffer) -> int:
        if isinstance(data, pa.Buffer) and data.size and data.address == self._blank.address:
            self.hole = self._file.tell()
            self._file.seek(data.size, os.SEEK_CUR)
            return int(data.size)
        return self._file.write(data)

    def flush(self) -> None: ...

    def close(self) -> None: ...


__all__ = ["Layout", "write_blank"]
