"""The queue in which rows wait: one line for each set of adapters, served in turn.

So whoever asks a thousand things of one adapter delays the others by a row at a time, not by a thousand.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import islice

from arrowmoe.rows import Row


class WaitingRows:
    """Rows in turn over the sets of adapters that they use, first come first served within each."""

    def __init__(self) -> None:
        self._lines: dict[frozenset[str], deque[Row]] = {}  # the first line is served next

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[Row]:
        return (row for line in self._lines.values() for row in line)

    def add(self, rows: Iterable[Row]) -> None:
        """Behind all others that use the same adapters."""
        for row in rows:
            self._lines.setdefault(frozenset(row.weights), deque()).append(row)

    def adapters(self, lines: int) -> list[str]:
        """The adapters that are needed next, by the first so many lines."""
        return [digest for adapters in islice(self._lines, lines) for digest in sorted(adapters)]

    def first(self, can_begin: Callable[[Collection[str]], bool]) -> Row | None:
        """Whose turn it is of those whose adapters allow it."""
        return next((line[0] for adapters, line in self._lines.items() if can_begin(adapters)), None)

    def pop(self, row: Row) -> Row:
        """Take out the first of its line, which is the last line now."""
        adapters = frozenset(row.weights)
        line = self._lines[adapters]
        line.popleft()
        del self._lines[adapters]
        if line:
            self._lines[adapters] = line
        return row

    def put_back(self, rows: Sequence[Row]) -> None:
        """Have `rows`, which were just taken out, come first again."""
        for row in reversed(rows):
            adapters = frozenset(row.weights)
            line = self._lines.pop(adapters, deque())
            line.appendleft(row)
            self._lines = {adapters: line, **self._lines}

    def drop_over(self) -> None:
        """Forget the rows of requests that are over."""
        left = {
            adapters: deque(row for row in line if not row.request.is_over) for adapters, line in self._lines.items()
        }
        self._lines = {adapters: line for adapters, line in left.items() if line}


__all__ = ["WaitingRows"]
