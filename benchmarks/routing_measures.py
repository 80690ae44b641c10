"""What the parts of the routing benchmark share: cards described, prompts decided, decisions judged. All in percent."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from arrowmoe.features import Vectors
from arrowmoe.routing.acceptance import Acceptance, Prompts, describe
from arrowmoe.routing.closed_form import ClosedForm
from arrowmoe.routing.metrics import auroc, recall_at_false_rejection
from arrowmoe.routing.probe import Probe
from arrowmoe.routing.statistics import MIN_PROMPTS, CardStatistics
from benchmarks.routing_data import Names, Rows
from registry.manifest import MAX_STATISTICS_BYTES

Floats = npt.NDArray[np.float64]
Statistics = Mapping[str, CardStatistics]
Decided = tuple[Names, Floats]
"""The best card of each row, and its score."""
Table = dict[str, dict[str, float]]

FALSE_REJECTION = 0.05


def described(
    rows: Rows,
    probe: Probe,
    *,
    with_intents: bool = False,
    held_out: Rows | None = None,
    public: Mapping[str, Vectors] | None = None,
    min_prompts: int = MIN_PROMPTS,
    budget_bytes: int = MAX_STATISTICS_BYTES,
    seed: int = 0,
) -> dict[str, CardStatistics]:
    """Statistics of every card of `rows`, as its owner would make them."""

    def one(card: str) -> CardStatistics:
        own = rows.of(card)
        prompts = Prompts(
            vectors=own.vectors,
            labels=own.intents.tolist() if with_intents else None,
            public=None if public is None else public[card],
            held_out=None if held_out is None else held_out.of(card).vectors,
        )
        return describe(prompts, probe, min_prompts=min_prompts, budget_bytes=budget_bytes, seed=seed)

    return {card: one(card) for card in np.unique(rows.cards).tolist()}


def router(cards: Statistics) -> ClosedForm:
    """A router over `cards`."""
    form = ClosedForm(next(iter(cards.values())).dimension)
    for name, card in cards.items():
        form.add(name, card)
    return form


def decided(form: ClosedForm, x: Vectors) -> Decided:
    """The best card of each row by the path that a request takes, and its score in nats."""
    rows = form.score(x.astype(np.float64))
    return np.array([row.keys[row.values.argmax()] for row in rows]), np.array([row.values.max() for row in rows])


def fits_and_p_values(cards: Statistics, probe: Probe, x: Vectors, names: Names) -> tuple[Floats, Floats]:
    """Each row's fit (nats) to the card that `names` gives it, and the p-value of that fit."""
    fits, p_values = np.empty(len(x)), np.empty(len(x))
    for name in np.unique(names).tolist():
        acceptance, rows = Acceptance(cards[name], probe), np.flatnonzero(names == name)
        own = x[rows].astype(np.float64)
        fits[rows] = acceptance.fit(own)
        found = acceptance.p_values(own)
        p_values[rows] = np.nan if found is None else found
    return fits, p_values


def judged(inside: Decided, outside: Decided, expected: Names) -> dict[str, float]:
    """Accuracy on rows in scope; how well scores separate rows out of scope."""
    return {"accuracy": percent(inside[0] == expected), **separated(inside[1], outside[1])}


def separated(inside: Floats, outside: Floats) -> dict[str, float]:
    """AUROC, and the recall of what is out of scope where 5 % of what is in scope is rejected."""
    area, rejection = auroc(inside, outside), recall_at_false_rejection(inside, outside, FALSE_REJECTION)
    assert area is not None
    assert rejection is not None
    return {"auroc": 100 * area, "recall_at_5": 100 * rejection.recall}


def percent(hits: npt.NDArray[np.bool_]) -> float:
    """The share of true values."""
    return 100 * float(hits.mean())


def spread(values: Collection[float]) -> dict[str, float]:
    """Mean, least and greatest."""
    return {"mean": float(np.mean([*values])), "least": min(values), "greatest": max(values)}


def show(title: str, table: Mapping[str, Mapping[str, float]]) -> None:
    """Print a table for people: a line for each name, a column for each figure."""
    width = max(map(len, table))
    print(f"\n{title}")
    for name, figures in table.items():
        print(f"  {name:{width}}  " + "  ".join(f"{key} {value:.4g}" for key, value in figures.items()))


def rounded(value: Any) -> Any:
    """Figures to 5 digits, for the JSON line."""
    if isinstance(value, Mapping):
        return {key: rounded(one) for key, one in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value
