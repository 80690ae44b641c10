"""The gate: may a candidate be published? Pure functions of what an exam has measured; no model, no file.

A candidate passes if it *lifts*, better than the base and than what the router serves today on held-out items of its
gap (exact McNemar and a paired bootstrap), and *holds*, no worse on anchors and general text than stated bounds. A
lift against both is an intersection-union test, so neither pays for the other (Berger 1982). Anchors and losses are
judged by the bad end of a one-sided 95 % interval: what cannot be ruled out counts. Points are hundredths.

Both ends are judged *as served*, where the router decides who gets the candidate, and, more loosely, *applied* to all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from scipy import special

from evolution.errors import EvolutionError
from evolution.paired import least_difference, lift_interval, mcnemar, telling_items, upper_mean
from evolution.protocols import Floats

Bools = npt.NDArray[np.bool_]

SPENDING_EXPONENT: Final = 1.6


@dataclass(frozen=True, kw_only=True, eq=False)
class Anchored:
    """Which items (n,) of one anchor are answered right.

    By the bare base, as served today, as served with the candidate among the cards, by the candidate on every item.
    """

    base: Bools
    today: Bools
    served: Bools
    applied: Bools

    def __post_init__(self) -> None:
        _check_rows(self)


@dataclass(frozen=True, kw_only=True, eq=False)
class Losses:
    """Mean NLL of general texts (n,), in nats per token, by the same four; `kl` is KL(base ‖ candidate) on them."""

    base: Floats
    today: Floats
    served: Floats
    applied: Floats
    kl: Floats

    def __post_init__(self) -> None:
        _check_rows(self)


@dataclass(frozen=True, kw_only=True, eq=False)
class Results:
    """What an exam has measured of a candidate at `scale`; an encoder has no `losses`.

    `base`, `incumbent` (as served today) and `candidate` say which held-out items (n,) of the gap are answered right,
    `routed` which of them the router would give to the candidate.
    """

    base: Bools
    incumbent: Bools
    candidate: Bools
    routed: Bools
    anchors: Mapping[str, Anchored]
    losses: Losses | None
    scale: float = 1.0

    def __post_init__(self) -> None:
        _check_rows(self)


@dataclass(frozen=True, kw_only=True)
class Bars:
    """What a candidate must clear; `alpha` is tonight's (see `AlphaSpending`).

    `least_items` counts items and texts each. Margins bound how far the accuracy on anchors may fall, as served and
    applied to all; rises are of the mean NLL.
    """

    alpha: float
    least_items: int = 20
    least_lift_points: float = 5.0
    least_routed: float = 0.5
    margin_points: float = 5.0
    applied_margin_points: float = 15.0
    most_rise_nats: float = 0.02
    most_applied_rise_nats: float = 0.1
    most_kl_nats: float = 0.2
    draws: int = 2_000
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise EvolutionError(f"expected an alpha between 0 and 1, got {self.alpha}, so nothing can be tested")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A candidate against another on the same items: the lift in points, its 95 % interval, McNemar's p-value."""

    items: int
    gains: int
    losses: int
    lift_points: float
    low_points: float
    high_points: float
    p_value: float


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Every reason against a candidate, in words, by kind; `evidence` holds only what JSON can."""

    too_few: tuple[str, ...]
    no_lift: tuple[str, ...]
    drift: tuple[str, ...]
    evidence: Mapping[str, Any]

    @property
    def reasons(self) -> tuple[str, ...]:
        """All of them."""
        return self.too_few + self.no_lift + self.drift

    @property
    def accepted(self) -> bool:
        """Whether nothing speaks against the candidate."""
        return not self.reasons

    @property
    def tested(self) -> bool:
        """Whether there was enough to tell; if not, no alpha was spent."""
        return not self.too_few

    @property
    def repairable(self) -> bool:
        """Whether the lift is there and only the drift is too large."""
        return bool(self.drift) and not self.too_few and not self.no_lift

    def to_json(self) -> dict[str, Any]:
        """The evidence, with what follows from it, as plain values that JSON can hold."""
        return {"accepted": self.accepted, "reasons": list(self.reasons), **self.evidence}


def judge(exam: Results, bars: Bars) -> Verdict:
    """Whether the candidate passes, with every figure that says so."""
    others = {"base": exam.base}
    if not np.array_equal(exam.base, exam.incumbent):
        others["incumbent"] = exam.incumbent
    against = {name: compare(exam.candidate, other, bars) for name, other in others.items()}
    routed = float(exam.routed.mean()) if exam.routed.size else 0.0
    items = max(bars.least_items, math.ceil(-math.log2(bars.alpha)))
    held = judge_drift(exam, bars)
    return replace(
        held,
        too_few=_fewer("held-out items", len(exam.candidate), items) + held.too_few,
        no_lift=_no_lift(against, routed, bars),
        evidence={
            "accuracy": {name: _share(right) for name, right in (*others.items(), ("candidate", exam.candidate))},
            "against": {name: asdict(found) for name, found in against.items()},
            "routed": routed,
            **held.evidence,
        },
    )


def judge_drift(exam: Results, bars: Bars) -> Verdict:
    """Only whether anchors and losses hold, as a peer asks of a card that another node has published."""
    anchors, fallen = _judge_anchors(exam.anchors, bars) if exam.anchors else ({}, ())
    losses, risen = ({}, ()) if exam.losses is None else _judge_losses(exam.losses, bars)
    count = sum(len(anchor.base) for anchor in exam.anchors.values())
    # An encoder that nobody gave anchors is held by what the router takes from others (`evolution.skill_distiller`).
    asked = bool(exam.anchors) or exam.losses is not None
    few = _fewer("anchors", count, telling_items(bars.margin_points / 100)) if asked else ()
    few_texts = () if exam.losses is None else _fewer("texts", len(exam.losses.base), bars.least_items)
    return Verdict(
        too_few=few + few_texts,
        no_lift=(),
        drift=fallen + risen,
        evidence={"scale": exam.scale, "bars": asdict(bars), "anchors": anchors, "losses": losses},
    )


def compare(candidate: Bools, other: Bools, bars: Bars) -> Comparison:
    """Paired figures of two ways to answer the same items (n,)."""
    items, gains, losses = _discordant(candidate, other)
    low, high = lift_interval(gains, losses, items, draws=bars.draws, seed=bars.seed)
    return Comparison(
        items=items,
        gains=gains,
        losses=losses,
        lift_points=100 * (gains - losses) / max(1, items),
        low_points=100 * low,
        high_points=100 * high,
        p_value=mcnemar(gains, losses),
    )


@dataclass(frozen=True, kw_only=True)
class AlphaSpending:
    """How much alpha each test may take, so that of all published cards at most a share `alpha` is expected to be idle.

    LORD++ (Ramdas et al. 2017, arXiv:1710.00499, §3): test t of an endless line may take
    α_t = γ_t α/2 + γ_{t−τ₁} α/2 + α Σ_{j≥2} γ_{t−τ_j}, τ_j being the tests that passed and γ_j ∝ j^−1.6 summing to 1.
    It bounds the marginal false discovery rate, whatever else, such as a drift, keeps a candidate from passing.
    """

    alpha: float = 0.05
    tests: int = 0
    passed: tuple[int, ...] = ()

    @property
    def tonight(self) -> float:
        """The level of the next test."""
        at = self.tests + 1
        returned = [_gamma(at - passed) for passed in self.passed]
        return self.alpha * (_gamma(at) / 2 + sum(returned[:1]) / 2 + sum(returned[1:]))

    def after(self, verdict: Verdict) -> AlphaSpending:
        """What is left for the next test; a verdict on too few items has spent nothing."""
        if not verdict.tested:
            return self
        at = self.tests + 1
        return AlphaSpending(alpha=self.alpha, tests=at, passed=(*self.passed, at) if verdict.accepted else self.passed)

    def to_json(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return asdict(self) | {"passed": list(self.passed)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> AlphaSpending:
        """What `to_json` gave."""
        return cls(alpha=value["alpha"], tests=value["tests"], passed=tuple(value["passed"]))


def _fewer(what: str, count: int, least: int) -> tuple[str, ...]:
    return (f"expected at least {least} {what}, got {count}, so it is too few to tell",) if count < least else ()


def _no_lift(against: Mapping[str, Comparison], routed: float, bars: Bars) -> tuple[str, ...]:
    reasons = [reason for name, found in against.items() for reason in _not_above(name, found, bars)]
    if routed < bars.least_routed:
        reasons.append(
            f"the router gives it only {routed:.0%} of its own held-out items, below {bars.least_routed:.0%}"
        )
    return tuple(reasons)


def _not_above(name: str, found: Comparison, bars: Bars) -> list[str]:
    reasons = []
    if found.p_value > bars.alpha:
        reasons.append(
            f"against {name}: {found.gains} gained and {found.losses} lost of {found.items} items "
            f"could be chance, p = {found.p_value:.2g} > alpha {bars.alpha:.2g}"
        )
    if found.lift_points < bars.least_lift_points:
        reasons.append(
            f"against {name}: a lift of {found.lift_points:.1f} points, below the least of {bars.least_lift_points:g}"
        )
    if found.low_points <= 0:
        reasons.append(f"against {name}: the lift may be as low as {found.low_points:.1f} points")
    return reasons


def _judge_anchors(anchors: Mapping[str, Anchored], bars: Bars) -> tuple[dict[str, Any], tuple[str, ...]]:
    served = {name: (anchor.today, anchor.served) for name, anchor in anchors.items()}
    applied = {name: (anchor.base, anchor.applied) for name, anchor in anchors.items()}
    as_served, fallen = _judge_falls("served", served, bars.margin_points)
    as_applied, more = _judge_falls("applied", applied, bars.applied_margin_points)
    return {"served": as_served, "applied": as_applied}, (*fallen, *more)


def _judge_falls(
    how: str, pairs: Mapping[str, tuple[Bools, Bools]], margin_points: float
) -> tuple[dict[str, Any], list[str]]:
    """All anchors together by the interval; each by itself, being too small for one, by its plain difference."""
    counts = {name: _discordant(after, before) for name, (before, after) in pairs.items()}
    falls = {name: 100 * (losses - gains) / max(1, items) for name, (items, gains, losses) in counts.items()}
    items, gains, losses = (sum(column) for column in zip(*counts.values(), strict=True)) if counts else (0, 0, 0)
    low = 100 * least_difference(gains, losses, items)
    reasons = [
        f"anchor {name}, {how}: fell by {fall:.1f} points, the margin is {margin_points:g}"
        for name, fall in falls.items()
        if fall > margin_points
    ]
    if low <= -margin_points:
        reasons.append(
            f"anchors, {how}: {gains} gained and {losses} lost of {items}, which may be a fall of {-low:.1f} points; "
            f"the margin is {margin_points:g}"
        )
    sets = {
        name: {"items": counts[name][0], "before": _share(before), "after": _share(after)}
        for name, (before, after) in pairs.items()
    }
    return {"sets": sets, "items": items, "gains": gains, "losses": losses, "low_points": low}, reasons


def _judge_losses(losses: Losses, bars: Bars) -> tuple[dict[str, Any], tuple[str, ...]]:
    rows = {
        "served_rise_nats": ("the rise of the NLL as served", losses.served - losses.today, bars.most_rise_nats),
        "applied_rise_nats": (
            "the rise of the NLL, applied",
            losses.applied - losses.base,
            bars.most_applied_rise_nats,
        ),
        "applied_kl_nats": ("the KL divergence, applied,", losses.kl, bars.most_kl_nats),
    }
    evidence: dict[str, Any] = {"texts": len(losses.base)}
    reasons: tuple[str, ...] = ()
    for name, (words, values, most) in rows.items():
        mean, high = float(values.mean()) if len(values) else math.nan, upper_mean(values)
        evidence[name] = {"mean": _finite(mean), "high": _finite(high)}
        if high > most:
            reasons += (f"{words} may be {high:.3f} nats per token, over {most:g}",)
    return evidence, reasons


def _discordant(after: Bools, before: Bools) -> tuple[int, int, int]:
    """Items, gains, losses."""
    return len(after), int((after & ~before).sum()), int((before & ~after).sum())


def _share(right: Bools) -> float | None:
    return float(right.mean()) if len(right) else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _gamma(j: int) -> float:
    return float(j**-SPENDING_EXPONENT / special.zeta(SPENDING_EXPONENT))


def _check_rows(arms: Anchored | Losses | Results) -> None:
    columns = {field.name: getattr(arms, field.name) for field in fields(arms)}
    shapes = {name: value.shape for name, value in columns.items() if isinstance(value, np.ndarray)}
    if len(set(shapes.values())) != 1:
        raise EvolutionError(f"expected one value per item in every column, got {shapes}, so they cannot be paired")


__all__ = [
    "AlphaSpending",
    "Anchored",
    "Bars",
    "Comparison",
    "Losses",
    "Results",
    "Verdict",
    "compare",
    "judge",
    "judge_drift",
]
