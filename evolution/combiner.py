"""The calibrated combiner: from what a signal tells to the probability that its answer was bad, learnt from labels.

Labels are the owner's feedback, samples that clearly agreed or did not, and requests that a card published since has
been shown to answer better. It is fitted anew after every publish, because what a model's doubt means changes with its
cards, and kept in the notes with how well it did on signals it had not seen. Until there are labels of both kinds
`dissonance.fisher` stands in.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy.special import expit
from scipy.stats import mannwhitneyu

from evolution.dissonance import FEATURES, features
from evolution.errors import SignalError
from evolution.protocols import Floats
from evolution.signals import Signal
from evolution.tables import NoteRow
from registry.database import Database
from registry.logs import get_logger

Bools = npt.NDArray[np.bool_]

LEAST_LABELS: Final = 10
"""Fewer of either class fit nothing that can be trusted."""
AGREED, DISAGREED = 0.7, 0.3
"""Agreement from which, and up to which, tier 1 counts as a label."""
RIDGE: Final = 1.0
FOLDS: Final = 5
_AGREEMENT: Final = FEATURES.index("agreement")
_BINS: Final = 10
_FLOOR: Final = 1e-6
_STEPS: Final = 100

_log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Combiner:
    """A logistic model of `FEATURES`; `auroc` and `ece` are of cross-fitted probabilities, never of rows it learnt."""

    weights: tuple[float, ...]
    bias: float
    good: int
    bad: int
    auroc: float
    ece: float

    def __call__(self, table: Floats) -> Floats:
        """Features (n, 5) → probabilities (n,) of a bad answer."""
        return np.asarray(expit(_design(table) @ [*self.weights, self.bias]), np.float64)


def fit(table: Floats, bad: npt.ArrayLike) -> Combiner:
    """Ridge logistic regression of labels (n,) on features (n, 5), towards the smoothed targets of Platt (1999).

    Its inputs are −ln p of each feature in nats; a missing one counts 1, its mean where nothing is wrong. Raises
    `SignalError` for fewer than `LEAST_LABELS` of either class.
    """
    labels = np.asarray(bad, dtype=bool)
    positives, negatives = int(labels.sum()), int((~labels).sum())
    if min(positives, negatives) < LEAST_LABELS:
        raise SignalError(
            f"expected {LEAST_LABELS} good and bad answers each, got {negatives} and {positives}, so none was fitted",
            hint="give feedback on more answers; until then the p-values are combined as they are",
        )
    design = _design(table)
    unseen = _cross_fitted(design, labels)
    weights = _newton(design, _platt(labels))
    return Combiner(
        weights=tuple(weights[:-1].tolist()),
        bias=float(weights[-1]),
        good=negatives,
        bad=positives,
        auroc=auroc(unseen, labels),
        ece=calibration_error(unseen, labels),
    )


def refit(database: Database, base: str, signals: Sequence[Signal], *, learnt: Collection[str] = ()) -> Combiner | None:
    """Fit the combiner of `base` on what is labelled and keep it; with too few labels, the one that was kept, or none.

    `signals` are all of the base; `learnt` are the ids of those whose gap a published card has closed. What labels a
    signal is not shown to the fit as a feature too.
    """
    labels = [_label(signal, learnt) for signal in signals]
    table = features(signals)
    table[[signal.feedback is None and signal.id not in learnt for signal in signals], _AGREEMENT] = np.nan
    known = [at for at, label in enumerate(labels) if label is not None]
    try:
        combiner = fit(table[known], [bool(labels[at]) for at in known])
    except SignalError as error:
        _log.info("combiner_not_fitted", base=base, why=str(error))
        return kept(database, base)
    with database.writing() as session:
        session.merge(NoteRow(key=_key(base), value={"features": list(FEATURES), **asdict(combiner)}))
    _log.info("combiner_fitted", base=base, **{k: v for k, v in asdict(combiner).items() if k != "weights"})
    return combiner


def kept(database: Database, base: str) -> Combiner | None:
    """The combiner of `base` that was fitted last; None before the first, and where it was of other features."""
    with database.reading() as session:
        note = session.get(NoteRow, _key(base))
        value = None if note is None else dict(note.value)
    if value is None:
        return None
    if value.pop("features") != list(FEATURES):
        _log.info("combiner_outdated", base=base)
        return None
    return Combiner(**{**value, "weights": tuple(value["weights"])})


def auroc(scores: Floats, bad: npt.ArrayLike) -> float:
    """P(score of a bad answer > score of a good one), ties half: U / (n·m) of Mann and Whitney (1947)."""
    labels = np.asarray(bad, dtype=bool)
    positive, negative = scores[labels], scores[~labels]
    return float(mannwhitneyu(positive, negative).statistic / (len(positive) * len(negative)))


def calibration_error(probabilities: Floats, bad: npt.ArrayLike) -> float:
    """Expected calibration error over ten bins, Σ |B|/n · |share bad − mean probability| in B (Guo et al. 2017)."""
    labels = np.asarray(bad, np.float64)
    index = np.minimum((probabilities * _BINS).astype(int), _BINS - 1)
    gaps = np.bincount(index, weights=labels - probabilities, minlength=_BINS)
    return float(np.abs(gaps).sum() / len(labels))


def _label(signal: Signal, learnt: Collection[str]) -> bool | None:
    if signal.feedback is not None:
        return signal.feedback == "bad"
    if signal.id in learnt:
        return True
    if signal.agreement is None or DISAGREED < signal.agreement < AGREED:
        return None
    return signal.agreement <= DISAGREED


def _design(table: Floats) -> Floats:
    """Features (n, 5) → inputs (n, 6): −ln p in nats, the abstention, and a 1 for the bias."""
    p_values, abstained = table[:, :-1], table[:, -1:]
    nats = np.where(np.isnan(p_values), 1.0, -np.log(np.clip(p_values, _FLOOR, 1)))
    return np.hstack([nats, abstained, np.ones_like(abstained)])


def _platt(labels: Bools) -> Floats:
    """Targets (n₊ + 1) / (n₊ + 2) and 1 / (n₋ + 2): they keep the fit from being surer than its labels are many."""
    positives, negatives = int(labels.sum()), int((~labels).sum())
    targets: Floats = np.where(labels, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    return targets


def _cross_fitted(design: Floats, labels: Bools) -> Floats:
    """Probabilities (n,), each by a fit to the other folds; folds hold both classes in like parts."""
    folds = np.empty(len(labels), int)
    folds[np.argsort(labels, kind="stable")] = np.arange(len(labels)) % FOLDS
    unseen = np.empty(len(labels))
    for fold in range(FOLDS):
        inside = folds == fold
        unseen[inside] = expit(design[inside] @ _newton(design[~inside], _platt(labels[~inside])))
    return unseen


def _newton(design: Floats, targets: Floats) -> Floats:
    """Weights that minimise cross-entropy + RIDGE/2 · ‖all but the bias‖², by Newton's method (IRLS)."""
    penalty = np.append(np.full(design.shape[1] - 1, RIDGE), 0.0)
    weights = np.zeros(design.shape[1])
    for _ in range(_STEPS):
        shares = expit(design @ weights)
        gradient = design.T @ (shares - targets) + penalty * weights
        hessian = (design.T * (shares * (1 - shares))) @ design + np.diag(penalty)
        step = np.linalg.solve(hessian, gradient)
        weights = weights - step
        if np.abs(step).max() < 1e-9:
            return weights
    raise SignalError(f"expected the combiner's fit to settle in {_STEPS} steps, got a last step of {step.max():.2g}")


def _key(base: str) -> str:
    return f"combiner:{base}"


__all__ = ["AGREED", "DISAGREED", "LEAST_LABELS", "Combiner", "auroc", "calibration_error", "fit", "kept", "refit"]
