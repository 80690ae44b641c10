"""What each of the four cards is and how it is trained: every figure a person may want to change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from evolution.fine_tuning import FineTuning
from scripts.demo_cards.bases import MINILM, SMOLLM2
from scripts.demo_cards.dates import iso_dates
from scripts.demo_cards.logs import log_severity
from scripts.demo_cards.reviews import review_verdict
from scripts.demo_cards.splits import Labelled, Pair, Split
from scripts.demo_cards.tickets import ticket_triage

BERT_LINEAR: Final = ("query", "key", "value", "dense")


@dataclass(frozen=True, kw_only=True)
class CausalRecipe:
    """A card for the language model, scored by exact match of the greedy answer."""

    name: str
    description: str
    domains: tuple[str, ...]
    data: Callable[[], Split[Pair]]
    tuning: FineTuning
    base: str = SMOLLM2
    kind: str = "causal"
    metric: str = "exact_match"


@dataclass(frozen=True, kw_only=True)
class EncoderRecipe:
    """A card for the sentence encoder, scored by the label of the nearest reference text."""

    name: str
    description: str
    domains: tuple[str, ...]
    data: Callable[[], Split[Labelled]]
    tuning: FineTuning
    base: str = MINILM
    kind: str = "encoder"
    metric: str = "nearest_neighbour_accuracy"


RECIPES: Final[tuple[CausalRecipe | EncoderRecipe, ...]] = (
    CausalRecipe(
        name="iso-dates",
        description="Finds the date in a sentence and rewrites it in ISO 8601 form (YYYY-MM-DD).",
        domains=("dates", "formatting"),
        data=iso_dates,
        tuning=FineTuning(rank=4, alpha=16, layers=(12, 30), steps=120, batch_size=8, learning_rate=2e-3),
    ),
    CausalRecipe(
        name="ticket-triage",
        description=(
            "Triages a customer's support ticket: answers with a JSON object that names the team "
            "(billing, shipping, account, technical) and the urgency (high, normal, low)."
        ),
        domains=("customer support", "classification"),
        data=ticket_triage,
        tuning=FineTuning(rank=4, alpha=16, layers=(12, 30), steps=120, batch_size=8, learning_rate=2e-3),
    ),
    EncoderRecipe(
        name="review-verdict",
        description=("Embeds product reviews by their verdict, recommended or not recommended, whatever the product."),
        domains=("product reviews", "sentiment"),
        data=review_verdict,
        tuning=FineTuning(
            rank=4, alpha=8, targets=BERT_LINEAR, layers=(0, 6), steps=300, batch_size=32, learning_rate=5e-4
        ),
    ),
    EncoderRecipe(
        name="log-severity",
        description=(
            "Embeds the log lines of servers by their severity (info, warning, error), whatever the component."
        ),
        domains=("log lines", "operations"),
        data=log_severity,
        tuning=FineTuning(
            rank=8, alpha=16, targets=("query", "value"), layers=(0, 6), steps=150, batch_size=32, learning_rate=1e-3
        ),
    ),
)
