"""Which parts of a row of bytes are there: a set of half-open spans [start, end) that neither touch nor overlap."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import TypeAlias

Span: TypeAlias = "tuple[int, int]"


class Spans:
    """A set of bytes' numbers, kept as spans in order; cheap while there are few of these."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def add(self, start: int, end: int) -> None:
        """Put [start, end) in."""
        if start >= end:
            return
        first, last = bisect_left(self._ends, start), bisect_right(self._starts, end)
        if first < last:
            start, end = min(start, self._starts[first]), max(end, self._ends[last - 1])
        self._starts[first:last], self._ends[first:last] = [start], [end]

    def remove(self, start: int, end: int) -> None:
        """Take [start, end) out."""
        if start >= end:
            return
        kept = [*self._outside(start, end)]
        self._starts, self._ends = [start for start, _ in kept], [end for _, end in kept]

    def end_of(self, start: int) -> int:
        """Where the bytes that are there from `start` on end; `start` itself if it is not there."""
        index = bisect_right(self._starts, start) - 1
        return max(start, self._ends[index]) if index >= 0 else start

    def overlaps(self, start: int, end: int) -> bool:
        """Whether any byte of [start, end) is there."""
        index = bisect_right(self._ends, start)
        return start < end and index < len(self._starts) and self._starts[index] < end

    def gaps(self, start: int, end: int) -> list[Span]:
        """The spans of [start, end) that are not there, in order."""
        found = []
        while start < end:
            start = self.end_of(start)
            index = bisect_right(self._starts, start)
            until = min(end, self._starts[index]) if index < len(self._starts) else end
            if start < until:
                found.append((start, until))
            start = until
        return found

    def _outside(self, start: int, end: int) -> list[Span]:
        parts = []
        for first, last in zip(self._starts, self._ends, strict=True):
            parts += [(first, min(last, start)), (max(first, end), last)]
        return [(first, last) for first, last in parts if first < last]


__all__ = ["Span", "Spans"]
