from __future__ import annotations

import pytest

from federation import limits
from federation.allowances import NO_LIMIT, Bucket, Budget, crowd_of


@pytest.mark.parametrize(
    ("address", "crowd"),
    [
        ("192.168.1.7", "192.168.1.7"),
        ("::ffff:192.168.1.7", "192.168.1.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::1", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::/64"),
        ("no address", "no address"),
    ],
)
def test_who_counts_as_one_caller(address: str, crowd: str) -> None:
    assert crowd_of(address) == crowd


def test_a_budget_is_that_of_the_calls_in_progress() -> None:
    budget = Budget()
    idle = budget.left()
    with budget.expecting(1_000_000):
        with budget.expecting(10):
            assert budget.left() >= idle + 1_000_010
        budget.take(900_000)
        assert budget.left() >= 100_000
    assert budget.left() == idle


def test_calls_that_bring_nothing_save_nothing_up() -> None:
    budget = Budget()
    idle = budget.left()
    for _ in range(100):
        with budget.expecting(1 << 20):
            pass
    assert budget.left() == idle


def test_what_a_call_took_too_much_is_not_forgiven_by_its_end() -> None:
    budget = Budget()
    idle = budget.left()
    with budget.expecting(1_000):
        room = budget.left()
        budget.take(room)
        assert budget.left() == 0
    assert budget.left() == 0
    assert idle == limits.ANSWER_SLACK_BYTES


def test_a_pace_lets_so_many_bytes_pass_in_a_second_and_saves_up_only_a_little() -> None:
    bucket = Bucket(1_000_000, now=100.0)
    assert bucket.waits
    passed, clock = 0, 100.0
    for _ in range(100):
        clock += 0.01
        assert bucket.refilled(clock)
        passed += bucket.left()
        bucket.take(bucket.left())
        assert bucket.waits
    assert passed == pytest.approx(1_000_000, rel=0.01)
    assert bucket.refilled(clock + 3600)
    assert bucket.left() <= 1_000_000 * limits.PACE_BURST_S


def test_without_a_pace_everything_passes() -> None:
    bucket = Bucket(None)
    bucket.take(1 << 50)
    assert not bucket.waits
    assert bucket.left() == NO_LIMIT
