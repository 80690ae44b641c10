"""Which card a name means. Pure: every node that knows the same labels resolves a name to the same card.

Versions compare naturally: runs of digits as numbers (2 < 10, 1.9 < 1.10), words below the end of the version
(1.0-rc1 < 1.0), numbers above it (1.0 < 1.0.1). The characters between the runs do not count.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache

from registry.digest import Digest

_RUN = re.compile(r"[0-9]+|[A-Za-z]+")
_LAST_NUMBER = re.compile(r"[0-9]+(?=[^0-9]*$)")
_WORD, _END, _NUMBER = 0, 1, 2

VersionKey = tuple[tuple[int, int, str], ...]


@dataclass(frozen=True, kw_only=True)
class Label:
    """One row of the labels: `digest` goes by `name@version`; `created` is the card's."""

    name: str
    version: str
    digest: Digest
    created: datetime

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


@lru_cache(maxsize=4096)
def version_key(version: str) -> VersionKey:
    """Sort key of a version in natural order."""
    runs = _RUN.findall(version)
    return (*((_NUMBER, int(run), "") if run[0].isdigit() else (_WORD, 0, run) for run in runs), (_END, 0, ""))


def newest_first(labels: Iterable[Label]) -> list[Label]:
    """Labels by version, then by the card's time of creation, then by digest; the greatest first."""
    return sorted(labels, key=_rank, reverse=True)


def newest(labels: Iterable[Label]) -> Label | None:
    """The label that a name means, whatever the order they came in."""
    return max(labels, key=_rank, default=None)


def next_version(versions: Iterable[str]) -> str:
    """A version that is free and above all of `versions`: the highest one with its last number raised, or "1"."""
    highest = max(versions, key=version_key, default=None)
    if highest is None:
        return "1"
    last = _LAST_NUMBER.search(highest)
    if last is None:
        return f"{highest}.1"
    return f"{highest[: last.start()]}{int(last[0]) + 1}{highest[last.end() :]}"


def _rank(label: Label) -> tuple[VersionKey, datetime, str]:
    return (version_key(label.version), label.created, label.digest)
