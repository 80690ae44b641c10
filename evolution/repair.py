"""Repair before reject: a candidate that lifts but drifts is tried at smaller scales, then trained again with replay.

Only a candidate whose lift has passed at full scale is tried again, so an idle one gets no second chance at the lift
and alpha is spent once. The drift's bounds, though, are looked at once per probe.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, Literal

from evolution.gate import Bars, Results, Verdict, judge
from registry.logs import get_logger

PROBES: Final = 3

Step = Literal["publish", "retrain", "reject"]

log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Repaired:
    """What to do, on what verdict, at which scale; "retrain" asks for a training with more replay.

    The evidence of a verdict that took probes lists them all under `probes`.
    """

    step: Step
    verdict: Verdict
    scale: float = 1.0


def repaired(measure: Callable[[float], Results], verdict: Verdict, bars: Bars, *, probes: int = PROBES) -> Repaired:
    """Bisect the scale in (0, 1] for the largest that passes; `verdict` is of scale 1.

    A probe that drifts sends the next one down, any other one up. Where drift and lift are not monotone in the scale
    this may miss a better one, but what it gives has passed.
    """
    if not verdict.repairable:
        return Repaired(step="publish" if verdict.accepted else "reject", verdict=verdict)
    low, high = 0.0, 1.0
    tried, best = [(high, verdict)], None
    for _ in range(probes):
        scale = (low + high) / 2
        found = judge(measure(scale), bars)
        tried.append((scale, found))
        log.info("probed scale", scale=scale, accepted=found.accepted, reasons=found.reasons)
        low, high = (low, scale) if found.drift else (scale, high)
        best = (scale, found) if found.accepted else best
    scale, found = best or tried[0]
    seen = [{"scale": at, "accepted": one.accepted, "reasons": list(one.reasons)} for at, one in tried]
    return Repaired(
        step="publish" if best else "retrain",
        verdict=replace(found, evidence={**found.evidence, "probes": seen}),
        scale=scale,
    )


__all__ = ["PROBES", "Repaired", "Step", "repaired"]
