"""Whether all cards are used: a loss that evens their use out, and a monitor that says when it is needed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from arrowmoe.errors import RoutingError


def load_balance_loss(probs: Tensor, chosen: Tensor) -> Tensor:
    """n · Σᵢ fᵢ Pᵢ for probs (rows, n) and chosen (rows, n) bool: Switch Transformer, arXiv:2101.03961, eq. 4 to 6.

    fᵢ is expert i's share of all choices, Pᵢ its mean probability, which alone passes a gradient. Even use gives 1.
    """
    share = chosen.sum(dim=0) / chosen.sum().clamp_min(1)
    return probs.shape[1] * (share * probs.mean(dim=0)).sum()


def gate_entropy(probs: Tensor) -> Tensor:
    """Mean entropy of the rows of probs (…, n), in nats."""
    # The clamp keeps the gradient of a probability of 0 finite.
    return -(probs * probs.clamp_min(torch.finfo(probs.dtype).tiny).log()).sum(dim=-1).mean()


class CollapseMonitor:
    """An exponential moving average of how much each card is used, and whether that has collapsed.

    It has where one card has more than `most` of all use, or where the entropy of the use is below `least_entropy` of
    its greatest, log n.
    """

    def __init__(self, *, decay: float = 0.9, most: float = 0.9, least_entropy: float = 0.5) -> None:
        if not (0 <= decay < 1 and 0 < most <= 1 and 0 <= least_entropy < 1):
            raise RoutingError(
                f"expected decay and least_entropy in [0, 1) and most in (0, 1], got {decay}, {least_entropy}, {most}"
            )
        self.marginal: Tensor | None = None
        self._decay = decay
        self._most = most
        self._least_entropy = least_entropy

    def update(self, gates: Tensor) -> None:
        """Count gates (rows, n); rows that use no card count for none."""
        used = gates.detach().float().sum(dim=0)
        if not bool(used.sum() > 0):
            return
        used = used / used.sum()
        self.marginal = used if self.marginal is None else self._decay * self.marginal + (1 - self._decay) * used

    @property
    def collapsed(self) -> bool:
        """Whether the use of the cards has collapsed; one card alone cannot, nor can what was never used."""
        if self.marginal is None or len(self.marginal) < 2:
            return False
        entropy_share = float(gate_entropy(self.marginal)) / math.log(len(self.marginal))
        return float(self.marginal.max()) > self._most or entropy_share < self._least_entropy
