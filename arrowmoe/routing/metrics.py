"""How well a router decides: figures from gates, scores and labels. Pure functions of arrays, no model, no file.

Rules: a score is higher the better a prompt fits the best card; a label is a card's index, or -1 for a prompt that no
card is for; a chosen card is an index too, or -1 where the router abstained. Entropies are in nats. A share that was
counted carries its 95 % interval; a figure that the data cannot give is None, never a made-up number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from arrowmoe.errors import RoutingError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.intp]
Bools = npt.NDArray[np.bool_]

NOBODY: Final = -1
ALPHAS: Final = (0.01, 0.05, 0.10)
Z_95: Final = 1.959963984540054
CURVE_POINTS: Final = 101
RELIABILITY_BINS: Final = 15
HISTOGRAM_BINS: Final = 40


@dataclass(frozen=True, kw_only=True)
class Proportion:
    """`count` of `total`, with Wilson's 95 % interval [`low`, `high`] (Wilson 1927)."""

    count: int
    total: int
    value: float
    low: float
    high: float

    @classmethod
    def of(cls, hits: npt.ArrayLike) -> Proportion | None:
        """The share of true values; None of none."""
        array = np.asarray(hits, dtype=bool)
        count, total = int(array.sum()), array.size
        if total == 0:
            return None
        share, shrink = count / total, 1 + Z_95**2 / total
        middle = (share + Z_95**2 / (2 * total)) / shrink
        half = Z_95 / shrink * math.sqrt(share * (1 - share) / total + Z_95**2 / (4 * total**2))
        low, high = min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half))
        return cls(count=count, total=total, value=share, low=low, high=high)


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """Rejecting scores below `threshold` rejects at most `rate` of what is in scope, and `recall` of what is not."""

    rate: float
    threshold: float
    recall: float


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """False rejections measured when p < `alpha` rejects: over all prompts in scope, and card by card."""

    alpha: float
    overall: Proportion
    by_card: tuple[Proportion | None, ...]


@dataclass(frozen=True, kw_only=True)
class ReliabilityBin:
    """The rows whose confidence is in (`low`, `high`]: their number, mean confidence and accuracy."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Expected calibration error and the bins that hold rows."""

    ece: float
    bins: tuple[ReliabilityBin, ...]


@dataclass(frozen=True, kw_only=True)
class RiskCoverage:
    """Share of errors (`risks`) among the most confident share (`coverages`) of rows, and the area under that curve."""

    coverages: tuple[float, ...]
    risks: tuple[float, ...]
    aurc: float


@dataclass(frozen=True, kw_only=True)
class ComputePoint:
    """What routing only scores >= `threshold` gives (`accuracy`) and costs (`experts` per prompt, `routed` share)."""

    threshold: float
    accuracy: float
    experts: float
    routed: float


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Counts of scores between `edges` (bins + 1), of prompts in and out of scope."""

    edges: tuple[float, ...]
    in_scope: tuple[int, ...]
    out_of_scope: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class RoutingEvaluation:
    """All figures of one router on one labelled set; `confusion` and `marginal_use` end with "no card".

    `accuracy` is that of the best card whether or not the router abstained, `routed_accuracy` that of what it did.
    """

    names: tuple[str, ...]
    rows: int
    accuracy: Proportion | None
    routed_accuracy: Proportion | None
    false_rejection: Proportion | None
    out_of_scope_rejection: Proportion | None
    auroc: float | None
    rejections: tuple[Rejection, ...]
    gate_entropy_nats: float
    marginal_use: tuple[float, ...]
    confusion: tuple[tuple[int, ...], ...]
    calibration: Calibration | None
    coverage: tuple[Coverage, ...]
    risk_coverage: RiskCoverage
    compute: tuple[ComputePoint, ...]
    histogram: Histogram
    seconds_per_decision: float | None

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values that JSON can hold."""
        return asdict(self)


def accuracy(chosen: Ints, labels: Ints) -> Proportion | None:
    """Share of the rows in scope whose chosen card is their label; None if no row is in scope."""
    known = labels != NOBODY
    return Proportion.of(chosen[known] == labels[known])


def auroc(in_scores: Floats, out_scores: Floats) -> float | None:
    """P(score in scope > score out of scope), ties half: U / (n·m) of Mann and Whitney (1947), by midranks."""
    n, m = len(in_scores), len(out_scores)
    if n == 0 or m == 0:
        return None
    _, inverse, counts = np.unique(np.concatenate([in_scores, out_scores]), return_inverse=True, return_counts=True)
    midranks = np.cumsum(counts) - (counts - 1) / 2
    return float((midranks[inverse[:n]].sum() - n * (n + 1) / 2) / (n * m))


