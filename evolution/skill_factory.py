"""The night: survey every base, grow an expert for the gaps that are worth most, and say what came of it.

    survey the signals of each base → grow the gaps, the most worth first → consolidate what has stood → report

The work is jobs in the journal, so a night that was killed goes on at the next start, where it stood, and what a night
had no time or budget for goes on in the next. Bases rotate: the jobs of one are done before those of the next, so that
one is loaded at a time.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from evolution.errors import BudgetSpentError, JobError
from evolution.executors import Cancelled
from evolution.journal import DONE, FAILED, Job, Journal
from evolution.protocols import Students
from evolution.seasoning import Seasoner
from evolution.signals import SignalStore
from evolution.skill_distiller import STAGES, SkillDistiller
from evolution.survey import FAILED as GAP_FAILED
from evolution.survey import GROWING, LAPSED, OPEN, Found, Surveyor
from evolution.withdrawal import Withdrawer
from registry.errors import ArrowMoEError
from registry.logs import get_logger

SURVEY, GROW, CONSOLIDATE = "survey", "grow", "consolidate"
NIGHTS: Final = "night-"
OVER: Final = (DONE, FAILED)
CANCELLED, WINDOW_OVER, BUDGET_SPENT = "it was told to end", "the night's window is over", "the budget was spent"
FIRST: Final = 1_000_000
"""Priority of surveys, above that of any gap."""

log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Nightly:
    """What a night may take: experts grown for all bases together, and seconds."""

    most_experts: int = 3
    window_s: float = 4 * 3600.0


@dataclass(frozen=True, kw_only=True)
class NightReport:
    """What came of a night; `error` is why it ended before its work was done."""

    night: int
    planned_at: datetime
    jobs: tuple[Job, ...]
    seconds: float
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        published = [job.outcome["label"] for job in self.jobs if "label" in job.outcome]
        rejected = {job.key: job.outcome["rejected"] for job in self.jobs if "rejected" in job.outcome}
        failed = {job.key: job.outcome.get("error") for job in self.jobs if job.state == FAILED}
        return {
            "published": published,
            "consolidated": self._said("consolidated"),
            "not_consolidated": self._said("not_consolidated"),
            "taken_back": [label for job in self.jobs for label in job.outcome.get("taken_back", ())],
            "rejected": rejected,
            "failed": failed,
            "unfinished": [job.key for job in self.jobs if job.state not in OVER],
            "seconds": round(self.seconds, 1),
            "error": self.error,
        }

    def _said(self, key: str) -> dict[str, str]:
        """By expert, what the jobs that consolidate have said."""
        return {name: said for job in self.jobs for name, said in job.outcome.get(key, {}).items()}


class SkillFactory:
    """Runs nights. Several processes may: each night begins once, and each job is held by one of them."""

    def __init__(
        self,
        journal: Journal,
        signals: SignalStore,
        students: Students,
        surveyor: Surveyor,
        distiller: SkillDistiller,
        *,
        withdrawer: Withdrawer | None = None,
        seasoner: Seasoner | None = None,
        nightly: Nightly | None = None,
        begin_budget: Callable[[str], object] = lambda account: None,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._journal, self._signals, self._students = journal, signals, students
        self._surveyor, self._distiller = surveyor, distiller
        self._withdrawer, self._seasoner = withdrawer, seasoner
        self._nightly, self._begin_budget, self._monotonic_s = nightly or Nightly(), begin_budget, monotonic_s

    def night(self, planned_at: datetime, *, cancelled: Cancelled | None = None) -> NightReport | None:
        """Run the night planned for `planned_at`; None if it was begun before, here or elsewhere."""
        number = self._journal.begin_night(planned_at)
        if number is None:
            return None
        log.info("night_begins", night=number, planned_at=planned_at.isoformat())
        return self._run(number, planned_at, cancelled)

    def resume(self, *, cancelled: Cancelled | None = None) -> list[NightReport]:
        """Carry on the nights that no process is working on any more, and that need not wait to try again."""
        open_nights = [night for night in self._journal.nights() if night.ended is None and self._can_go_on(night.id)]
        return [self._run(night.id, night.planned_at, cancelled) for night in reversed(open_nights)]

    def preview(self) -> dict[str, list[Found]]:
        """The gaps that a night would find now, by base; nothing is entered, asked or trained."""
        return {base: self._surveyor.look(base) for base in self._signals.counts()}

    def _can_go_on(self, night: int) -> bool:
        jobs = self._journal.jobs(keys=_prefix(night))
        return all(job.state in OVER for job in jobs) or self._journal.is_free(keys=_prefix(night))

    def _run(self, night: int, planned_at: datetime, cancelled: Cancelled | None) -> NightReport:
        start_s, error, base = self._monotonic_s(), None, None
        self._enqueue_surveys(night)
        self._begin_budget(f"night-{night}")
        worked, spent = set[int](), set[int]()
        while (job := self._next(base, spent)) is not None:
            left_s = self._nightly.window_s - (self._monotonic_s() - start_s)
            if left_s <= 0 or _true(cancelled):
                self._journal.release(job)
                error = CANCELLED if left_s > 0 else WINDOW_OVER
                break
            base = job.base
            worked.add(job.id)
            if self._work(job, night, left_s, cancelled):
                spent.add(job.id)
        self._give_back_gaps()
        jobs = [
            job for job in self._journal.jobs(keys=NIGHTS) if job.id in worked or job.key.startswith(_prefix(night))
        ]
        error = error or (BUDGET_SPENT if spent else None)
        report = NightReport(
            night=night, planned_at=planned_at, jobs=tuple(jobs), seconds=self._monotonic_s() - start_s, error=error
        )
        if error in (WINDOW_OVER, BUDGET_SPENT):
            self._journal.end_night(night, "cut short", report.to_json())
        elif all(job.state in OVER for job in self._journal.jobs(keys=_prefix(night))):
            self._journal.end_night(night, "done", report.to_json())
        log.info("night_ends", night=night, **report.to_json())
        return report

    def _enqueue_surveys(self, night: int) -> None:
        """A survey of each base, unless they are there: a killed night begins here too."""
        self._signals.prune()
        for base in self._signals.counts():
            self._journal.enqueue(f"{_prefix(night)}{SURVEY}/{base}", SURVEY, base, priority=FIRST, spec={})

    def _next(self, base: str | None, without: Collection[int]) -> Job | None:
        """A job of the same base if there is one, else of another; those that earlier nights left are among them."""
        same = self._journal.claim(keys=NIGHTS, base=base, without=without) if base is not None else None
        return same or self._journal.claim(keys=NIGHTS, without=without)

    def _work(self, job: Job, night: int, left_s: float, cancelled: Cancelled | None) -> bool:
        """One job to its end, or back into the queue with what went wrong; whether its budget was spent."""
        try:
            if job.kind == SURVEY:
                self._survey(job, night)
            elif job.kind == CONSOLIDATE:
                self._consolidate(job)
            else:
                self._distiller.grow(job, deadline_s=left_s, cancelled=cancelled)
        except BudgetSpentError as error:  # tomorrow has another budget
            log.warning("budget_spent", job=job.key, error=str(error))
            self._put_back(job, error)
            return True
        except (ArrowMoEError, OSError) as error:
            if _true(cancelled):
                self._put_back(job, None)
            else:
                log.warning("job_failed", job=job.key, error=str(error), attempt=job.attempts)
                self._put_back(job, error)
        except Exception as error:  # a bug that one job meets must not end the night
            log.exception("job_failed", job=job.key, attempt=job.attempts)
            self._put_back(job, error)
        return False

    def _put_back(self, job: Job, error: Exception | None) -> None:
        """Into the queue, as an attempt that failed if there is an error."""
        try:
            if error is None:
                self._journal.release(job)
            else:
                self._journal.fail(job, str(error) or type(error).__name__)
        except JobError:
            log.warning("job_taken_over", job=job.key)

    def _survey(self, job: Job, night: int) -> None:
        with self._journal.renewing(job), self._students.open(job.base) as student:
            withdrawn = () if self._withdrawer is None else self._withdrawer.withdraw(job.base)
            growing = self._lapse(job.base, night)
            gaps = self._surveyor.survey(job.base, student, night=night)
            free = max(0, self._nightly.most_experts - growing)
            for rank, gap in enumerate(gap for gap in gaps if gap.state == OPEN):
                if rank < free:
                    key = f"{_prefix(night)}{GROW}/{gap.id}"
                    spec = {"gap": gap.id}
                    self._journal.enqueue(key, GROW, job.base, priority=FIRST - 1 - rank, stage=STAGES[0], spec=spec)
                else:
                    self._journal.settle_gap(gap.id, OPEN, f"{gap.why}; other gaps came first tonight")
                    self._signals.release(gap.id)
            if self._seasoner is not None and self._seasoner.has_work(job.base):
                self._journal.enqueue(f"{_prefix(night)}{CONSOLIDATE}/{job.base}", CONSOLIDATE, job.base, spec={})
            states = Counter(gap.state for gap in gaps)
            self._journal.finish(job, gaps=dict(states), withdrawn=list(withdrawn))

    def _consolidate(self, job: Job) -> None:
        """After what is grown, for it is the least urgent."""
        with self._journal.renewing(job):
            self._journal.finish(job, **({} if self._seasoner is None else self._seasoner.season(job)))

    def _lapse(self, base: str, night: int) -> int:
        """Let go of open gaps that nothing grows: they are surveyed anew. How many experts are or were tonight's."""
        jobs = [job for job in self._journal.jobs(keys=NIGHTS) if job.kind == GROW]
        growing = {job.spec["gap"] for job in jobs if job.state not in OVER}
        for gap in self._journal.gaps(state=OPEN):
            if gap.base == base and gap.id not in growing:
                self._signals.release(gap.id)
                self._journal.settle_gap(gap.id, LAPSED, gap.why)
        return sum(job.state not in OVER or job.key.startswith(_prefix(night)) for job in jobs)

    def _give_back_gaps(self) -> None:
        """What the gaps of jobs that were given up for good hold is queued again."""
        for job in self._journal.jobs(keys=NIGHTS):
            if job.kind == GROW and job.state == FAILED:
                gap = self._journal.gap(job.spec["gap"])
                if gap.state in (OPEN, GROWING):
                    self._signals.release(gap.id)
                    self._journal.settle_gap(gap.id, GAP_FAILED, f"given up: {job.outcome.get('error')}")


def _prefix(night: int) -> str:
    return f"{NIGHTS}{night}/"


def _true(cancelled: Cancelled | None) -> bool:
    return cancelled is not None and cancelled()


__all__ = ["NightReport", "Nightly", "SkillFactory"]
