"""The survey: from a base's signals to the gaps worth learning tonight, each with the reason for its rank.

What was answered badly is scored (`dissonance`), what belongs together is clustered (`gaps`), and what a card here or
at a peer already covers is left to it. Nothing is dropped: what becomes no gap stays queued.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from evolution.anchors import replay
from evolution.combiner import kept
from evolution.dissonance import agreement, dissonance, fisher, worst
from evolution.evaluation import matches
from evolution.gaps import Clustering, Gap, coverage, find_gaps, worth
from evolution.journal import GapRecord, Journal
from evolution.naming import name_gap
from evolution.protocols import Floats, Routes, Student, Theme, Use
from evolution.signals import Signal, SignalStore
from registry.catalog import Catalog
from registry.database import Database
from registry.errors import ArrowMoEError
from registry.logs import get_logger

ORDINARY = 100
"""Requests that were answered well, beside which the others are clustered, with the shipped replay prompts."""
GROWTH = 1.5
"""A gap whose expert was rejected is tried again when it has so many times the prompts."""

OPEN, GROWING, PUBLISHED, REJECTED, COVERED, FETCHED, WAITING, FAILED, LAPSED = (
    "open",
    "growing",
    "published",
    "rejected",
    "covered",
    "fetched",
    "waiting",
    "failed",
    "lapsed",
)
"""`FAILED`: growing was given up, `LAPSED`: nothing came of it before its requests were surveyed again."""

Fetch = Callable[[str], object]
"""Brings a peer's card, by digest, into the registry."""
log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Surveying:
    """What counts as dissonant, and how it is clustered.

    Every abstention and every request called bad is; any other from `least_dissonance` on. Of the worst `share` each
    is answered `samples` times more, to see how far the answers agree (0: not at all).
    """

    least_dissonance: float = 0.95
    share: float = 0.2
    samples: int = 0
    temperature: float = 0.8
    cost_microusd: float = 1.0
    clustering: Clustering = field(default_factory=Clustering)


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """A gap as it was judged; `state` is `OPEN` for one that is worth an expert."""

    gap: Gap
    theme: Theme
    worth: float
    state: str
    why: str


