"""Taking back an expert that people find worse than none: a test on their verdicts, so that one bad day does not.

An expert is withdrawn when its answers are called bad more often than `most_bad` beyond chance (exact binomial test).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import binomtest

from evolution.journal import Journal
from evolution.signals import Signal, SignalStore
from evolution.survey import PUBLISHED
from registry.errors import UnknownCardError
from registry.logs import get_logger
from registry.store import Registry

WITHDRAWN = "withdrawn"
log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Withdrawing:
    """How many of an expert's judged answers may be bad, and how sure it must be that more are."""

    most_bad: float = 0.3
    alpha: float = 0.01
    least_verdicts: int = 8


@dataclass(frozen=True, kw_only=True)
class Regression:
    """Verdicts on a card's answers, and the p-value of so many bad ones were the share `most_bad`."""

    bad: int
    verdicts: int
    p_value: float


def regression(signals: Sequence[Signal], withdrawing: Withdrawing) -> Regression | None:
    """Whether people call the answers of one card bad too often; None where that cannot be said."""
    verdicts = [signal.feedback for signal in signals if signal.feedback in ("good", "bad")]
    bad = verdicts.count("bad")
    if len(verdicts) < withdrawing.least_verdicts:
        return None
    p_value = float(binomtest(bad, len(verdicts), withdrawing.most_bad, alternative="greater").pvalue)
    return Regression(bad=bad, verdicts=len(verdicts), p_value=p_value) if p_value <= withdrawing.alpha else None


class Withdrawer:
    """Withdraws experts that this node has grown: the card leaves the registry, its gap says why."""

    def __init__(
        self, registry: Registry, journal: Journal, signals: SignalStore, *, withdrawing: Withdrawing | None = None
    ) -> None:
        self._registry, self._journal, self._signals = registry, journal, signals
        self._withdrawing = withdrawing or Withdrawing()

    def withdraw(self, base: str) -> tuple[str, ...]:
        """Names of the experts of `base` that were withdrawn just now."""
        grown = [gap for gap in self._journal.gaps(state=PUBLISHED) if gap.base == base and gap.card is not None]
        queued, names = self._signals.queued(base), []
        for gap in grown:
            found = regression([signal for signal in queued if signal.card == gap.card], self._withdrawing)
            if found is not None and gap.card is not None:
                self._remove(gap.card)
                why = f"withdrawn: {found.bad} of {found.verdicts} judged answers were bad (p = {found.p_value:.2g})"
                self._journal.settle_gap(gap.id, WITHDRAWN, why, card=gap.card)
                self._signals.release(gap.id)
                log.warning("expert_withdrawn", name=gap.name, why=why)
                names.append(gap.name)
        return tuple(names)

    def _remove(self, digest: str) -> None:
        try:
            self._registry.remove(digest)
        except UnknownCardError:
            log.info("expert_already_gone", digest=digest)


__all__ = ["WITHDRAWN", "Regression", "Withdrawer", "Withdrawing", "regression"]
