"""How much memory there is: this process's, the machine's, and what the cgroups that it is in allow.

Read when an adapter is loaded and when somebody looks; there is no thread that watches. Page cache that the kernel can
give back counts as free. torch is not imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from arrowmoe.errors import AdapterMemoryError

ROOT = Path("/")


@dataclass(frozen=True, kw_only=True)
class MemoryReading:
    """Bytes: `resident` in this process; `free` for it, of `limit`; which of machine and cgroup leaves the least."""

    resident: int
    free: int
    limit: int
    limited_by: Literal["machine", "cgroup"]


@dataclass(frozen=True, kw_only=True)
class _Files:
    """Where a cgroup says what it allows, what it uses, and how much of that is cache that nobody uses."""

    limit: str
    used: str
    cache: str


_V2 = _Files(limit="memory.max", used="memory.current", cache="inactive_file")
_V1 = _Files(limit="memory.limit_in_bytes", used="memory.usage_in_bytes", cache="total_inactive_file")


def read_memory(root: Path = ROOT) -> MemoryReading:
    """Memory now; cgroups of either version are looked up under `root`, the parents of ours among them."""
    machine = psutil.virtual_memory()
    resident = psutil.Process().memory_info().rss
    readings = [
        MemoryReading(resident=resident, free=machine.available, limit=machine.total, limited_by="machine"),
        *(
            MemoryReading(resident=resident, free=max(0, limit - used), limit=limit, limited_by="cgroup")
            for limit, used in _cgroups(root, below=machine.total)
        ),
    ]
    return min(readings, key=lambda reading: reading.free)


def _cgroups(root: Path, *, below: int) -> Iterator[tuple[int, int]]:
    """(limit, used) of each cgroup around this process that allows less than `below`."""
    listed = root / "proc/self/cgroup"
    for line in listed.read_text().splitlines() if listed.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            yield from _upwards(root / "sys/fs/cgroup", path, _V2, below)
        elif "memory" in controllers.split(","):
            yield from _upwards(root / "sys/fs/cgroup/memory", path, _V1, below)


def _upwards(mount: Path, path: str, files: _Files, below: int) -> Iterator[tuple[int, int]]:
    """Of the cgroup at `path` and its parents; within a container only some of them can be seen."""
    inside = Path(path.lstrip("/"))
    for place in {mount / inside, *(mount / parent for parent in inside.parents)}:
        if not (place / files.limit).exists():
            continue
        limit = (place / files.limit).read_text().strip()
        if limit != "max" and int(limit) < below:
            stat = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
            yield int(limit), int((place / files.used).read_text()) - int(stat[files.cache])


class MemoryGuard:
    """Keeps `floor_bytes` of memory free when adapters are loaded."""

    def __init__(self, floor_bytes: int, *, read: Callable[[], MemoryReading] = read_memory) -> None:
        self._floor = floor_bytes
        self._read = read

    def check(self, wanted: str, nbytes: int, shrink: Callable[[int], int]) -> None:
        """Have the host tier give up what is lacking (`shrink` frees so many bytes, and says how many it did).

        Raises `AdapterMemoryError` where `nbytes` for `wanted` leave less than the floor even so.
        """
        free = self._read().free
        lacking = self._floor + nbytes - free
        if lacking > 0 and shrink(lacking) < lacking:
            raise AdapterMemoryError(
                f"{wanted}: expected {nbytes} bytes of memory above the floor of {self._floor}, got {free} free, "
                "so it is not loaded",
                hint="give the process more memory, use fewer adapters at once, or lower engine.floor_mib",
                later=True,
            )


__all__ = ["MemoryGuard", "MemoryReading", "read_memory"]
