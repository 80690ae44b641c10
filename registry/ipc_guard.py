"""Looks through the bytes of a `.lora.arrow` file before Arrow may: what passes is small, plain, and without holes.

Arrow's reader is made for trusted files. It follows offsets into an abort, inflates a compressed batch to any size,
builds extension types, and takes the schema from the footer while a stream reader takes the one at the front. So:

- the file is magic, schema message, batch messages, end-of-stream mark, footer, its length, magic; no byte besides;
- both schemas are the card's, field by field, with the same metadata of at most `max_metadata_bytes`;
- the footer lists exactly the batches that lie there, in order; no dictionaries;
- every batch is uncompressed, and its buffers lie inside of its body in order, without overlap.

Ignores what the values are: that is `registry.format`'s part, after Arrow has validated them.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from registry.errors import CardFormatError, CardLimitError
from registry.flatbuf import Table, read

MAGIC = b"ARROW1"
METADATA_KEYS = frozenset({b"arrowmoe.format", b"arrowmoe.manifest", b"arrowmoe.signature"})
MIN_FILE_BYTES = 64
HEAD_BYTES, TAIL_BYTES = 8, 10

_HEAD = MAGIC + b"\0\0"
_CONTINUATION = b"\xff\xff\xff\xff"
_END_OF_STREAM = _CONTINUATION + b"\0\0\0\0"
_MAX_PADDING_BYTES = 64
_MAX_BATCH_HEADER_BYTES = 4096
_SCHEMA_OVERHEAD_BYTES = 4096
_BUFFERS_PER_BATCH = 16
_VALIDITY_BUFFERS = (0, 3, 6, 9, 11, 13)

_BOOL, _U8 = struct.Struct("<?"), struct.Struct("<B")
_I16, _I32, _I64 = struct.Struct("<h"), struct.Struct("<i"), struct.Struct("<q")
_BLOCK = struct.Struct("<qi4xq")
_PAIR = struct.Struct("<qq")

_METADATA_V5 = 4
_SCHEMA_MESSAGE, _BATCH_MESSAGE = 1, 3
_INT, _UTF8, _LIST, _LARGE_BINARY = 2, 5, 12, 19
_FIELDS = ((b"name", _UTF8), (b"role", _UTF8), (b"dtype", _UTF8), (b"shape", _LIST), (b"data", _LARGE_BINARY))


@dataclass(frozen=True, kw_only=True)
class CardLimits:
    """How large a card may be; what is larger is refused before it is parsed."""

    max_file_bytes: int = 8 << 30
    max_metadata_bytes: int = 1 << 20
    max_footer_bytes: int = 4 << 20
    max_tensors: int = 65_536


def check_ends(head: bytes, tail: bytes, limits: CardLimits) -> int:
    """Check a file's first `HEAD_BYTES` and last `TAIL_BYTES`, which refuses most other files unread.

    Returns the footer's size in bytes.
    """
    if head != _HEAD or not tail.endswith(MAGIC):
        raise CardFormatError(
            "expected an Arrow IPC file, which begins and ends with ARROW1, so this is no card or not a whole one"
        )
    size = read(_I32, memoryview(tail), 0)
    if size > limits.max_footer_bytes:
        raise CardLimitError(f"expected a footer of at most {limits.max_footer_bytes} bytes, got {size}")
    return size


def check(data: memoryview, limits: CardLimits) -> int:
    """Check a whole file's structure and return its number of batches.

    Raises `CardFormatError`, or `CardLimitError` where a stated limit is passed.
    """
    if not MIN_FILE_BYTES <= len(data) <= limits.max_file_bytes:
        raise CardLimitError(f"expected a file of {MIN_FILE_BYTES} to {limits.max_file_bytes} bytes, got {len(data)}")
    footer_bytes = check_ends(bytes(data[:HEAD_BYTES]), bytes(data[-TAIL_BYTES:]), limits)
    footer, footer_start = _footer(data, footer_bytes)
    metadata = _schema_metadata(footer.table(1), limits)
    position = _schema_message(data, HEAD_BYTES, metadata, limits)
    blocks = _blocks(footer, limits)
    for start, header_bytes, body_bytes in blocks:
        if start != position:
            raise CardFormatError(f"expected a batch at byte {position}, got one at {start}: a hole or an overlap")
        _batch_message(data[: footer_start - len(_END_OF_STREAM)], start, header_bytes, body_bytes)
        position = start + header_bytes + body_bytes
    if bytes(data[position:footer_start]) != _END_OF_STREAM:
        raise CardFormatError(
            f"expected the end of the stream at byte {position} and the footer behind it, got bytes that no batch holds"
        )
    return len(blocks)


def _footer(data: memoryview, size: int) -> tuple[Table, int]:
    end = len(data) - TAIL_BYTES
    start = end - size
    if size < 0 or start < HEAD_BYTES:
        raise CardFormatError(f"expected the footer inside of the file, got a length of {size} bytes")
    footer = Table.root(data[start:end])
    if footer.vector(2, _BLOCK.size)[0]:
        raise CardFormatError("expected no dictionaries in a card")
    _check_plain(footer, custom_metadata=4)
    return footer, start


def _blocks(footer: Table, limits: CardLimits) -> list[tuple[int, int, int]]:
    count, blocks = footer.vector(3, _BLOCK.size)
    if count > limits.max_tensors:
        raise CardLimitError(f"expected at most {limits.max_tensors} batches, got {count}")
    return list(_BLOCK.iter_unpack(blocks))


def _schema_message(data: memoryview, start: int, metadata: dict[bytes, bytes], limits: CardLimits) -> int:
    """Check the schema message at `start` against the footer's `metadata`; returns where it ends."""
    header_bytes = 8 + read(_I32, data, start + 4)
    if header_bytes > limits.max_metadata_bytes + _SCHEMA_OVERHEAD_BYTES:
        raise CardLimitError(f"expected a schema of at most {limits.max_metadata_bytes} bytes, got {header_bytes}")
    header, body_bytes = _message(data, start, header_bytes, _SCHEMA_MESSAGE)
    if body_bytes or _schema_metadata(header, limits) != metadata:
        raise CardFormatError("the footer's schema and the first one differ, so readers would see different cards")
    return start + header_bytes