def recall_at_false_rejection(in_scores: Floats, out_scores: Floats, rate: float) -> Rejection | None:
    """The highest threshold that rejects at most `rate` (0 <= rate < 1) of `in_scores`, and what it catches."""
    if not 0 <= rate < 1:
        raise RoutingError(f"expected a rate of false rejections in [0, 1), got {rate}")
    if len(in_scores) == 0 or len(out_scores) == 0:
        return None
    rejected = math.floor(rate * len(in_scores) + 1e-9)
    threshold = float(np.sort(in_scores)[rejected])
    return Rejection(rate=rate, threshold=threshold, recall=float((out_scores < threshold).mean()))


def gate_entropy(weights: Floats) -> float:
    """Mean entropy of the rows, each scaled to sum 1; a one-hot row and a row of zeros have 0."""
    shares = _shares(weights)
    logs = np.log(shares, where=shares > 0, out=np.zeros_like(shares))
    return abs(float((shares * logs).sum(axis=1).mean()))


def marginal_use(weights: Floats) -> Floats:
    """Mean share of each card and, last, of no card at all: (n + 1,), sums to 1."""
    shares = _shares(weights)
    return np.append(shares.mean(axis=0), 1 - shares.sum(axis=1).mean())


def confusion_matrix(labels: Ints, chosen: Ints, n: int) -> npt.NDArray[np.int64]:
    """Counts (n + 1, n + 1) of label × chosen card; the last row is out of scope, the last column abstained."""
    matrix = np.zeros((n + 1, n + 1), dtype=np.int64)
    np.add.at(matrix, (labels % (n + 1), chosen % (n + 1)), 1)
    return matrix


def calibration(confidences: Floats, correct: Bools, bins: int = RELIABILITY_BINS) -> Calibration:
    """Expected calibration error over bins of equal width, Σ |B|/n · |acc(B) − conf(B)| (Guo et al. 2017, eq. 3)."""
    if ((confidences < 0) | (confidences > 1)).any():
        raise RoutingError(f"expected confidences in [0, 1], got {confidences.min()} to {confidences.max()}")
    index = np.clip(np.ceil(confidences * bins).astype(int) - 1, 0, bins - 1)
    rows = [(at, index == at) for at in range(bins) if (index == at).any()]
    filled = tuple(
        ReliabilityBin(
            low=at / bins,
            high=(at + 1) / bins,
            count=int(inside.sum()),
            confidence=float(confidences[inside].mean()),
            accuracy=float(correct[inside].mean()),
        )
        for at, inside in rows
    )
    ece = sum(part.count * abs(part.accuracy - part.confidence) for part in filled) / max(1, len(confidences))
    return Calibration(ece=ece, bins=filled)


def coverage(p_values: Floats, labels: Ints, n: int, alpha: float) -> Coverage | None:
    """False rejections at `alpha` of the rows in scope, overall and by the label's card; None without such rows."""
    rejected = p_values < alpha
    overall = Proportion.of(rejected[labels != NOBODY])
    if overall is None:
        return None
    return Coverage(
        alpha=alpha,
        overall=overall,
        by_card=tuple(Proportion.of(rejected[labels == card]) for card in range(n)),
    )


def risk_coverage(scores: Floats, correct: Bools, points: int = CURVE_POINTS) -> RiskCoverage:
    """Selective risk by coverage and AURC, its mean over all coverages (Geifman & El-Yaniv 2017; Geifman et al. 2019).

    Rows of equal score share their mean loss, which is the expectation over their order. The curve keeps `points`.
    """
    _, inverse, counts = np.unique(-scores, return_inverse=True, return_counts=True)
    losses = np.bincount(inverse, weights=~correct) / counts
    risks = np.cumsum(losses[np.sort(inverse)]) / np.arange(1, len(scores) + 1)
    kept = np.unique(np.linspace(0, len(scores) - 1, min(points, len(scores))).round().astype(int))
    return RiskCoverage(
        coverages=tuple(((kept + 1) / len(scores)).tolist()),
        risks=tuple(risks[kept].tolist()),
        aurc=float(risks.mean()),
    )


def performance_against_compute(
    scores: Floats, experts: Ints, chosen: Ints, labels: Ints, points: int = 21
) -> tuple[ComputePoint, ...]:
    """Accuracy and cost at thresholds from routing every row to routing none, at even quantiles of the scores.

    A row is right if it goes to its own card, or is out of scope and goes to none; an unrouted row uses no expert.
    """
    quantiles = np.quantile(scores, np.linspace(0, 1, points), method="lower")
    thresholds = np.unique([*quantiles, np.nextafter(scores.max(), np.inf)])
    return tuple(
        ComputePoint(
            threshold=float(threshold),
            accuracy=float((np.where(scores >= threshold, chosen, NOBODY) == labels).mean()),
            experts=float((experts * (scores >= threshold)).mean()),
            routed=float((scores >= threshold).mean()),
        )
        for threshold in thresholds
    )


