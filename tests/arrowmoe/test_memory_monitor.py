"""How much memory there is by machine and cgroup, and what happens when there is little."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import psutil
import pytest

from arrowmoe.engine import ArrowEngine
from arrowmoe.errors import AdapterMemoryError
from arrowmoe.memory_monitor import MemoryGuard, MemoryReading, read_memory
from registry.quantising import quantise
from tests.arrowmoe.tiny import card_for, llama_engine

V1_NONE = 9223372036854771712


def cgroup(place: Path, **files: object) -> None:
    place.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (place / name.replace("__", ".")).write_text(f"{value}\n")


def tree(root: Path, mine: str) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(mine)
    return root / "sys/fs/cgroup"


def test_the_tightest_cgroup_counts_and_cache_is_free(tmp_path: Path) -> None:
    mount = tree(tmp_path, "0::/pod/box\n")
    stat = "anon 5\ninactive_file 600000\nactive_file 7"
    cgroup(mount / "pod/box", memory__max="max", memory__current=900_000, memory__stat=stat)
    cgroup(mount / "pod", memory__max=2_000_000, memory__current=1_500_000, memory__stat=stat)
    reading = read_memory(tmp_path)
    assert (reading.free, reading.limit, reading.limited_by) == (1_100_000, 2_000_000, "cgroup")


def test_version_1_of_cgroups_inside_a_container(tmp_path: Path) -> None:
    """The path is the host's; within the container only the mount itself is there."""
    mount = tree(tmp_path, "9:name=systemd:/\n4:cpu,memory:/docker/abc\n0::/\n")
    cgroup(
        mount / "memory",
        memory__limit_in_bytes=3_000_000,
        memory__usage_in_bytes=3_100_000,
        memory__stat="cache 1\ntotal_inactive_file 50000",
    )
    assert (read_memory(tmp_path).free, read_memory(tmp_path).limited_by) == (0, "cgroup")


def test_without_a_limit_the_machine_is_the_limit(tmp_path: Path) -> None:
    mount = tree(tmp_path, "4:memory:/\n")
    stat = "total_inactive_file 0"
    cgroup(mount / "memory", memory__limit_in_bytes=V1_NONE, memory__usage_in_bytes=5, memory__stat=stat)
    for root in (tmp_path, tmp_path / "no such place"):
        reading = read_memory(root)
        assert (reading.limit, reading.limited_by) == (psutil.virtual_memory().total, "machine")
        assert 0 < reading.free <= reading.limit


def reading_of(free: int) -> Callable[[], MemoryReading]:
    return lambda: MemoryReading(resident=1, free=free, limit=1 << 40, limited_by="machine")


@pytest.mark.parametrize(("free", "asked"), [(1500, []), (1499, [1]), (1000, [500])])
def test_the_host_tier_shrinks_before_a_load_is_refused(free: int, asked: list[int]) -> None:
    shrunk: list[int] = []

    def shrink(nbytes: int) -> int:
        shrunk.append(nbytes)
        return nbytes

    MemoryGuard(1000, read=reading_of(free)).check("card 'a'", 500, shrink)
    assert shrunk == asked


def test_what_would_leave_less_than_the_floor_is_refused_by_name() -> None:
    guard = MemoryGuard(1000, read=reading_of(1200))
    with pytest.raises(AdapterMemoryError, match=r"card 'a': expected 500 bytes .* floor of 1000, got 1200 free") as no:
        guard.check("card 'a'", 500, lambda nbytes: nbytes - 1)
    assert no.value.later
    assert no.value.hint is not None
    assert "engine.floor_mib" in no.value.hint


def test_an_engine_short_of_memory_refuses_new_cards_and_serves_on(tmp_path: Path) -> None:
    free = [1 << 30]
    guard = MemoryGuard(1 << 20, read=lambda: reading_of(free[0])())
    engine = ArrowEngine(llama_engine().base, guard=guard)
    engine.load_lora(card_for(engine, tmp_path, "one", seed=1))
    before = engine.generate(["w5 w9"], adapter="one", max_new_tokens=6)[0].tokens
    free[0] = 1 << 20
    with pytest.raises(AdapterMemoryError, match="card 'two'"):
        engine.load_lora(card_for(engine, tmp_path, "two", seed=2))
    assert engine.generate(["w5 w9"], adapter="one", max_new_tokens=6)[0].tokens == before
    free[0] = 1 << 30
    engine.load_lora(card_for(engine, tmp_path, "two", seed=2))
    assert engine.generate(["w5 w9"], adapter="two", max_new_tokens=6)[0].text


def test_a_packed_card_is_counted_as_what_it_takes_once_it_is_unpacked(tmp_path: Path) -> None:
    card = quantise(card_for(llama_engine(), tmp_path, "one", seed=1), 4, name="packed")
    roomy = llama_engine()
    needed = roomy.hold(card).nbytes
    for free, fits in ((1000 + needed - 1, False), (1000 + needed, True)):
        engine = ArrowEngine(llama_engine().base, guard=MemoryGuard(1000, read=reading_of(free)))
        with nullcontext() if fits else pytest.raises(AdapterMemoryError, match=f"expected {needed} bytes"):
            engine.load_lora(card)