def _message(data: memoryview, start: int, header_bytes: int, kind: int) -> tuple[Table, int]:
    """The header table of the message at `start` and the length of its body."""
    metadata_bytes = header_bytes - 8
    if metadata_bytes <= 0 or header_bytes % 8 or start + header_bytes > len(data):
        raise CardFormatError(f"expected a message at byte {start}, got one of {header_bytes} bytes")
    if bytes(data[start : start + 4]) != _CONTINUATION or read(_I32, data, start + 4) != metadata_bytes:
        raise CardFormatError(f"the message at byte {start} does not begin as the footer says")
    message = Table.root(data[start + 8 : start + header_bytes])
    header = message.table(2)
    if message.scalar(1, _U8) != kind or header is None:
        raise CardFormatError(f"expected a message of type {kind} at byte {start}, got {message.scalar(1, _U8)}")
    _check_plain(message, custom_metadata=4)
    return header, message.scalar(3, _I64)


def _batch_message(data: memoryview, start: int, header_bytes: int, body_bytes: int) -> None:
    if header_bytes > _MAX_BATCH_HEADER_BYTES:
        raise CardLimitError(f"expected a batch header of at most {_MAX_BATCH_HEADER_BYTES} bytes, got {header_bytes}")
    batch, claimed_bytes = _message(data, start, header_bytes, _BATCH_MESSAGE)
    if claimed_bytes != body_bytes or body_bytes < 0 or body_bytes % 8 or start + header_bytes + body_bytes > len(data):
        raise CardFormatError(f"the batch at byte {start} claims a body of {claimed_bytes} bytes that is not there")
    if batch.has(3):
        raise CardFormatError("the card is compressed, which could grow to any size and cannot be mapped")
    rows = batch.scalar(0, _I64)
    if rows < 1:
        raise CardFormatError(f"the batch at byte {start} holds no tensor")
    count, buffers = batch.vector(2, _PAIR.size)
    if count != _BUFFERS_PER_BATCH:
        raise CardFormatError(f"expected {_BUFFERS_PER_BATCH} buffers in a batch, got {count}")
    places = list(_PAIR.iter_unpack(buffers))
    _check_buffers(places, body_bytes, start)
    if any(places[index][1] > rows + _MAX_PADDING_BYTES for index in _VALIDITY_BUFFERS):
        raise CardFormatError(f"the batch at byte {start} hides bytes in its validity bitmaps")


