from __future__ import annotations

import gc
from collections.abc import Iterator
from itertools import repeat

import pytest

from federation import limits
from federation.errors import BusyError
from federation.places import Places


class Cutter:
    """Remembers whom it was told to cut, and a clock."""

    def __init__(self) -> None:
        self.cut: list[int] = []
        self.now = 50.0
        self.places = Places(lambda place, _: self.cut.append(place), now=lambda: self.now)

    def take(self, place: int, caller: str | None = None) -> Iterator[int]:
        return self.places.take(repeat(place), caller=caller or f"node {place}", place=place)


def test_what_is_taken_comes_through() -> None:
    assert list(Cutter().places.take(iter("abc"), caller="x", place=1)) == ["a", "b", "c"]


def test_one_caller_gets_so_many_and_others_are_served() -> None:
    cutter = Cutter()
    held = [cutter.take(index, "greedy") for index in range(limits.MAX_STREAMS_PER_CALLER)]
    with pytest.raises(BusyError, match="this caller"):
        cutter.take(99, "greedy")
    assert next(cutter.take(100, "modest")) == 100
    held.pop()
    gc.collect()
    assert next(cutter.take(99, "greedy")) == 99
    assert cutter.cut == []


def test_places_come_back_from_streams_that_nobody_read() -> None:
    cutter = Cutter()
    for place in range(3 * limits.MAX_STREAMS):
        cutter.take(place)
    held = [cutter.take(place) for place in range(limits.MAX_STREAMS)]
    with pytest.raises(BusyError, match="try again"):
        cutter.take(99)
    assert len(held) == limits.MAX_STREAMS


def test_where_all_are_held_the_one_that_stood_still_longest_is_cut() -> None:
    cutter = Cutter()
    held = [cutter.take(place) for place in range(limits.MAX_STREAMS)]
    cutter.now += limits.STALLED_S + 1
    for place, stream in enumerate(held):
        if place != 7:
            next(stream)
    with pytest.raises(BusyError):
        cutter.take(99)
    assert cutter.cut == [7]


def test_streams_that_move_are_never_cut() -> None:
    cutter = Cutter()
    held = [cutter.take(place) for place in range(limits.MAX_STREAMS)]
    for _ in range(10):
        cutter.now += limits.STALLED_S - 1
        for stream in held:
            next(stream)
        with pytest.raises(BusyError):
            cutter.take(99)
    assert cutter.cut == []
