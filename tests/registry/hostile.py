"""Files that only somebody with bad intent, or a bad disk, would write."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from registry.card import LoRACard
from registry.digest import digest_of
from registry.errors import CardError
from registry.flatbuf import Table
from registry.format import SCHEMA, LoRAFormat, card_batches, card_schema
from registry.manifest import Manifest, manifest_bytes
from registry.tensor import Tensor

BLOCK = struct.Struct("<qi4xq")


def write(
    path: Path,
    card: LoRACard,
    *,
    schema: pa.Schema | None = None,
    metadata: Mapping[bytes, bytes] | None = None,
    batches: Iterable[pa.RecordBatch] | None = None,
    compression: str | None = None,
) -> Path:
    """An Arrow file as `card` would be, but for what is given; nothing is checked."""
    described = (schema or SCHEMA).with_metadata(card_schema(card).metadata | dict(metadata or {}))
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_file(str(path), described, options=options) as writer:
        for batch in card_batches(card) if batches is None else batches:
            writer.write_batch(pa.RecordBatch.from_arrays(batch.columns, schema=described))
    return path


def edited(card: LoRACard, edit: Callable[[dict[str, Any]], object]) -> dict[bytes, bytes]:
    """Schema metadata whose manifest went through `edit`, with nobody's signature."""
    fields = json.loads(card.manifest_bytes)
    edit(fields)
    return {b"arrowmoe.manifest": manifest_bytes(fields)}


def with_first_tensor(card: LoRACard, data: bytes, *, digest: bool) -> LoRACard:
    """`card` with other bytes in its first tensor, announced by a fitting digest or not."""
    tensors = (replace(card.tensors[0], data=memoryview(data)), *card.tensors[1:])
    if not digest:
        return replace(card, tensors=tensors)
    fields = json.loads(card.manifest_bytes)
    fields["tensors"][0]["digest"] = digest_of(data)
    manifest = manifest_bytes(fields)
    return replace(card, tensors=tensors, manifest_bytes=manifest, manifest=Manifest.parse(manifest))


def footer_of(data: bytes) -> tuple[int, int]:
    """Where the footer begins and ends."""
    end = len(data) - 10
    return end - struct.unpack_from("<i", data, end)[0], end


def blocks_of(data: bytes) -> list[tuple[int, int, int]]:
    """Offset, header bytes and body bytes of each batch, as the footer lists them."""
    start, end = footer_of(data)
    return list(BLOCK.iter_unpack(Table.root(memoryview(data)[start:end]).vector(3, BLOCK.size)[1]))


def replaced_once(data: bytes, old: bytes, new: bytes) -> bytes:
    """`data` with the only `old` in it replaced."""
    assert data.count(old) == 1
    assert len(old) == len(new)
    return data.replace(old, new)


def offsets_of(tensors: Iterable[Tensor]) -> list[int]:
    """The offsets of the data column of a card with one batch."""
    ends = [0]
    for tensor in tensors:
        ends.append(ends[-1] + tensor.nbytes)
    return ends


def refused(path: Path, kind: type[CardError], match: str) -> None:
    """Refused in the same way however the file is read, and although nobody asked for verification."""
    for memory_map in (True, False):
        with pytest.raises(kind, match=match):
            LoRAFormat.load(path, memory_map=memory_map, verify=False)