def histogram(in_scores: Floats, out_scores: Floats, bins: int = HISTOGRAM_BINS) -> Histogram:
    """Both kinds of scores counted between the same edges."""
    edges = np.histogram_bin_edges(np.concatenate([in_scores, out_scores]), bins)
    return Histogram(
        edges=tuple(edges.tolist()),
        in_scope=tuple(np.histogram(in_scores, edges)[0].tolist()),
        out_of_scope=tuple(np.histogram(out_scores, edges)[0].tolist()),
    )


def evaluate(
    names: Sequence[str],
    weights: npt.ArrayLike,
    scores: npt.ArrayLike,
    p_values: npt.ArrayLike | None,
    labels: npt.ArrayLike,
    *,
    best: npt.ArrayLike | None = None,
    confidences: npt.ArrayLike | None = None,
    alphas: Sequence[float] = ALPHAS,
    seconds: float | None = None,
) -> RoutingEvaluation:
    """Every figure of gates `weights` (rows, n cards), zero where the router abstained; the rest is one per row.

    `best` is the card of each row before abstaining (default: the heaviest gate); `confidences` are its probabilities
    of being right (default: the heaviest gate of rows that are routed, if any gate is soft); `seconds` is what all
    decisions took together. Risk and performance count every row; answering one that is out of scope is an error.
    Raises `RoutingError` for arrays that do not fit each other and for numbers that are not finite.
    """
    gates, fit, truth = np.asarray(weights, np.float64), np.asarray(scores, np.float64), np.asarray(labels, np.intp)
    _check(gates, truth, len(names), scores=fit, p_values=p_values, best=best, confidences=confidences)
    routed = (gates != 0).any(axis=1)
    chosen = np.where(routed, _heaviest(gates), NOBODY)
    first = chosen if best is None else np.asarray(best, np.intp)
    known = truth != NOBODY
    correct = known & (first == truth)
    inside, outside = fit[known], fit[~known]
    experts = np.maximum((gates != 0).sum(axis=1), first != NOBODY).astype(np.intp)
    rejections = [recall_at_false_rejection(inside, outside, alpha) for alpha in alphas]
    covered = [] if p_values is None else [coverage(np.asarray(p_values), truth, len(names), a) for a in alphas]
    return RoutingEvaluation(
        names=tuple(names),
        rows=len(fit),
        accuracy=accuracy(first, truth),
        routed_accuracy=accuracy(chosen, truth),
        false_rejection=Proportion.of(~routed[known]),
        out_of_scope_rejection=Proportion.of(~routed[~known]),
        auroc=auroc(inside, outside),
        rejections=tuple(found for found in rejections if found is not None),
        gate_entropy_nats=gate_entropy(gates),
        marginal_use=tuple(marginal_use(gates).tolist()),
        confusion=tuple(map(tuple, confusion_matrix(truth, chosen, len(names)).tolist())),
        calibration=_calibration(gates, confidences, known, correct),
        coverage=tuple(found for found in covered if found is not None),
        risk_coverage=risk_coverage(fit, correct),
        compute=performance_against_compute(fit, experts, first, truth),
        histogram=histogram(inside, outside),
        seconds_per_decision=None if seconds is None else seconds / len(fit),
    )


def _shares(weights: Floats) -> Floats:
    """Rows scaled to sum 1; rows of zeros stay."""
    totals = np.abs(weights).sum(axis=1, keepdims=True)
    shares: Floats = np.divide(np.abs(weights), totals, where=totals > 0, out=np.zeros_like(weights))
    return shares


def _heaviest(weights: Floats) -> Ints:
    return weights.argmax(axis=1) if weights.shape[1] else np.full(len(weights), NOBODY)


def _calibration(
    weights: Floats, confidences: npt.ArrayLike | None, known: Bools, correct: Bools
) -> Calibration | None:
    """Calibration on the rows `known`; gates serve as confidences if they are probabilities and not only 0 and 1."""
    outside, hard = ((weights < 0) | (weights > 1)).any(), np.isin(weights, (0.0, 1.0)).all()
    if confidences is None and not outside and not hard:
        confidences, known = weights.max(axis=1), known & (weights != 0).any(axis=1)
    if confidences is None or not known.any():
        return None
    return calibration(np.asarray(confidences, np.float64)[known], correct[known])


def _check(weights: Floats, labels: Ints, n: int, **columns: npt.ArrayLike | None) -> None:
    rows = len(labels)
    if rows == 0 or weights.shape != (rows, n) or not np.isfinite(weights).all():
        raise RoutingError(f"expected finite weights ({max(rows, 1)}, {n}) for {rows} labels, got {weights.shape}")
    if labels.min() < NOBODY or labels.max() >= n:
        raise RoutingError(f"expected labels in [-1, {n}), got {labels.min()} to {labels.max()}")
    for name, column in columns.items():
        if column is not None and (np.shape(column) != (rows,) or not np.isfinite(column).all()):
            raise RoutingError(
                f"expected {rows} finite {name}, got shape {np.shape(column)} or a NaN or infinity in it"
            )
