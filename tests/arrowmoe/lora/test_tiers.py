"""Who leaves for whom, and what a bounded store keeps."""

from __future__ import annotations

import pytest

from arrowmoe.errors import AdapterMemoryError
from arrowmoe.lora.tiers import Claim, Kept, leavers


def claim(
    digest: str, nbytes: int, *, turn: int, priority: int = 0, pinned: bool = False, flying: bool = False
) -> Claim:
    return Claim(digest=digest, nbytes=nbytes, turn=turn, priority=priority, pinned=pinned, in_flight=flying)


def test_nobody_leaves_where_there_is_room_or_no_bound() -> None:
    claims = [claim("a", 40, turn=1), claim("b", 40, turn=2)]
    assert leavers("c", 20, claims, 100) == []
    assert leavers("c", 10_000, claims, None) == []


def test_what_was_used_the_longest_ago_leaves_and_no_more_than_needed() -> None:
    claims = [claim("a", 40, turn=3), claim("b", 40, turn=1), claim("c", 20, turn=2)]
    assert leavers("d", 40, claims, 100) == ["b"]
    assert leavers("d", 41, claims, 100) == ["b", "c"]


def test_a_lower_priority_leaves_first() -> None:
    claims = [claim("a", 50, turn=1, priority=2), claim("b", 50, turn=9, priority=1)]
    assert leavers("c", 50, claims, 100) == ["b"]


@pytest.mark.parametrize(("needed", "later"), [(60, True), (90, True), (91, False), (101, False)])
def test_what_is_held_stays_and_the_error_says_what_is_needed_and_whether_to_wait(needed: int, later: bool) -> None:
    claims = [
        claim("a", 40, turn=1, flying=True),
        claim("b", 10, turn=2, pinned=True, flying=True),
        claim("c", 30, turn=3),
    ]
    assert leavers("d", 50, claims, 100) == ["c"]
    wanted = f"^d: expected room for {needed} bytes .* got 50: of 100, 10 are pinned and 40 in flight"
    with pytest.raises(AdapterMemoryError, match=wanted) as refused:
        leavers("d", needed, claims, 100)
    assert refused.value.later == later


def test_a_bounded_store_lets_go_of_the_oldest() -> None:
    kept: Kept[str] = Kept(100)
    for key in "abc":
        kept.keep(key, key.upper(), 40)
    assert (kept.get("a"), kept.get("b"), kept.get("c"), kept.nbytes) == (None, "B", "C", 80)
    kept.keep("b", "again", 40)
    kept.keep("d", "D", 40)
    assert (kept.get("b"), "c" in kept, kept.nbytes) == ("again", False, 80)


def test_a_value_that_is_too_large_is_not_kept_and_none_leaves_for_it() -> None:
    kept: Kept[str] = Kept(100)
    kept.keep("a", "A", 100)
    kept.keep("b", "B", 101)
    assert (kept.get("a"), "b" in kept) == ("A", False)
    kept.drop("a")
    kept.drop("a")
    assert kept.nbytes == 0


def test_a_store_that_shrinks_lets_go_of_the_oldest_and_says_what_it_freed() -> None:
    kept: Kept[str] = Kept(100)
    for key in "abc":
        kept.keep(key, key, 30)
    assert (kept.shrink(31), kept.nbytes, "a" in kept, "c" in kept) == (60, 30, False, True)
    assert (kept.shrink(1000), kept.nbytes) == (30, 0)
    assert kept.shrink(1) == 0
