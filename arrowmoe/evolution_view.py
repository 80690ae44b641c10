"""What the night has done, does and will do, as the journal tells it: no model is loaded, nothing is changed."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from arrowmoe import views
from arrowmoe.settings import Settings
from evolution.budget import Cost, Standing, standing_of
from evolution.clock import Now, utc_now
from evolution.errors import JobError
from evolution.journal import DONE, FAILED, SCHEDULE, GapRecord, Job, Journal, NightRecord, Step
from evolution.schedule import NightSchedule
from evolution.teacher_audit import TeacherAudit
from registry.store import Registry

Json = dict[str, Any]
MOST = 10_000
"""Gaps and jobs that are looked through for one of a name."""


def status(registry: Registry, settings: Settings, now: Now = utc_now) -> Json:
    """The night under way or left unfinished, the next one, and what tonight may cost."""
    journal = Journal(registry.database, now=now)
    held = journal.held()
    last = next(iter(journal.nights(1)), None)
    unfinished = [night for night in journal.nights() if night.ended is None]
    tonight = tuple(f"night-{night.id}/" for night in unfinished)
    jobs = [job for job in journal.jobs(limit=MOST) if job.state not in (DONE, FAILED) or job.key.startswith(tonight)]
    return {
        "running": bool(held),
        "unfinished": [views.night(night) for night in unfinished],
        "jobs": [views.job(job) for job in jobs],
        "training": [telling(journal, job) for job in held],
        "schedule": schedule(registry, settings, now),
        "teacher": _teacher(settings),
        "budget": views.budget(_standing(registry, settings, last if last in unfinished else None)),
    }


def telling(journal: Journal, job: Job) -> Json:
    """What a job under way is at, with the last step of its training."""
    steps = journal.steps(job.id) if job.stage == "train" else []
    step = views.step(steps[-1]) if steps else {"phase": None, "step": 0, "steps": 0, "loss_nats": None}
    gap = journal.gap(int(job.spec["gap"])).name if "gap" in job.spec else None
    return {"job": job.key, "kind": job.kind, "base": job.base, "gap": gap, "stage": job.stage or job.kind} | step


def schedule(registry: Registry, settings: Settings, now: Now = utc_now) -> Json:
    """When nights begin: the expression, who has set it, and the next one."""
    noted = Journal(registry.database).note(SCHEDULE)
    expression = settings.evolution.schedule if noted is None else str(noted["expression"])
    moment = NightSchedule(expression).next(now()) if expression else None
    return {
        "expression": expression or None,
        "set_by": "settings" if noted is None else "command",
        "next": None if moment is None else moment.isoformat(),
    }


def gaps(registry: Registry, *, base: str | None, state: str | None, limit: int) -> list[Json]:
    """The gaps that were found, the latest first."""
    found = Journal(registry.database).gaps(state=state, limit=MOST)
    return [views.gap(gap) for gap in found if base in (None, gap.base)][:limit]


def history(registry: Registry, *, limit: int) -> list[Json]:
    """The nights, the latest first."""
    return [views.night(night) for night in Journal(registry.database).nights(limit)]


def show(registry: Registry, ref: str, *, calls: bool) -> Json:
    """A night or a gap in full; `calls` adds what was said to the teacher. Raises `JobError`."""
    journal = Journal(registry.database)
    kind, _, number = ref.rpartition("-")
    if kind == "night" and number.isdecimal():
        return _night(registry, journal, _night_of(journal, int(number)), calls=calls)
    named = [gap for gap in journal.gaps(limit=MOST) if gap.name == ref]
    if kind == "gap" and number.isdecimal():
        named = [journal.gap(int(number))]
    if not named:
        raise JobError(
            f"expected night-NUMBER, gap-NUMBER or a gap's name, got {ref!r}",
            hint="`arrowmoe evolve history` lists nights, `arrowmoe evolve gaps` gaps",
        )
    return _gap(registry, journal, named[0], calls=calls)


def _night(registry: Registry, journal: Journal, night: NightRecord, *, calls: bool) -> Json:
    jobs = journal.jobs(keys=f"night-{night.id}/")
    grown = [journal.gap(int(job.spec["gap"])) for job in reversed(jobs) if "gap" in job.spec]
    return {
        "kind": "night",
        **views.night(night),
        "jobs": [views.job(job) for job in reversed(jobs)],
        "gaps": [views.gap(gap) for gap in grown],
        "teacher": _asked(registry, f"night-{night.id}", calls=calls),
    }


def _gap(registry: Registry, journal: Journal, gap: GapRecord, *, calls: bool) -> Json:
    job = next((job for job in journal.jobs(limit=MOST) if job.spec.get("gap") == gap.id), None)
    account = None if job is None else job.key.partition("/")[0]
    evidence = None if job is None else _evidence(registry, job)
    return {
        "kind": "gap",
        **views.gap(gap),
        "job": None if job is None else views.job(job),
        "examples": None if job is None else job.outcome.get("examples"),
        "losses": [] if job is None else _losses(journal.steps(job.id)),
        "gate": views.gate(evidence),
        "evidence": evidence,
        "teacher": None if account is None else _asked(registry, account, calls=calls),
    }


def _losses(steps: Sequence[Step]) -> list[Json]:
    """The losses of each phase, in order."""
    phases: dict[str, list[float | None]] = {}
    for one in map(views.step, steps):
        phases.setdefault(one["phase"], []).append(one["loss_nats"])
    return [{"phase": phase, "loss_nats": losses} for phase, losses in phases.items()]


def _evidence(registry: Registry, job: Job) -> Json | None:
    """What the gate has measured: in the journal for a published expert, in the job's directory for any other."""
    path = registry.home / "nights" / f"job-{job.id}" / "verdict.json"
    if "verdict" in job.outcome:
        return dict(job.outcome["verdict"])
    return dict(json.loads(path.read_bytes())) if path.exists() else None


