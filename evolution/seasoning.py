"""Seasoned experts: one that has stood for days without regression goes into its base's slow card.

An expert is due when the gate has accepted it, it was grown `days` ago, it is still what its name means here, and the
verdicts on its answers leave no doubt. A night takes one, the oldest: its exam is taken again, the sum of the slow card
and it is cut to a rank (`registry.merging`), and the new slow card has to hold anchors, general texts, and the exams of
all experts in it, before it is published. Where it does not, the reason is noted, and it is tried again `days` later.

Also taken back here: a slow card that people find bad, and one that holds an expert which was removed or withdrawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import numpy as np

from evolution.clock import Now, utc_now
from evolution.errors import JobError
from evolution.evaluation import Exam, Examiner
from evolution.examples import read_examples
from evolution.gate import Bars, Bools, Results, compare, judge, judge_drift
from evolution.journal import Job, Journal
from evolution.protocols import Routes, Student, Students
from evolution.recipe import Recipe
from evolution.signals import Signal, SignalStore
from evolution.slow_cards import MOST, Expert, Layer, Slow, SlowCards
from evolution.survey import PUBLISHED
from evolution.withdrawal import Withdrawing, regression
from evolution.workspace import Workspace, exam_of
from registry.card import LoRACard
from registry.errors import MergeError
from registry.format import LoRAFormat
from registry.labels import version_key
from registry.logs import get_logger
from registry.merging import Merge, Shares, merge
from registry.store import Registry

log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Seasoning:
    """When an expert is due (`days`; 0: never), and the slow card's most rank.

    What leaves `doubt` by its verdicts is not consolidated; to withdraw it takes more.
    """

    days: float = 7.0
    rank: int = 64
    doubt: Withdrawing = field(default_factory=lambda: Withdrawing(alpha=0.05))


class UnfitError(JobError):
    """An expert does not go into the slow card, for a reason that trying again tonight does not change."""


class Seasoner:
    """Keeps the slow cards of one home. What it needs of the node is handed in."""

    def __init__(
        self,
        registry: Registry,
        journal: Journal,
        signals: SignalStore,
        students: Students,
        routes: Routes,
        *,
        recipe: Recipe | None = None,
        seasoning: Seasoning | None = None,
        now: Now = utc_now,
    ) -> None:
        self._registry, self._journal, self._signals = registry, journal, signals
        self._students, self._routes = students, routes
        self._recipe, self._seasoning, self._now = recipe or Recipe(), seasoning or Seasoning(), now
        self._cards = SlowCards(registry, journal, now=now)

    def has_work(self, base: str) -> bool:
        """Whether `season` would do something."""
        slow, signals = self._cards.of(base), self._recent(base)
        return self._fault(slow, signals) is not None or bool(self._due(base, slow, signals))

    def season(self, job: Job) -> dict[str, Any]:
        """Take back what did not hold, then consolidate the expert that has stood longest; says what came of it."""
        taken_back = self._take_back(job.base)
        slow = self._cards.of(job.base)
        due = self._due(job.base, slow, self._recent(job.base))
        if not due:
            return {"taken_back": taken_back}
        try:
            label = self._consolidate(job, slow, due[0])
        except (UnfitError, MergeError) as error:
            self._cards.set_aside(job.base, due[0], str(error))
            log.warning("expert_not_consolidated", name=due[0].name, why=str(error))
            return {"taken_back": taken_back, "not_consolidated": {due[0].name: str(error)}}
        return {"taken_back": taken_back, "consolidated": {due[0].name: label}}

    def _take_back(self, base: str) -> list[str]:
        """Labels of the slow cards that were taken back."""
        labels = []
        signals = self._recent(base)
        while (fault := self._fault(self._cards.of(base), signals)) is not None:
            why, may_return = fault
            labels.append(self._cards.take_back(base, why, may_return=may_return).label)
        return labels

    def _fault(self, slow: Slow, signals: Sequence[Signal]) -> tuple[str, bool] | None:
        """What is wrong with the top card, and whether its expert may come back; None if nothing is."""
        if not slow.layers:
            return None
        top, gone = slow.layers[-1], [one for one in slow.held.values() if not self._cards.is_here(one.card)]
        if gone:
            return f"it holds {gone[0].name}, which is not here any more", gone[0] != top.expert
        found = regression([one for one in signals if one.card == top.card], Withdrawing())
        if found is not None:
            return f"{found.bad} of {found.verdicts} judged answers were bad (p = {found.p_value:.2g})", False
        return None

    def _due(self, base: str, slow: Slow, signals: Sequence[Signal]) -> list[Expert]:
        """Experts that may be consolidated, the oldest first."""
        if not self._seasoning.days:
            return []
        since = self._now() - timedelta(days=self._seasoning.days)
        known = {expert.card for expert in slow.held.values()}
        known |= {card for card, one in slow.aside.items() if one.until_told or one.at > since}
        grown = {job.outcome["card"]: job for job in self._journal.jobs(limit=MOST) if "card" in job.outcome}
        routed = {entry.digest for entry in self._registry.newest()}
        experts = [
            Expert(card=gap.card, name=gap.name, job=grown[gap.card].id)
            for gap in reversed(self._journal.gaps(state=PUBLISHED, limit=MOST))
            if gap.base == base and gap.card in grown and gap.card in routed and gap.card not in known
            if grown[gap.card].updated <= since
        ]
        return [one for one in experts if not self._is_doubtful(one, signals)]

    def _is_doubtful(self, expert: Expert, signals: Sequence[Signal]) -> bool:
        own = [signal for signal in signals if signal.card == expert.card]
        return regression(own, self._seasoning.doubt) is not None

    def _recent(self, base: str) -> list[Signal]:
        """All requests of `base` that are kept, also those that a gap holds."""
        return self._signals.recent(MOST, base=base)

    def _consolidate(self, job: Job, slow: Slow, expert: Expert) -> str:
        """Publish the slow card with `expert` in it; its label. Raises `UnfitError` and `MergeError`."""
        work, shares = Workspace.of(self._registry.home, job.id).make(), self._shares(slow, expert)
        # On disk before the registry sees it, as an expert is, so that a job that was killed publishes it once.
        card = LoRAFormat.load(work.candidate) if work.candidate.exists() else None
        if card is None or card.manifest.parents != tuple(parent.digest for parent, _ in shares):
            with self._students.open(job.base) as student:
                card = self._made(student, slow, expert, shares)
            LoRAFormat.save(card, work.candidate)
        entry = self._registry.publish(card)
        label = f"{entry.name}@{entry.version}"
        self._cards.put_on(job.base, Layer(card=entry.digest, label=label, expert=expert))
        log.info("expert_consolidated", name=expert.name, label=label, digest=entry.digest)
        return label

    def _shares(self, slow: Slow, expert: Expert) -> Shares:
        """The slow card of before, less an older expert of this one's name, and this one."""
        parts = [(slow.layers[-1].card, 1.0)] if slow.layers else []
        older = slow.held.get(expert.name)
        parts += [(older.card, -1.0)] if older is not None else []
        return [(self._registry.get(card), weight) for card, weight in (*parts, (expert.card, 1.0))]

    def _made(self, student: Student, slow: Slow, expert: Expert, shares: Shares) -> LoRACard:
        """The new slow card, unsigned, with statistics for the router, and the evidence that it holds."""
        held = {**slow.held, expert.name: expert}
        exams = {name: self._exam(student, one) for name, one in held.items()}
        self._retake(student, expert, exams[expert.name])
        name = self._cards.name(student.base)
        card = merge(
            shares,
            Merge(method="svd", rank=self._seasoning.rank),
            name=name,
            version=max(self._registry.next_version(name), slow.next_version, key=version_key),
            description=_description(list(held)),
        )
        card = self._described(card, list(held.values()))
        return card.describe(evaluation={"consolidation": self._check(student, card, held, exams)})

    def _exam(self, student: Student, expert: Expert) -> Exam:
        work = self._work(expert)
        if not (work.held_out.exists() and work.training.exists()):
            raise UnfitError(f"expected the exam of {expert.name} in {work.directory}, got none, so it cannot be taken")
        return exam_of(work, student.kind, self._recipe)

    def _retake(self, student: Student, expert: Expert, exam: Exam) -> None:
        """The gate once more, by the router as it is now; what is served today is the expert itself."""
        found = Examiner(student, self._routes, exam).measure(self._registry.get(expert.card))
        verdict = judge(replace(found, incumbent=found.base), self._recipe.bars)
        if not verdict.accepted:
            raise UnfitError(f"its exam, taken again: {'; '.join(verdict.reasons)}")

    def _described(self, card: LoRACard, held: Sequence[Expert]) -> LoRACard:
        """With statistics of what all its experts were trained on, calibrated on their exams."""
        works = [self._work(expert) for expert in held]
        sealed = [one.prompt for work in works for one in read_examples(work.held_out)]
        prompts = dict.fromkeys(one.prompt for work in works for one in read_examples(work.training))
        return self._routes.describe(card, [one for one in prompts if one not in set(sealed)], sealed)

    def _check(
        self, student: Student, card: LoRACard, held: Mapping[str, Expert], exams: Mapping[str, Exam]
    ) -> dict[str, Any]:
        """Evidence that the slow card holds. Raises `UnfitError` with every reason why it does not."""
        bars, anchored = self._recipe.bars, replace(next(iter(exams.values())), items=(), support=())
        drift = judge_drift(Examiner(student, self._routes, anchored).measure(card), bars)
        evidence, reasons = {}, list(drift.reasons)
        for name, exam in exams.items():
            examiner = Examiner(student, self._routes, replace(exam, anchors={}, texts=()))
            own = examiner.measure(self._registry.get(held[name].card)).candidate
            evidence[name], more = judge_kept(name, own, examiner.measure(card), bars)
            reasons += more
        if reasons:
            raise UnfitError(f"with it the slow card would not hold: {'; '.join(reasons)}")
        return {"experts": evidence, **drift.evidence}

    def _work(self, expert: Expert) -> Workspace:
        return Workspace.of(self._registry.home, expert.job)


