"""When a night is due. The only module that knows APScheduler, whose cron expressions it understands.

APScheduler's own timers trust that the clock goes on evenly: after a sleep over 02:00 a job is misfired and dropped,
and after a jump back it waits as long as the jump was. So a thread of ours looks at the clock every half minute and
asks which night is the latest that was due; that it begins once only is the journal's care (docs/adr/0018).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import datetime, timedelta, tzinfo

from apscheduler.triggers.cron import CronTrigger

from evolution.errors import EvolutionError
from evolution.journal import Now
from registry.logs import get_logger

POLL_S = 30.0
CATCH_UP = timedelta(hours=18)
"""A night that was missed by more than this is left out: the next one is near."""

log = get_logger(__name__)


class ScheduleError(EvolutionError):
    """A cron expression cannot be understood."""


class NightSchedule:
    """A cron expression of five fields (minute, hour, day, month, weekday), in local time unless `zone` is given."""

    def __init__(self, expression: str, zone: tzinfo | None = None) -> None:
        try:
            self._trigger = CronTrigger.from_crontab(expression, timezone=zone)
        except ValueError as error:
            raise ScheduleError(
                f"expected a cron expression of five fields, got {expression!r}: {error}",
                hint='for example "0 2 * * *": every night at two',
            ) from error
        self.expression = expression

    def next(self, after: datetime) -> datetime | None:
        """The first moment after `after`; None for an expression that never comes true again."""
        found: datetime | None = self._trigger.get_next_fire_time(None, after + timedelta(microseconds=1))
        return found

    def due(self, now: datetime, last: datetime | None, *, catch_up: timedelta = CATCH_UP) -> datetime | None:
        """The latest moment up to `now` that comes after `last`; None if there is none within `catch_up`.

        Nights that were slept through are one night: only the latest is due.
        """
        since = now - catch_up if last is None else max(last, now - catch_up)
        latest, moment = None, self.next(since)
        while moment is not None and moment <= now:
            latest, moment = moment, self.next(moment)
        return latest


class NightWatch:
    """Calls `begin(planned_at)` in its own thread when a night is due, between `start` and `close`.

    `first` is called once before, `schedule` before each look: the owner may have set another, or None. `last` tells
    when the last night up to a moment was.
    """

    def __init__(
        self,
        schedule: Callable[[], NightSchedule | None],
        *,
        last: Callable[[datetime], datetime | None],
        begin: Callable[[datetime], object],
        first: Callable[[], object] = lambda: None,
        now: Now,
        poll_s: float = POLL_S,
    ) -> None:
        self._schedule, self._last, self._begin, self._first = schedule, last, begin, first
        self._now, self._poll_s = now, poll_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="arrowmoe-nights", daemon=True)

    def start(self) -> None:
        """Watch from now on."""
        self._thread.start()

    def close(self, timeout_s: float = 10.0) -> None:
        """Watch no more; a night under way should have been told to end."""
        self._over.set()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            log.warning("thread_abandoned", thread=self._thread.name)

    def look(self) -> None:
        """Begin the night that is due, if there is one."""
        schedule, now = self._schedule(), self._now()
        planned_at = None if schedule is None else schedule.due(now, self._last(now))
        if planned_at is not None:
            self._begin(planned_at)

    def _watch(self) -> None:
        self._guarded(self._first)
        while not self._over.is_set():
            self._guarded(self.look)
            self._over.wait(self._poll_s)

    @staticmethod
    def _guarded(work: Callable[[], object]) -> None:
        try:
            work()
        except Exception:  # one bad night must not end all others
            log.exception("night_failed")


__all__ = ["CATCH_UP", "NightSchedule", "NightWatch", "ScheduleError"]
