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
    pace = Pace(1000, wait=clock.wait, clock=clock)
    for _ in range(10):
        pace.spend(500)
    assert clock.now == 105.0


def test_a_pause_is_not_saved_up() -> None:
    clock = Clock()
    pace = Pace(1000, wait=clock.wait, clock=clock)
    pace.spend(1000)
    clock.now += 60
    pace.spend(1000)
    assert clock.now == 162.0


def test_without_a_rate_nobody_waits() -> None:
    clock = Clock()
    Pace(None, wait=clock.wait, clock=clock).spend(1 << 40)
    assert clock.now == 100.0