def _asked(registry: Registry, account: str, *, calls: bool) -> Json:
    """What a night's teacher was asked, and what that cost."""
    made = TeacherAudit(registry.database, account, now=utc_now).calls()
    standing = standing_of(registry.database, account)
    return {
        "calls": len(made),
        "failed": sum(call.error is not None for call in made),
        "teachers": sorted({call.teacher for call in made}),
        "disclosures": sorted({call.disclosure for call in made}),
        "prompt_tokens": sum(call.prompt_tokens for call in made),
        "completion_tokens": sum(call.completion_tokens for call in made),
        "usd": sum(call.microusd for call in made) / 1e6,
        "budget": None if standing is None else views.budget(standing),
    } | ({"exchanges": [views.teacher_call(call) for call in made]} if calls else {})


def _night_of(journal: Journal, number: int) -> NightRecord:
    for night in journal.nights(MOST):
        if night.id == number:
            return night
    raise JobError(f"no night has number {number}", hint="`arrowmoe evolve history` lists them")


def _standing(registry: Registry, settings: Settings, night: NightRecord | None) -> Standing:
    """What the night under way has left, or what the next one may spend."""
    found = None if night is None else standing_of(registry.database, f"night-{night.id}")
    limit = Cost(microusd=round(settings.evolution.budget_usd * 1e6), tokens=settings.evolution.budget_tokens)
    return found or Standing(limit=limit, spent=Cost(), reserved=Cost())


def _teacher(settings: Settings) -> Json | None:
    teacher = settings.teacher
    if not teacher.model:
        return None
    return {
        "model": teacher.model,
        "base_url": teacher.base_url,
        "disclosure": teacher.disclosure,
        "key_variable": teacher.key_variable,
        "key_set": bool(os.environ.get(teacher.key_variable)),
    }


__all__ = ["gaps", "history", "schedule", "show", "status", "telling"]
