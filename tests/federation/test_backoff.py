"""Delays double, end somewhere, differ by chance, and are forgotten once something works."""

from __future__ import annotations

from federation.backoff import Backoff


def test_delays_double_up_to_a_limit_and_chance_takes_at_most_half() -> None:
    longest = Backoff(first_s=1.0, most_s=30.0, chance=lambda: 0.0)
    assert [longest.failed("a", 0.0) for _ in range(7)] == [1, 2, 4, 8, 16, 30, 30]
    shortest = Backoff(first_s=1.0, most_s=30.0, chance=lambda: 1.0)
    assert [shortest.failed("a", 0.0) for _ in range(3)] == [0.5, 1, 2]


def test_what_failed_waits_until_it_is_due_or_works() -> None:
    backoff = Backoff(first_s=1.0, most_s=30.0, chance=lambda: 0.0)
    backoff.failed("a", 10.0)
    backoff.failed("b", 10.5)
    assert backoff.waiting(10.9) == {"a", "b"}
    assert backoff.waiting(11.0) == {"b"}
    backoff.worked("b")
    assert backoff.waiting(11.0) == frozenset()
    assert backoff.failed("a", 11.0) == 2.0, "in a row"
    backoff.keep_only(frozenset({"c"}))
    assert backoff.failed("a", 12.0) == 1.0


def test_many_failures_are_no_overflow() -> None:
    backoff = Backoff(first_s=1.0, most_s=30.0, chance=lambda: 0.0)
    assert {backoff.failed("a", 0.0) for _ in range(5000)} == {1, 2, 4, 8, 16, 30}
