"""Just enough FlatBuffers to look at Arrow's messages before Arrow does.

Rules: nothing outside the buffer is ever read, nothing is allocated by a length that the buffer claims, and whatever
does not fit is a `CardFormatError`. Ignores alignment and overlaps, which Arrow's own verifier checks later.
"""

from __future__ import annotations

import struct

from registry.errors import CardFormatError

_U16 = struct.Struct("<H")
_I32 = struct.Struct("<i")
_U32 = struct.Struct("<I")


class Table:
    """A table at `position` of `data`; fields are named by their slot, as numbered in Arrow's `.fbs` files."""

    __slots__ = ("_data", "_position", "_vtable", "_vtable_bytes")

    def __init__(self, data: memoryview, position: int) -> None:
        self._data = data
        self._position = position
        self._vtable = position - read(_I32, data, position)
        self._vtable_bytes = read(_U16, data, self._vtable)
        _within(data, self._vtable, self._vtable_bytes)

    @classmethod
    def root(cls, data: memoryview) -> Table:
        """The table that a buffer's first four bytes point to."""
        return cls(data, read(_U32, data, 0))

    def has(self, slot: int) -> bool:
        """Whether the field was written at all."""
        return self._at(slot) is not None

    def scalar(self, slot: int, form: struct.Struct, default: int = 0) -> int:
        """The integer in `slot`."""
        at = self._at(slot)
        return default if at is None else read(form, self._data, at)

    def table(self, slot: int) -> Table | None:
        """The table in `slot`."""
        at = self._target(slot)
        return None if at is None else Table(self._data, at)

    def vector(self, slot: int, item_bytes: int) -> tuple[int, memoryview]:
        """Number of items and bytes of the vector in `slot`; (0, nothing) where it was not written."""
        at = self._target(slot)
        if at is None:
            return 0, memoryview(b"")
        count = read(_U32, self._data, at)
        return count, _within(self._data, at + 4, count * item_bytes)

    def raw(self, slot: int) -> bytes:
        """The string or byte vector in `slot`."""
        return bytes(self.vector(slot, 1)[1])

    def tables(self, slot: int, limit: int) -> list[Table]:
        """The tables of the vector in `slot`. More than `limit` are refused before one is looked at."""
        at = self._target(slot)
        if at is None:
            return []
        count, _ = self.vector(slot, 4)
        if count > limit:
            raise CardFormatError(f"expected at most {limit} entries in a part of the card's header, got {count}")
        places = [at + 4 + 4 * index for index in range(count)]
        return [Table(self._data, place + read(_U32, self._data, place)) for place in places]

    def _at(self, slot: int) -> int | None:
        entry = 4 + 2 * slot
        if entry + 2 > self._vtable_bytes:
            return None
        offset = read(_U16, self._data, self._vtable + entry)
        return self._position + offset if offset else None

    def _target(self, slot: int) -> int | None:
        at = self._at(slot)
        return None if at is None else at + read(_U32, self._data, at)


def read(form: struct.Struct, data: memoryview, at: int) -> int:
    """The integer at `at`, which may be anything. Raises `CardFormatError` outside of `data`."""
    if not 0 <= at <= len(data) - form.size:
        raise CardFormatError(f"the card points to byte {at} of a part of {len(data)} bytes, so it is damaged")
    value: int = form.unpack_from(data, at)[0]
    return value


def _within(data: memoryview, start: int, count: int) -> memoryview:
    if start < 0 or start + count > len(data):
        raise CardFormatError(
            f"the card claims {count} bytes at byte {start} of a part of {len(data)} bytes, so it is damaged"
        )
    return data[start : start + count]