class Surveyor:
    """Surveys the signals of one database. `fetch` is None where no peer can be asked."""

    def __init__(
        self,
        database: Database,
        signals: SignalStore,
        journal: Journal,
        routes: Routes,
        *,
        fetch: Fetch | None = None,
        surveying: Surveying | None = None,
    ) -> None:
        self._database, self._signals, self._journal, self._routes = database, signals, journal, routes
        self._fetch, self._surveying = fetch, surveying or Surveying()

    def survey(self, base: str, student: Student | None = None, *, night: int | None = None) -> list[GapRecord]:
        """Find the gaps of `base`, enter them and give them their signals; the most worth first.

        `student` samples for tier 1; without one tier 1 is left out.
        """
        found = self.look(base, student)
        return [self._enter(one, night) for one in found]

    def look(self, base: str, student: Student | None = None) -> list[Found]:
        """The gaps of `base` as they are now; nothing is entered. The most worth first."""
        signals, scores = self.scored(base, student)
        chosen = self._dissonant(signals, scores)
        log.info("signals_scored", base=base, signals=len(signals), dissonant=len(chosen))
        if not chosen:
            return []
        dissonant = [signals[at] for at in chosen]
        ordinary = self._ordinary(base, signals)
        gaps = find_gaps(
            dissonant,
            self._routes.features([signal.prompt for signal in dissonant]),
            scores[np.array(chosen)],
            ordinary=self._routes.features(ordinary),
            clustering=self._surveying.clustering,
        )
        judged = [self._judged(gap, dissonant, ordinary) for gap in gaps]
        return sorted(judged, key=lambda one: -one.worth)

    def scored(self, base: str, student: Student | None = None) -> tuple[list[Signal], Floats]:
        """Queued signals of `base`, and the dissonance (n,) of each."""
        signals, combine = self._signals.queued(base), kept(self._database, base) or fisher
        scores = dissonance(signals, combine=combine)
        if student is not None and student.kind == "causal" and self._surveying.samples and signals:
            agreements = self._sampled(worst(signals, scores, share=self._surveying.share), student)
            self._signals.agreed(agreements)
            signals = [replace(one, agreement=agreements.get(one.id, one.agreement)) for one in signals]
            scores = dissonance(signals, combine=combine)
        return signals, scores

    def _dissonant(self, signals: Sequence[Signal], scores: Floats) -> list[int]:
        least = self._surveying.least_dissonance
        return [
            at
            for at, (signal, score) in enumerate(zip(signals, scores, strict=True))
            if signal.feedback != "good" and (not signal.ordinary or score >= least)
        ]

    def _ordinary(self, base: str, signals: Sequence[Signal]) -> list[str]:
        prompts = [*dict.fromkeys(signal.prompt for signal in signals if signal.ordinary)][-ORDINARY:]
        return [*prompts, *(one.prompt for one in replay() if one.prompt)]

    def _sampled(self, signals: Sequence[Signal], student: Student) -> dict[str, float]:
        """Tier 1: how far fresh answers to each signal's prompt agree; by the bare base where its card is gone."""
        here = Catalog(self._database).digests()
        uses = [Use(card=signal.card) if signal.card in here else None for signal in signals]
        draws = [
            student.answer(
                [signal.prompt for signal in signals],
                uses,
                max_new_tokens=32,
                temperature=self._surveying.temperature,
                seed=draw * len(signals),
            )
            for draw in range(self._surveying.samples)
        ]
        return {signal.id: agreement(replies, matches) for signal, *replies in zip(signals, *draws, strict=True)}

    def _judged(self, gap: Gap, signals: Sequence[Signal], ordinary: Sequence[str]) -> Found:
        bad = {signal.prompt for signal in signals if signal.feedback == "bad"}
        asked = [prompt for prompt in gap.prompts if prompt not in bad]
        covered = coverage(self._routes.covers(asked, base=gap.base))
        theme, state, why = name_gap(gap.prompts, ordinary), OPEN, covered.why
        if covered.verdict == "covered":
            state = COVERED
        elif covered.verdict == "fetch" and self._fetch is not None and covered.peer_digest is not None:
            state = FETCHED
        elif (before := self._rejected(gap.base, theme.name, gap.size)) is not None:
            state, why = WAITING, f"its expert was rejected with {before.size} prompts, and it has {gap.size} now"
        return Found(
            gap=gap, theme=theme, worth=worth(gap, cost_microusd=self._surveying.cost_microusd), state=state, why=why
        )

    def _rejected(self, base: str, name: str, size: int) -> GapRecord | None:
        """The gap of that name whose expert was rejected, if this one has not grown enough since."""
        before = [gap for gap in self._journal.gaps(state=REJECTED) if (gap.base, gap.name) == (base, name)]
        return before[0] if before and size < GROWTH * before[0].size else None

    def _enter(self, found: Found, night: int | None) -> GapRecord:
        found = self._brought(found) if found.state == FETCHED else found
        gap = found.gap
        number = self._journal.enter_gap(
            night,
            {
                "base": gap.base,
                "name": found.theme.name,
                "theme": asdict(found.theme),
                "size": gap.size,
                "worth": found.worth,
                "state": found.state,
                "why": found.why,
            },
        )
        if found.state == OPEN:
            self._signals.assign(number, gap.signals)
        return self._journal.gap(number)

    def _brought(self, found: Found) -> Found:
        """Fetch the peer's card that covers a gap: cheaper than growing one, unless the peer is gone."""
        covers = self._routes.covers(found.gap.prompts, base=found.gap.base)
        digest = coverage(covers).peer_digest
        if self._fetch is None or digest is None:
            return replace(found, state=OPEN)
        try:
            self._fetch(digest)
        except ArrowMoEError as error:
            log.warning("card_not_fetched", digest=digest, error=str(error))
            return replace(found, state=OPEN, why=f"{found.why}, which failed: {error}")
        return found


def theme_of(record: GapRecord) -> Theme:
    """The theme that a gap was entered with."""
    said = dict(record.theme)
    return Theme(**said | {"terms": tuple(said["terms"]), "labels": tuple(said["labels"])})


__all__ = [
    "COVERED",
    "FAILED",
    "FETCHED",
    "GROWING",
    "LAPSED",
    "OPEN",
    "PUBLISHED",
    "REJECTED",
    "WAITING",
    "Fetch",
    "Found",
    "Surveying",
    "Surveyor",
    "theme_of",
]