def _check_buffers(buffers: list[tuple[int, int]], body_bytes: int, start: int) -> None:
    """Each buffer follows the one before, with no more between than padding."""
    end = 0
    for offset, length in [*buffers, (body_bytes, 0)]:
        if length < 0 or offset % 8 or not end <= offset < end + _MAX_PADDING_BYTES:
            raise CardFormatError(f"the buffers of the batch at byte {start} overlap, or leave a hole")
        end = offset + length
    if end > body_bytes:
        raise CardFormatError(f"the buffers of the batch at byte {start} reach over its end")


def _schema_metadata(schema: Table | None, limits: CardLimits) -> dict[bytes, bytes]:
    """Check that a schema is the card's; returns its metadata."""
    if schema is None or schema.scalar(0, _I16):
        raise CardFormatError("expected a little-endian schema")
    fields = schema.tables(1, limit=len(_FIELDS))
    if [(field.raw(0), field.scalar(2, _U8)) for field in fields] != list(_FIELDS):
        raise CardFormatError("expected the columns name, role, dtype, shape, data of a card, got others")
    for field in fields:
        _check_field(field)
    pairs = [(pair.raw(0), pair.raw(1)) for pair in _pairs(schema, limits)]
    metadata = dict(pairs)
    if len(metadata) != len(pairs) or not metadata.keys() <= METADATA_KEYS:
        raise CardFormatError("expected only the card's own metadata, each key once")
    return metadata


def _pairs(schema: Table, limits: CardLimits) -> list[Table]:
    pairs = schema.tables(2, limit=len(METADATA_KEYS))
    total_bytes = sum(pair.vector(slot, 1)[0] for pair in pairs for slot in (0, 1))
    if total_bytes > limits.max_metadata_bytes:
        raise CardLimitError(
            f"expected schema metadata of at most {limits.max_metadata_bytes} bytes, got {total_bytes}"
        )
    return pairs


def _check_field(field: Table) -> None:
    """Not null, no dictionary, no metadata (an extension type is nothing else); a list holds int64."""
    _check_plain(field, custom_metadata=6)
    if field.scalar(1, _BOOL) or field.has(4):
        raise CardFormatError(f"column {field.raw(0)!r} may hold nulls or is dictionary-encoded, expected a plain one")
    children = field.tables(5, limit=1)
    if field.scalar(2, _U8) != _LIST:
        if children:
            raise CardFormatError(f"expected no columns below {field.raw(0)!r}")
        return
    if len(children) != 1 or not _is_int64(children[0]):
        raise CardFormatError("expected 'shape' to be a list of int64 without nulls")


def _is_int64(field: Table) -> bool:
    _check_plain(field, custom_metadata=6)
    kind = field.table(3) if field.scalar(2, _U8) == _INT else None
    nested = field.scalar(1, _BOOL) or field.has(4) or field.vector(5, 4)[0]
    return not nested and kind is not None and kind.scalar(0, _I32) == 64 and bool(kind.scalar(1, _BOOL))


def _check_plain(table: Table, *, custom_metadata: int) -> None:
    if table.vector(custom_metadata, 4)[0]:
        raise CardFormatError("expected metadata on the schema only, got some elsewhere (an extension type, perhaps)")
