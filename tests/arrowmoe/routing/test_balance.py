"""Balance against plain loops, and when a collapse is one."""

from __future__ import annotations

import math

import pytest
import torch

from arrowmoe.errors import RoutingError
from arrowmoe.routing.balance import CollapseMonitor, gate_entropy, load_balance_loss


def test_load_balance_loss_equals_switch_transformers_equations() -> None:
    probs = torch.softmax(torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    rows = probs.tolist()
    best = [max(range(4), key=row.__getitem__) for row in rows]
    f = [sum(own == i for own in best) / 20 for i in range(4)]
    p = [sum(row[i] for row in rows) / 20 for i in range(4)]
    chosen = torch.nn.functional.one_hot(torch.tensor(best), 4).bool()
    assert float(load_balance_loss(probs, chosen)) == pytest.approx(4 * sum(a * b for a, b in zip(f, p, strict=True)))


def test_even_use_gives_one_and_a_collapse_gives_n() -> None:
    even = torch.full((8, 4), 0.25)
    assert float(load_balance_loss(even, torch.eye(4).repeat(2, 1).bool())) == pytest.approx(1)
    one = torch.tensor([[1.0, 0, 0, 0]]).repeat(8, 1)
    assert float(load_balance_loss(one, one.bool())) == pytest.approx(4)


def test_nothing_chosen_has_no_loss() -> None:
    assert float(load_balance_loss(torch.full((2, 3), 1 / 3), torch.zeros(2, 3, dtype=torch.bool))) == 0


def test_entropy_is_in_nats_with_a_finite_gradient_at_zero() -> None:
    probs = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]], requires_grad=True)
    entropy = gate_entropy(probs)
    entropy.backward()  # type: ignore[no-untyped-call]
    assert entropy.item() == pytest.approx(1.5 * math.log(2) / 2)
    assert probs.grad is not None
    assert probs.grad.isfinite().all()


def test_the_monitor_averages_use_and_names_a_collapse() -> None:
    monitor = CollapseMonitor(decay=0.5, most=0.8, least_entropy=0.0)
    assert not monitor.collapsed
    monitor.update(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert not monitor.collapsed
    monitor.update(torch.tensor([[1.0, 0.0]]))
    assert monitor.marginal is not None
    assert monitor.marginal.tolist() == [0.75, 0.25]
    assert not monitor.collapsed
    monitor.update(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    assert monitor.collapsed


def test_low_entropy_is_a_collapse_though_no_card_has_most() -> None:
    gates = torch.tensor([[0.5, 0.5, *[0.0] * 14]])
    monitor = CollapseMonitor(most=0.9, least_entropy=0.5)
    monitor.update(gates)
    assert monitor.collapsed
    tolerant = CollapseMonitor(most=0.9, least_entropy=0.2)
    tolerant.update(gates)
    assert not tolerant.collapsed


def test_rows_without_a_card_and_a_card_alone_are_no_collapse() -> None:
    monitor = CollapseMonitor()
    monitor.update(torch.zeros(5, 3))
    assert monitor.marginal is None
    alone = CollapseMonitor()
    alone.update(torch.ones(5, 1))
    assert not alone.collapsed


def test_bounds_that_cannot_be_are_refused() -> None:
    with pytest.raises(RoutingError, match="expected decay"):
        CollapseMonitor(decay=1.0)
