"""From logits to gates: the modes, as pure differentiable functions.

Logits are (rows, n), one column per card; with `null` one more, the last, means "no card". It competes like any other
column and is dropped at the end, with whatever weight it won. A mask says which cards may be chosen, (n,) or (rows, n);
the weights of the rest are renormalised over it, and a row with nothing to choose from is a row of zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from arrowmoe.errors import GateError

Mode = Literal["top1", "top2", "soft", "threshold", "manual"]
MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass(frozen=True, kw_only=True)
class Annealing:
    """A temperature that falls geometrically from `start` to `end` in `steps` (MoLE, arXiv:2404.13628)."""

    start: float = 1.0
    end: float = 1.0
    steps: int = 1

    def __post_init__(self) -> None:
        if min(self.start, self.end) <= 0 or self.steps < 1:
            raise GateError(f"expected temperatures above 0 and at least one step, got {self}")

    def at(self, step: int) -> float:
        """The temperature at `step`; `end` from `steps` on."""
        done = min(max(step, 0), self.steps) / self.steps
        return float(self.start * (self.end / self.start) ** done)


def gate(
    logits: Tensor,
    mode: Mode,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    threshold: float = 0.3,
    max_experts: int = 4,
    null: bool = False,
    hard_gumbel: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Gates (rows, n) over the cards, from logits (rows, n), or (rows, n + 1) with `null`.

    p is the softmax over the allowed columns at `temperature`; equal values go to the lower index.

    - `top1`: exactly 1 on the largest p; its gradient is that of p (straight-through).
    - `top2`: the two largest, renormalised to sum 1.
    - `soft`: p itself; rows sum to 1 less what the null expert has.
    - `threshold`: every p of at least `threshold`, the `max_experts` largest of them, renormalised; maybe none.
    - `manual`: the logits are weights given by hand, zeroed outside the mask and otherwise left alone.

    `hard_gumbel` adds Gumbel noise to the logits, so that `top1` samples by p and trains by the straight-through
    Gumbel-softmax (Jang et al. 2017, arXiv:1611.01144). Raises `GateError`.
    """
    if mode not in MODES:
        raise GateError(f"expected a mode out of {', '.join(MODES)}, got {mode!r}")
    if mode == "manual":
        weights = logits * _allowed(logits, mask, null)
    else:
        noisy = logits + _gumbel(logits, generator) if hard_gumbel else logits
        p = probabilities(noisy, mask=mask, temperature=temperature, null=null)
        weights = _choose(p, mode, threshold, max_experts)
    return weights[:, :-1] if null else weights


def probabilities(
    logits: Tensor, *, mask: Tensor | None = None, temperature: float = 1.0, null: bool = False
) -> Tensor:
    """Softmax over the allowed columns at `temperature`, in the logits' shape; the null column, if any, is kept."""
    if temperature <= 0:
        raise GateError(f"expected a temperature above 0, got {temperature}", hint="for the sharpest choice use top1")
    allowed = _allowed(logits, mask, null)
    # The lowest finite number, not -inf: a row that is masked as a whole must have a gradient of 0, not NaN.
    scores = (logits / temperature).masked_fill(~allowed, torch.finfo(logits.dtype).min)
    return torch.softmax(scores, dim=-1) * allowed


def _choose(p: Tensor, mode: Mode, threshold: float, max_experts: int) -> Tensor:
    if mode == "soft":
        return p
    if mode == "top1":
        # p - p.detach() is exactly 0 and carries the gradient.
        return (_largest(p, 1) & (p > 0)) + (p - p.detach())
    if mode == "top2":
        return _renormalised(p * _largest(p, 2))
    if max_experts < 1:
        raise GateError(f"expected max_experts of at least 1, got {max_experts}")
    return _renormalised(p * (_largest(p, max_experts) & (p >= threshold)))


def _largest(p: Tensor, count: int) -> Tensor:
    """Where the `count` largest of each row are (bool); a stable sort gives equal values to the lower index."""
    order = torch.sort(p.detach(), dim=-1, descending=True, stable=True).indices[:, :count]
    return torch.zeros_like(p, dtype=torch.bool).scatter_(1, order, True)


def _renormalised(weights: Tensor) -> Tensor:
    """Rows that sum to 1; a row of zeros stays one."""
    return weights / weights.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)


def _allowed(logits: Tensor, mask: Tensor | None, null: bool) -> Tensor:
    """The mask as (rows, columns) bool; the null expert may always be chosen."""
    if logits.dim() != 2 or logits.shape[1] < 1 + null:
        raise GateError(f"expected logits (rows, cards{' + 1' if null else ''}), got {tuple(logits.shape)}")
    allowed = torch.ones_like(logits, dtype=torch.bool)
    if mask is None:
        return allowed
    cards = allowed[:, :-1] if null else allowed
    if mask.dtype != torch.bool or mask.shape not in (cards.shape, cards.shape[1:]):
        raise GateError(
            f"expected a bool mask {tuple(cards.shape)} or {tuple(cards.shape[1:])}, "
            f"got {mask.dtype} {tuple(mask.shape)}"
        )
    cards &= mask.to(logits.device)
    return allowed


def _gumbel(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard Gumbel noise, −log E with E ~ Exp(1)."""
    return -torch.empty_like(like).exponential_(generator=generator).log()
