"""What stands behind the `evolve` commands that change something, and `feedback`: in a command's process or a node's.

Results are values that JSON can hold.
"""

from __future__ import annotations

import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, Literal

import arrowmoe
from arrowmoe import evolution_view, views
from arrowmoe.control import Progress
from arrowmoe.inference import Inference
from arrowmoe.settings import Settings
from arrowmoe.signalling import signal_store
from evolution.errors import JobError, SignalError
from evolution.journal import DONE, FAILED, SCHEDULE, Journal
from evolution.schedule import NightSchedule
from evolution.signals import SignalStore
from evolution.slow_cards import SlowCards
from registry.store import Registry

if TYPE_CHECKING:
    from arrowmoe.evolving import Evolution
    from evolution.skill_factory import NightReport
    from evolution.survey import Found

Json = dict[str, Any]
TELL_EVERY_S = 0.5
OPEN = "open"
"""State of a gap that is worth an expert, as in `evolution.survey`, whose imports take seconds."""


def run(evolution: Evolution, settings: Settings, params: Mapping[str, Any], progress: Progress) -> Json:
    """A night: the one that was left unfinished, else a new one (`fresh`: a new one in any case).

    With `dry_run` the gaps that a night would find. Raises `JobError` while another night is under way.
    """
    if params.get("dry_run"):
        return _previewed(evolution.factory.preview(), settings.evolution.most_experts)
    journal = evolution.journal
    if held := journal.held():
        raise JobError(f"a night is under way: {held[0].key}", hint="`arrowmoe evolve status` tells how far it is")
    with _telling(journal, progress):
        reports = [] if params.get("fresh") else evolution.resume()
        resumed = bool(reports)
        if not resumed and (report := evolution.run()) is not None:
            reports = [report]
    nights = [_reported(journal, report) for report in reports]
    return {"dry_run": False, "resumed": resumed, "ok": all(night["ok"] for night in nights), "nights": nights}


@contextmanager
def evolution_here(
    registry: Registry, settings: Settings, *, bases: Sequence[str], on_model: Callable[[str], None]
) -> Iterator[Evolution]:
    """The night of a home in this process, with `bases` and the embedder loaded. Raises what loading them raises."""
    inference = Inference(registry, settings, bases=bases)
    inference.load(on_model)
    for model in (*bases, settings.embedder):
        inference.engine(model)
    with closing(arrowmoe.evolution_of_node(registry, settings, inference, fetch=None)) as evolution:
        yield evolution


def set_schedule(registry: Registry, settings: Settings, expression: str) -> Json:
    """Have nights begin by `expression` from now on, by none if it is empty. Raises `ScheduleError`."""
    if expression:
        NightSchedule(expression)
    Journal(registry.database).keep_note(SCHEDULE, {"expression": expression})
    return evolution_view.schedule(registry, settings)


def feedback(
    registry: Registry,
    settings: Settings,
    verdict: Literal["good", "bad"],
    ref: str | None,
    correction: str | None,
) -> Json:
    """Note what the owner says of a request: the last one, or that whose id begins with `ref`. Raises `SignalError`."""
    store = signal_store(registry.database, settings.evolution)
    signal_id = _request(store, settings, ref)
    store.feedback(signal_id, verdict, correction=correction)
    signal = next(signal for signal in _all(store, settings) if signal.id == signal_id)
    return {
        "id": signal.id,
        "prompt": signal.prompt,
        "answer": signal.answer,
        "feedback": signal.feedback,
        "correction": signal.correction,
    }


def forget(registry: Registry, settings: Settings, *, files: bool) -> Json:
    """Delete every signal; with `files` also what finished jobs have left in the home, which holds prompts."""
    directories = []
    if files:
        jobs = Journal(registry.database).jobs(limit=evolution_view.MOST)
        paths = [registry.home / "nights" / f"job-{job.id}" for job in jobs if job.state in (DONE, FAILED)]
        directories = [path for path in paths if path.is_dir()]
        for path in directories:
            shutil.rmtree(path)
    return {"signals": signal_store(registry.database, settings.evolution).forget(), "jobs": len(directories)}


