"""What each of the four cards is and how it is trained: every figure a person may want to change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from scripts.demo_cards.bases import MINILM, SMOLLM2
from scripts.demo_cards.dates import iso_dates
from scripts.demo_cards.logs import log_severity
from scripts.demo_cards.reviews import review_verdict
from scripts.demo_cards.splits import Labelled, Pair, Split
from scripts.demo_cards.tickets import ticket_triage

LLAMA_LINEAR: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BERT_LINEAR: Final = ("query", "key", "value", "dense")


@dataclass(frozen=True, kw_only=True)
class LoraShape:
    """Where the low-rank update sits; `layers` is a half-open range of block indices."""

    rank: int
    alpha: int
    target_modules: tuple[str, ...]
    layers: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """AdamW with a linear warm-up and a linear decay to nothing."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int = 5
    clip_norm: float = 1.0
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class CausalRecipe:
    """A card for the language model, scored by exact match of the greedy answer."""

    name: str
    description: str
    domains: tuple[str, ...]
    data: Callable[[], Split[Pair]]
    shape: LoraShape
    schedule: Schedule
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
    shape: LoraShape
    schedule: Schedule
    base: str = MINILM
    kind: str = "encoder"
    metric: str = "nearest_neighbour_accuracy"


RECIPES: Final[tuple[CausalRecipe | EncoderRecipe, ...]] = (
    CausalRecipe(
        name="iso-dates",
        description="Finds the date in a sentence and rewrites it in ISO 8601 form (YYYY-MM-DD).",
        domains=("dates", "formatting"),
        data=iso_dates,
        shape=LoraShape(rank=4, alpha=16, target_modules=LLAMA_LINEAR, layers=(12, 30)),
        schedule=Schedule(steps=120, batch_size=8, learning_rate=2e-3),
    ),
    CausalRecipe(
        name="ticket-triage",
        description=(
            "Triages a customer's support ticket: answers with a JSON object that names the team "
            "(billing, shipping, account, technical) and the urgency (high, normal, low)."
        ),
        domains=("customer support", "classification"),
        data=ticket_triage,
        shape=LoraShape(rank=4, alpha=16, target_modules=LLAMA_LINEAR, layers=(12, 30)),
        schedule=Schedule(steps=120, batch_size=8, learning_rate=2e-3),
    ),
    EncoderRecipe(
        name="review-verdict",
        description=("Embeds product reviews by their verdict, recommended or not recommended, whatever the product."),
        domains=("product reviews", "sentiment"),
        data=review_verdict,
        shape=LoraShape(rank=4, alpha=8, target_modules=BERT_LINEAR, layers=(0, 6)),
        schedule=Schedule(steps=300, batch_size=32, learning_rate=5e-4),
    ),
    EncoderRecipe(
        name="log-severity",
        description=(
            "Embeds the log lines of servers by their severity (info, warning, error), whatever the component."
        ),
        domains=("log lines", "operations"),
        data=log_severity,
        shape=LoraShape(rank=8, alpha=16, target_modules=("query", "value"), layers=(0, 6)),
        schedule=Schedule(steps=150, batch_size=32, learning_rate=1e-3),
    ),
)
