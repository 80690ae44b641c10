"""A classifier whose classes come task by task: a linear part for each task, their logits side by side."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn


class GrowingHead(nn.Module):
    """x (…, d) → logits (…, classes so far). What a part holds, no later part touches."""

    def __init__(self, d_in: int) -> None:
        super().__init__()
        self.d_in = d_in
        # Typed as what it holds, for a ModuleList does not say.
        self.parts = cast("list[nn.Linear]", nn.ModuleList())

    def grow(self, classes: int, *, like: Tensor) -> None:
        """Add a part for so many classes on the device of `like`; torch's generator draws it, as any linear layer."""
        self.parts.append(nn.Linear(self.d_in, classes, dtype=torch.float32).to(like.device))

    def forward(self, x: Tensor) -> Tensor:
        """Logits in the order in which the classes came."""
        x = x.to(torch.float32)
        return torch.cat([part(x) for part in self.parts], dim=-1)


__all__ = ["GrowingHead"]
