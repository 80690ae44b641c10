from __future__ import annotations

from federation.pace import Pace


class Clock:
    """Time that passes only while somebody waits."""

    def __init__(self) -> None:
        self.now = 100.0

    def wait(self, seconds: float) -> None:
        self.now += seconds

    def __call__(self) -> float:
        return self.now


def test_bytes_take_their_time() -> None:
    clock = Clock()
    pace = Pace(1000, clock=clock)
    for _ in range(10):
        pace.spend(500, clock.wait)
    assert clock.now == 105.0


def test_a_pause_is_not_saved_up() -> None:
    clock = Clock()
    pace = Pace(1000, clock=clock)
    pace.spend(1000, clock.wait)
    clock.now += 60
    pace.spend(1000, clock.wait)
    assert clock.now == 162.0


def test_without_a_rate_nobody_waits() -> None:
    clock = Clock()
    Pace(None, clock=clock).spend(1 << 40, clock.wait)
    assert clock.now == 100.0
