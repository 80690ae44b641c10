"""Every layout of the gated sum against the plain formula in double precision, at one module.

Adapters have ranks 1 to 64 mixed, 1 to 64 of them; gates are one-hot, mixed, for each token, or zero.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from arrowmoe.errors import GateError
from arrowmoe.lora.costs import LAYOUTS
from arrowmoe.lora.plan import Plan
from arrowmoe.lora.slots import Slot
from evolution.gated import LowRank

D_IN, D_OUT = 24, 40
RANKS = (1, 8, 64, 3, 16, 2, 32)
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}  # bf16 keeps 8 bits: one rounding is up to 4e-3
Slots = dict[str, Slot]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def adapters(count: int, dtype: torch.dtype = torch.float32) -> Slots:
    return {
        f"a{k}": Slot(
            low_rank=LowRank(
                a=normal(rank, D_IN, seed=2 * k).to(dtype),
                b=(normal(D_OUT, rank, seed=2 * k + 1) / rank).to(dtype).T,
                scaling=0.5 + k / 7,
            )
        )
        for k, rank in ((k, RANKS[k % len(RANKS)]) for k in range(count))
    }


def plain(y: Tensor, x: Tensor, gates: Tensor, slots: Slots) -> Tensor:
    """y + Σₖ gₖ sₖ Bₖ Aₖ x, in double precision; gates (rows, tokens, adapters)."""
    total = y.double()
    for k, slot in enumerate(slots.values()):
        assert slot.low_rank is not None
        a, b = slot.low_rank.a.double(), slot.low_rank.b.double()
        total = total + gates[..., k, None].double() * slot.low_rank.scaling * (x.double() @ a.T @ b)
    return total


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("arrowmoe.lora.costs.cheapest", lambda *_: request.param)
    return str(request.param)


def one_each(rows: int, count: int) -> Tensor:
    return torch.eye(count)[torch.arange(rows) % count]


def sorted_rows(rows: int, count: int) -> Tensor:
    return torch.eye(count)[torch.arange(rows) * count // rows]


def two_each(rows: int, count: int) -> Tensor:
    """Two weights a row, one of them negative, and a row that uses nothing."""
    gates = 0.7 * one_each(rows, count) - 0.3 * one_each(rows, count).roll(1, dims=1)
    gates[0] = 0
    return gates


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("count", [1, 2, 7, 32, 64])
@pytest.mark.parametrize("choose", [one_each, sorted_rows, two_each])
def test_each_layout_equals_the_plain_formula(
    layout: str, choose: Callable[[int, int], Tensor], count: int, tokens: int, dtype: torch.dtype
) -> None:
    rows = max(8, count)
    slots, gates = adapters(count, dtype), choose(rows, count).to(dtype)
    x, y = normal(rows, tokens, D_IN, seed=90).to(dtype), normal(rows, tokens, D_OUT, seed=91).to(dtype)
    expected = plain(y, x, gates[:, None], slots)
    share = Plan(tuple(slots), gates).at("m", slots)
    assert share is not None
    assert relative_error(share.add(y.clone(), x, None), expected) <= TOLERANCE[dtype]
    assert relative_error(y, expected) > 10 * TOLERANCE[dtype], "the adapters do much more than rounding does"


@pytest.mark.parametrize("layout", ["concatenated", "segmented"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_token_may_choose(layout: str, dtype: torch.dtype) -> None:
    rows, tokens, count = 5, 6, 9
    slots = adapters(count, dtype)
    chosen = torch.rand(rows, tokens, count, generator=torch.Generator().manual_seed(1)).topk(2).indices
    gates = torch.zeros(rows, tokens, count).scatter(2, chosen, normal(rows, tokens, 2, seed=2)).to(dtype)
    x, y = normal(rows, tokens, D_IN, seed=3).to(dtype), normal(rows, tokens, D_OUT, seed=4).to(dtype)
    share = Plan(tuple(slots), gates).at("m", slots)
    assert share is not None
    assert relative_error(share.add(y.clone(), x, None), plain(y, x, gates, slots)) <= TOLERANCE[dtype]


def test_every_token_may_choose_of_dora_and_biases_too() -> None:
    slots = {
        name: Slot(low_rank=slot.low_rank, rescale=normal(D_OUT, seed=8 + k), bias=normal(D_OUT, seed=18 + k))
        for k, (name, slot) in enumerate(adapters(3).items())
    }
    gates, base_bias = normal(2, 5, 3, seed=1), normal(D_OUT, seed=5)
    x, y = normal(2, 5, D_IN, seed=3), normal(2, 5, D_OUT, seed=4)
    expected = plain(y, x, gates, slots)
    for k, slot in enumerate(slots.values()):
        assert slot.rescale is not None
        assert slot.bias is not None
        expected += gates[..., k, None] * (slot.rescale * (y - base_bias) + slot.bias)
    share = Plan(tuple(slots), gates).at("m", slots)
    assert share is not None
    assert relative_error(share.add(y.clone(), x, base_bias), expected) <= 1e-6


@pytest.mark.parametrize("tokens", [4, 6])
def test_gates_for_other_tokens_than_the_input_has_are_refused(tokens: int) -> None:
    slots = adapters(2)
    share = Plan(tuple(slots), torch.ones(3, 5, 2)).at("m", slots)
    assert share is not None
    with pytest.raises(GateError, match="3 rows of 5 tokens"):
        share.add(torch.zeros(3, tokens, D_OUT), torch.ones(3, tokens, D_IN), None)


@pytest.mark.parametrize("per_token", [False, True])
def test_what_no_row_chose_is_not_computed(layout: str, per_token: bool) -> None:
    """Adapters full of NaN would show."""
    if per_token and layout == "by_row":
        pytest.skip("gates for each token have no layout by row")
    slots = adapters(3)
    bad = slots["a1"].low_rank
    assert bad is not None
    bad.a.fill_(float("nan"))
    gates = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 2.0]])
    if per_token:
        gates = gates[:, None].expand(2, 4, 3)
    share = Plan(tuple(slots), gates).at("m", slots)
    assert share is not None
    assert share.add(torch.zeros(2, 4, D_OUT), torch.ones(2, 4, D_IN), None).isfinite().all()


def test_a_module_whose_adapters_no_row_chose_stays_the_bases_own() -> None:
    slots = adapters(2)
    plan = Plan(tuple(slots), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    assert plan.at("m", {"a1": slots["a1"]}) is None


def test_adapters_that_learn_keep_their_gradient() -> None:
    """The layout by row would copy them."""
    slots = adapters(8)
    for slot in slots.values():
        assert slot.low_rank is not None
        slot.low_rank.a.requires_grad_()
    share = Plan(tuple(slots), torch.eye(8)).at("m", slots)
    assert share is not None
    share.add(torch.zeros(8, 1, D_OUT), torch.ones(8, 1, D_IN), None).sum().backward()
    assert all(slot.low_rank is not None and slot.low_rank.a.grad is not None for slot in slots.values())