def roll_back(registry: Registry, base: str | None) -> Json:
    """Remove the newest slow card of `base`, by default of the only base that has one. Raises `JobError`."""
    journal = Journal(registry.database)
    if held := journal.held():
        raise JobError(f"a night is under way: {held[0].key}", hint="`arrowmoe evolve status` tells how far it is")
    cards = SlowCards(registry, journal)
    bases = cards.bases() if base is None else [base]
    if len(bases) != 1:
        raise JobError(f"expected one base with a slow card, got {', '.join(bases) or 'none'}", hint="name the base")
    top = cards.take_back(bases[0], "its owner took it back")
    below = cards.of(bases[0]).layers
    return {
        "base": bases[0],
        "removed": top.label,
        "expert": top.expert.name,
        "restored": below[-1].label if below else None,
    }


def _request(store: SignalStore, settings: Settings, ref: str | None) -> str:
    if ref is None:
        last = store.recent(1)
        if not last:
            raise SignalError(
                "expected a request that was kept, got none, so there is nothing to judge",
                hint="routed requests are kept (`arrowmoe ask`), unless evolution.signals is off",
            )
        return last[0].id
    found = [signal.id for signal in _all(store, settings) if signal.id.startswith(ref)] if ref else []
    if len(found) > 1:
        raise SignalError(f"expected the id of one request, got {ref!r}, which {len(found)} begin with")
    return found[0] if found else ref


def _all(store: SignalStore, settings: Settings) -> Sequence[Any]:
    return store.recent(settings.evolution.max_signals)


def _previewed(found: Mapping[str, Sequence[Found]], most_experts: int) -> Json:
    rows = []
    for base, gaps in found.items():
        grown = [gap for gap in gaps if gap.state == OPEN][:most_experts]
        rows += [_found(base, gap, grows=gap in grown) for gap in gaps]
    return {"dry_run": True, "gaps": rows}


def _found(base: str, found: Found, *, grows: bool) -> Json:
    return {
        "base": base,
        "name": found.theme.name,
        "state": found.state,
        "why": found.why,
        "grows": grows,
        "prompts": found.gap.size,
        "traffic": round(found.gap.traffic, 1),
        "worth": found.worth,
        "description": found.theme.description,
        "terms": list(found.theme.terms),
        "samples": list(found.gap.prompts[:3]),
    }


def _reported(journal: Journal, report: NightReport) -> Json:
    """What came of a night, with its gaps, and the jobs that ended otherwise than they should."""
    said = report.to_json()
    gaps = [journal.gap(int(job.spec["gap"])) for job in reversed(report.jobs) if "gap" in job.spec]
    found: Counter[str] = Counter()
    for job in report.jobs:
        found.update(job.outcome.get("gaps", {}))
    return {
        "night": f"night-{report.night}",
        "planned_at": report.planned_at.isoformat(),
        "ok": not said["failed"] and not said["unfinished"] and said["error"] is None,
        **said,
        "found": dict(found),
        "withdrawn": [name for job in report.jobs for name in job.outcome.get("withdrawn", ())],
        "gaps": [views.gap(gap) for gap in gaps],
        "jobs": [views.job(job) for job in reversed(report.jobs)],
    }


@contextmanager
def _telling(journal: Journal, progress: Progress) -> Iterator[None]:
    """Tell how far the jobs under way are, again and again, for as long as the block lasts."""
    over = threading.Event()

    def tell() -> None:
        while not over.wait(TELL_EVERY_S):
            for job in journal.held():
                progress(evolution_view.telling(journal, job))

    thread = threading.Thread(target=tell, name="arrowmoe-telling", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


__all__ = ["evolution_here", "feedback", "forget", "roll_back", "run", "set_schedule"]