def judge_kept(name: str, own: Bools, slow: Results, bars: Bars) -> tuple[dict[str, Any], list[str]]:
    """Whether a slow card still does what expert `name` does on the items (n,) of its exam: figures, and why not.

    `own` is what the expert by itself gets right. Falls may be of `bars.margin_points`, applied to all items and as
    served; against the bare base the paired interval of the lift stays above 0.
    """
    served = np.where(slow.routed, slow.candidate, slow.incumbent)
    falls = {
        "applied": _fall_points(own, slow.candidate),
        "served": _fall_points(slow.incumbent, served),
    }
    lift = compare(slow.candidate, slow.base, bars)
    reasons = [
        f"exam of {name}, {how}: fell by {fall:.1f} points, the margin is {bars.margin_points:g}"
        for how, fall in falls.items()
        if fall > bars.margin_points
    ]
    if lift.low_points <= 0:
        reasons.append(f"exam of {name}: the lift against the base may be as low as {lift.low_points:.1f} points")
    figures = {
        "items": len(own),
        "expert": float(own.mean()),
        "slow": float(slow.candidate.mean()),
        "served": {"before": float(slow.incumbent.mean()), "after": float(served.mean())},
        "lift_points": [lift.low_points, lift.lift_points, lift.high_points],
    }
    return figures, reasons


def _fall_points(before: Bools, after: Bools) -> float:
    return 100 * (int(before.sum()) - int(after.sum())) / max(1, len(before))


def _description(names: Sequence[str]) -> str:
    """Short enough for a manifest, however many there are."""
    return f"What this node's experts have learnt: {', '.join(names)}"[:4096]


__all__ = ["Seasoner", "Seasoning", "UnfitError", "judge_kept"]
