"""A head that grows: logits side by side, and what was there stays bit for bit."""

from __future__ import annotations

import torch
from torch.nn import functional

from evolution.growing_head import GrowingHead


def test_logits_of_all_parts_stand_in_the_order_in_which_they_came() -> None:
    head, x = GrowingHead(5), torch.randn(3, 5)
    head.grow(2, like=x)
    first = head(x)
    head.grow(3, like=x)
    assert head(x).shape == (3, 5)
    assert torch.equal(head(x)[:, :2], first)
    last = head.parts[1]
    assert torch.equal(head(x)[:, 2:], functional.linear(x, last.weight, last.bias))
