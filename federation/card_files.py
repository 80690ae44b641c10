"""Cards as they go out: out of the mapped files that this node wrote, never copied, never decoded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
from pyarrow import flight

from federation import limits, wire
from registry.digest import Digest
from registry.logs import get_logger
from registry.store import Registry

_log = get_logger(__name__)


def opened(registry: Registry, digest: Digest) -> pa.RecordBatchFileReader:
    """The card's own file, which this node wrote and checked. Its tensors' bytes are checked by whoever gets them."""
    with _file_errors():
        return pa.ipc.open_file(pa.memory_map(str(registry.path_of(digest))))


def batches(reader: pa.RecordBatchFileReader) -> Iterator[pa.RecordBatch]:
    """The file's batches, as views; validated, for Arrow would follow a rotten offset out of the file and abort."""
    for index in range(reader.num_record_batches):
        with _file_errors():
            batch = reader.get_batch(index)
            batch.validate(full=True)
        yield batch


def described(reader: pa.RecordBatchFileReader) -> list[bytes]:
    """The card's manifest, and its signature if it has one."""
    metadata = reader.schema.metadata or {}
    return [metadata[key] for key in (wire.MANIFEST_KEY, wire.SIGNATURE_KEY) if key in metadata]


def tensor_bytes(reader: pa.RecordBatchFileReader, offset: int, nbytes: int) -> Iterator[pa.Buffer]:
    """`nbytes` tensor bytes of the card from `offset` on, as views of the file; in a batch they follow one another."""
    for batch in batches(reader):
        data = batch.column("data").buffers()[2]
        size = 0 if data is None else data.size
        first, end = min(offset, size), min(offset + nbytes, size)
        for start in range(first, end, limits.TENSOR_CHUNK_BYTES):
            yield data.slice(start, min(limits.TENSOR_CHUNK_BYTES, end - start))
        offset, nbytes = max(0, offset - size), nbytes - (end - first)
        if not nbytes:
            return


def small(reader: pa.RecordBatchFileReader, nbytes: int) -> list[pa.Buffer]:
    """All tensor bytes of a card that has no more than `nbytes`; nothing of another."""
    if not nbytes or reader.num_record_batches != 1:
        return []
    data = [*tensor_bytes(reader, 0, nbytes + 1)]
    return data if sum(part.size for part in data) <= nbytes else []


@contextmanager
def _file_errors() -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        _log.error("card_file_damaged", error=one_line(error))
        raise flight.FlightServerError(
            "the card's file is damaged or gone on this node; its owner has to verify"
        ) from None


def one_line(error: Exception) -> str:
    """The first line of what went wrong, cut short."""
    return str(error).partition("\n")[0][:300]


__all__ = ["batches", "described", "one_line", "opened", "small", "tensor_bytes"]
