"""When a night is due. The only module that knows APScheduler, whose cron expressions it understands.

APScheduler's own timers trust that the clock goes on evenly: after a sleep over 02:00 a job is misfired and dropped,
and after a jump back it waits as long as the jump was. So a thread of ours looks at the clock every half minute and
asks which night is the latest that was due; that it begins once only is the journal's care (docs/adr/0018).
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Final

from apscheduler.triggers.cron import CronTrigger

from evolution.clock import Now
from evolution.errors import EvolutionError
from registry.logs import get_logger

POLL_S = 30.0
CATCH_UP = timedelta(hours=18)
"""A night that was missed by more than this is left out: the next one is near."""

WEEKDAYS: Final = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")

log = get_logger(__name__)


class ScheduleError(EvolutionError):
    """A cron expression cannot be understood."""


class NightSchedule:
    """A cron expression of five fields (minute, hour, day, month, weekday), in local time unless `zone` is given.

    Weekdays count from Sunday, which is 0 and 7. Where clocks are put back, a time that comes twice counts once; where
    they are put forward, one that is left out comes an hour later.
    """

    def __init__(self, expression: str, zone: tzinfo | None = None) -> None:
        try:
            self._trigger = CronTrigger.from_crontab(_with_named_weekdays(expression), timezone=zone)
        except ValueError as error:
            raise ScheduleError(
                f"expected a cron expression of five fields, got {expression!r}: {error}",
                hint='for example "0 2 * * *": every night at two',
            ) from error
        self.expression = expression

    def next(self, after: datetime) -> datetime | None:
        """The first moment after `after`; None for an expression that never comes true again."""
        found: datetime | None = after
        while found is not None:  # in UTC, for wall clocks cannot be reckoned with where they are put back
            found = self._trigger.get_next_fire_time(None, found.astimezone(UTC) + timedelta(microseconds=1))
            if found is not None and not found.fold:
                return found.astimezone(UTC)
        return None

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

    Before each look `resume` carries on what can be carried on, and `schedule` is asked: the owner may have set
    another, or None. `last` tells when the last night up to a moment was.
    """

    def __init__(
        self,
        schedule: Callable[[], NightSchedule | None],
        *,
        last: Callable[[datetime], datetime | None],
        begin: Callable[[datetime], object],
        resume: Callable[[], object] = lambda: None,
        now: Now,
        poll_s: float = POLL_S,
    ) -> None:
        self._schedule, self._last, self._begin, self._resume = schedule, last, begin, resume
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
        while not self._over.is_set():
            self._guarded(self._resume)
            self._guarded(self.look)
            self._over.wait(self._poll_s)

    @staticmethod
    def _guarded(work: Callable[[], object]) -> None:
        try:
            work()
        except Exception:  # one bad night must not end all others
            log.exception("night_failed")


def _with_named_weekdays(expression: str) -> str:
    """The weekdays by name, each by itself: to APScheduler 0 is Monday, and no range begins with a Sunday."""
    *fields, weekdays = expression.split()
    named = [_named_weekdays(part) for part in weekdays.split(",")]
    return " ".join([*fields, ",".join(named)])


def _named_weekdays(part: str) -> str:
    """`1-3` → `mon,tue,wed`; what is not made of numbers stays as it is."""
    numbers = re.fullmatch(r"([0-7])(?:-([0-7]))?(?:/([1-7]))?", part)
    if numbers is None:
        return part
    first, last, step = numbers.groups()
    until = int(last or (6 if step else first))
    if until < int(first):
        raise ValueError(f"weekdays {part} run backwards")
    return ",".join(WEEKDAYS[day % 7] for day in range(int(first), until + 1, int(step or 1)))


__all__ = ["CATCH_UP", "NightSchedule", "NightWatch", "ScheduleError"]
