"""The optimiser both kinds of card are trained with."""

from __future__ import annotations

from typing import Any

import torch

from scripts.demo_cards.recipes import Schedule


class Optimiser:
    """AdamW on the trainable weights, clipped, with a linear warm-up and decay."""

    def __init__(self, model: Any, schedule: Schedule) -> None:
        self._schedule = schedule
        self._weights = [weight for weight in model.parameters() if weight.requires_grad]
        self._adamw = torch.optim.AdamW(self._weights, lr=schedule.learning_rate, weight_decay=0.0, betas=(0.9, 0.99))
        self._decay = torch.optim.lr_scheduler.LambdaLR(self._adamw, self._factor)

    def step(self, loss: torch.Tensor) -> None:
        """One descent on `loss`; gradients are cleared after it."""
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self._weights, self._schedule.clip_norm)
        self._adamw.step()
        self._decay.step()
        self._adamw.zero_grad(set_to_none=True)

    def _factor(self, step: int) -> float:
        warm = (step + 1) / self._schedule.warmup_steps
        left = (self._schedule.steps - step) / self._schedule.steps
        return min(warm, left)
