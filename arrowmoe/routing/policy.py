"""What a router does with scores: how many cards a prompt may have, when none, and whose word counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from arrowmoe.errors import RoutingError
from arrowmoe.routing.modes import MODES, Mode

CONSIDERED = 8
"""Cards per prompt that a mode with several experts looks at."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How scores become gates.

    A calibrated card is used where the prompt's p-value among its own prompts is at least `alpha`, the share of its own
    prompts that are then refused; any other card where the cosine with its nearest text is at least `threshold`; one
    that is judged by its weights alone where it moves the prompt `least_z` deviations further than is usual for it.
    Several cards share by the softmax of their scores (nats) over `temperature`; in mode `threshold` those with a share
    of at least `least_share`, at most `max_experts`.
    """

    mode: Mode = "top1"
    alpha: float = 0.05
    threshold: float = 0.30
    temperature: float = 8.0
    least_share: float = 0.3
    least_z: float = 3.0
    max_experts: int = 4

    def __post_init__(self) -> None:
        if self.mode not in MODES or self.mode == "manual":
            modes = ", ".join(mode for mode in MODES if mode != "manual")
            raise RoutingError(
                f"expected a mode out of {modes}, got {self.mode!r}", hint="name adapters to choose them"
            )
        if not 0 <= self.alpha < 1 or self.temperature <= 0 or not 1 <= self.max_experts <= CONSIDERED:
            raise RoutingError(
                f"expected 0 <= alpha < 1, temperature > 0 and 1 to {CONSIDERED} max_experts, got {self}",
            )

    @property
    def considered(self) -> int:
        """Cards per prompt whose acceptance is asked."""
        return 1 if self.mode == "top1" else CONSIDERED


@dataclass(frozen=True, kw_only=True)
class Opinion:
    """What an agent says of one prompt: the `card` (name or digest) that it would use, and how sure it is, in (0, 1).

    As a `prior` it shifts that card's score by the log odds against a uniform choice; as an `override` the card is
    used, unless it refuses the prompt itself: then the opinion is vetoed and the router's two best are used.
    """

    card: str
    confidence: float = 0.9
    use: Literal["prior", "override"] = "prior"

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1 or self.use not in ("prior", "override"):
            raise RoutingError(f"expected a confidence between 0 and 1 as prior or override, got {self}")

    def log_odds(self, cards: int) -> float:
        """Nats in favour of the card among so many: confidence against (1 − confidence) / (cards − 1) each."""
        return float(np.log(self.confidence) - np.log((1 - self.confidence) / max(cards - 1, 1)))


__all__ = ["CONSIDERED", "Opinion", "Policy"]
