"""Dissonance: how surely a request was answered badly, from what the request itself told. Pure functions, no I/O.

Tier 0 costs nothing: the router's p-value, and how far up the tail of ordinary answers −log P of the whole answer and
its mean per token lie. Tier 1 asks again: how far samples agree. Feedback overrules both. The entropy of the first
token, or the highest of all, is not used: measured, it separates little.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import numpy as np
from scipy.special import gammainc

from evolution.protocols import Floats, Reply
from evolution.signals import Signal

FEATURES: Final = ("router", "sequence", "mean", "agreement", "abstained")
"""Columns of `features`: four p-values, NaN where unknown, and 1 for an abstention."""

LEAST_REFERENCE: Final = 20
"""A quantile among fewer answers says too little; more of the base's are taken then."""
ABSTAINED_P: Final = 0.05
"""P-value of an abstention by a router that gave none."""
_FLOOR: Final = 1e-6
_NONE: Final = np.empty((0, 2))

Combine = Callable[[Floats], Floats]
"""Features (n, 5) → probabilities (n,) of a bad answer."""


def features(signals: Sequence[Signal]) -> Floats:
    """What tier 0 and tier 1 know of each signal (n, 5), the columns as in `FEATURES`.

    An answer's tail is (1 + #{as high or higher among the others of its reference}) / (1 + their number): a conformal
    p-value (Vovk et al. 2005). Its reference are ordinary answers of the same base, card and length (by powers of 2),
    or, where those are fewer than `LEAST_REFERENCE`, of the same base and length, of the base, and at last all answers
    of the base that nobody called bad.
    """
    references = _references(signals)
    return np.array([_features(signal, references) for signal in signals]).reshape(len(signals), len(FEATURES))


def fisher(table: Floats) -> Floats:
    """Dissonance (n,) in [0, 1] from features, where no combiner is fitted: 1 − p of Fisher's method (1932).

    −2 Σ ln pᵢ is χ² of 2k degrees for k independent p-values: the router's (`ABSTAINED_P` for an abstention without),
    the answer's, and the agreement in its place as one. The answer's two tails hang together, so they go in as twice
    their mean, a p-value however they depend (Rüschendorf 1982; Vovk & Wang 2020, arXiv:1212.4966). With nothing
    known it is 0.5.
    """
    router = np.where(np.isnan(table[:, 0]) & (table[:, 4] == 1), ABSTAINED_P, table[:, 0])
    answer = np.minimum(1, table[:, 1] + table[:, 2])
    p_values = np.clip(np.stack([router, answer, table[:, 3]], axis=1), _FLOOR, 1)
    known = (~np.isnan(p_values)).sum(axis=1)
    half_chi2 = -np.nansum(np.log(p_values), axis=1)
    return np.where(known > 0, gammainc(np.maximum(known, 1), half_chi2), 0.5)


def dissonance(signals: Sequence[Signal], *, combine: Combine = fisher) -> Floats:
    """How surely each signal was answered badly (n,), in [0, 1]; the owner's word makes it 1 or 0.

    All signals of a base should be given at once: each is measured against the ordinary ones among them.
    """
    verdicts = np.array([{"bad": 1.0, "good": 0.0}.get(signal.feedback or "", np.nan) for signal in signals])
    return np.where(np.isnan(verdicts), combine(features(signals)), verdicts)


def worst(signals: Sequence[Signal], scores: Floats, *, share: float = 0.2) -> list[Signal]:
    """The share of `signals` to look at again in tier 1: the highest scores among those without feedback."""
    open_ = [at for at, signal in enumerate(signals) if signal.feedback is None]
    ranked = sorted(open_, key=lambda at: -scores[at])
    return [signals[at] for at in ranked[: math.ceil(share * len(signals))]]


def agreement(samples: Sequence[Reply], matches: Callable[[str, str], bool]) -> float:
    """Share of the samples in the largest class of equal meaning × mean probability per token within it, in [0, 1].

    Self-consistency (Wang et al. 2022, arXiv:2203.11171) over classes as in semantic entropy (Kuhn et al. 2023,
    arXiv:2302.09664); a sample joins the first class whose first member it `matches`. An empty answer counts 0.
    """
    classes: list[list[Reply]] = []
    for sample in samples:
        for members in classes:
            if matches(members[0].text, sample.text):
                members.append(sample)
                break
        else:
            classes.append([sample])
    largest = max(classes, key=len, default=[])
    return sum(math.exp(-sample.mean_nats) for sample in largest if sample.tokens) / max(1, len(samples))


Key = tuple[str | int | None, ...]
References = dict[Key, Floats]
"""Rows (m, 2), each column sorted, of −log P and its mean per token, by base, card and length."""

_ALL: Final = 3


def _answer(signal: Signal) -> tuple[float, float] | None:
    if signal.sequence_nats is None or not signal.tokens:
        return None
    return signal.sequence_nats, signal.sequence_nats / signal.tokens


def _keys(signal: Signal) -> tuple[Key, ...]:
    """The references that a signal may be measured against, the closest first."""
    base, length = signal.base, (signal.tokens or 0).bit_length()
    return (0, base, signal.card, length), (1, base, length), (2, base), (_ALL, base)


def _belongs(signal: Signal, key: Key) -> bool:
    """Whether a reference holds the signal: ordinary answers only, but for the last, which holds all not called bad."""
    return signal.ordinary or (key[0] == _ALL and signal.feedback != "bad")


def _references(signals: Sequence[Signal]) -> References:
    rows: dict[Key, list[tuple[float, float]]] = defaultdict(list)
    for signal in signals:
        answer = _answer(signal)
        if answer is not None:
            for key in filter(partial(_belongs, signal), _keys(signal)):
                rows[key].append(answer)
    return {key: np.sort(np.array(found), axis=0) for key, found in rows.items()}


def _features(signal: Signal, references: References) -> list[float]:
    p_value = math.nan if signal.p_value is None else signal.p_value
    agreed = math.nan if signal.agreement is None else signal.agreement
    return [p_value, *_tails(signal, references), agreed, float(not signal.accepted)]


def _tails(signal: Signal, references: References) -> tuple[float, float]:
    answer = _answer(signal)
    if answer is None:
        return math.nan, math.nan
    for key in _keys(signal):
        reference = references.get(key, _NONE)
        if len(reference) >= LEAST_REFERENCE or (key[0] == _ALL and len(reference)):
            own = _belongs(signal, key)
            return _tail(reference[:, 0], answer[0], own), _tail(reference[:, 1], answer[1], own)
    return math.nan, math.nan


def _tail(reference: Floats, value: float, own: bool) -> float:
    """Upper tail of `value` among a sorted reference; its `own` row there is not another."""
    above = len(reference) - int(np.searchsorted(reference, value, side="left"))
    return (above + (not own)) / (len(reference) + (not own))


__all__ = [
    "ABSTAINED_P",
    "FEATURES",
    "LEAST_REFERENCE",
    "Combine",
    "agreement",
    "dissonance",
    "features",
    "fisher",
    "worst",
]
