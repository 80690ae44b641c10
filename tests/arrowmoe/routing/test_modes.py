"""Every mode, mask and renormalisation against a plain formula in loops, and what gradients pass."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from arrowmoe.errors import GateError
from arrowmoe.routing.modes import Annealing, Mode, gate, probabilities

ROWS, CARDS = 40, 5


def logits(columns: int = CARDS, seed: int = 0) -> Tensor:
    return 2 * torch.randn(ROWS, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def masks(shape: tuple[int, ...]) -> Tensor:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(9)) < 0.5
    if len(shape) == 2:
        mask[0] = False
    return mask


def by_loops(
    row: Sequence[float],
    allowed: Sequence[bool],
    mode: Mode,
    temperature: float,
    null: bool,
    threshold: float,
    most: int,
) -> list[float]:
    """The gates of one row, as one would write them on paper."""
    if not any(allowed):
        return [0.0] * (len(row) - null)
    exponentials = [math.exp(x / temperature) if ok else 0.0 for x, ok in zip(row, allowed, strict=True)]
    p = [value / sum(exponentials) for value in exponentials]
    best = sorted((k for k in range(len(p)) if allowed[k]), key=lambda k: (-p[k], k))
    if mode == "soft":
        weights = p
    elif mode == "top1":
        weights = [1.0 if k == best[0] else 0.0 for k in range(len(p))]
    else:
        kept = best[:2] if mode == "top2" else [k for k in best if p[k] >= threshold][:most]
        total = sum(p[k] for k in kept)
        weights = [p[k] / total if k in kept else 0.0 for k in range(len(p))]
    return weights[:-1] if null else weights


@pytest.mark.parametrize("mode", ["top1", "top2", "soft", "threshold"])
@pytest.mark.parametrize("null", [False, True])
@pytest.mark.parametrize("shape", [None, (CARDS,), (ROWS, CARDS)])
@pytest.mark.parametrize(("temperature", "threshold", "most"), [(1.0, 0.3, 4), (0.5, 0.1, 2), (3.0, 0.15, 1)])
def test_gates_equal_the_plain_formula(
    mode: Mode, null: bool, shape: tuple[int, ...] | None, temperature: float, threshold: float, most: int
) -> None:
    values = logits(CARDS + null)
    mask = None if shape is None else masks(shape)
    found = gate(values, mode, mask=mask, temperature=temperature, threshold=threshold, max_experts=most, null=null)
    full = torch.ones(ROWS, CARDS, dtype=torch.bool) if mask is None else mask.expand(ROWS, CARDS)
    expected = [
        by_loops(row, [*ok, *[True] * null], mode, temperature, null, threshold, most)
        for row, ok in zip(values.tolist(), full.tolist(), strict=True)
    ]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-15)


def test_manual_gates_are_the_weights_given_without_what_is_masked() -> None:
    given = torch.tensor([[0.7, 2.0, -1.0], [0.0, 0.5, 0.5]])
    mask = torch.tensor([True, False, True])
    assert gate(given, "manual").equal(given)
    assert gate(given, "manual", mask=mask).tolist() == [[pytest.approx(0.7), 0.0, -1.0], [0.0, 0.0, 0.5]]
    assert gate(given, "manual", null=True).equal(given[:, :2])


def test_equal_logits_go_to_the_lower_index() -> None:
    flat = torch.zeros(1, 4)
    assert gate(flat, "top1").tolist() == [[1, 0, 0, 0]]
    assert gate(flat, "top2").tolist() == [[0.5, 0.5, 0, 0]]
    assert gate(flat, "threshold", threshold=0.2, max_experts=3)[0, 3] == 0
    assert gate(flat, "top1", mask=torch.tensor([False, False, True, True])).tolist() == [[0, 0, 1, 0]]


@pytest.mark.parametrize("mode", ["top1", "top2", "soft", "threshold"])
def test_where_the_null_expert_is_sure_no_card_is_used(mode: Mode) -> None:
    sure = torch.tensor([[0.0, 0.0, 50.0]])
    torch.testing.assert_close(gate(sure, mode, null=True), torch.zeros(1, 2))


def test_a_soft_row_sums_to_what_the_null_expert_leaves() -> None:
    values = logits(CARDS + 1)
    left = 1 - torch.softmax(values, dim=1)[:, -1]
    torch.testing.assert_close(gate(values, "soft", null=True).sum(dim=1), left)


@pytest.mark.parametrize("mode", ["top1", "top2", "soft", "threshold"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_masked_as_a_whole_is_zero_with_a_finite_gradient(mode: Mode, dtype: torch.dtype) -> None:
    values = logits().to(dtype).requires_grad_()
    mask = masks((ROWS, CARDS))
    found = gate(values, mode, mask=mask, temperature=0.1)
    (found * logits(seed=1).to(dtype)).sum().backward()  # type: ignore[no-untyped-call]
    assert found[0].count_nonzero() == 0
    assert found[~mask].count_nonzero() == 0
    assert values.grad is not None
    assert values.grad.isfinite().all()
    assert values.grad[0].count_nonzero() == 0


def test_top1_is_exactly_one_and_has_the_gradient_of_the_softmax() -> None:
    values, weights = logits().float(), logits(seed=1).float()
    hard, soft = values.clone().requires_grad_(), values.clone().requires_grad_()
    found = gate(hard, "top1", temperature=0.7)
    assert set(found.flatten().tolist()) == {0.0, 1.0}
    (found * weights).sum().backward()  # type: ignore[no-untyped-call]
    (torch.softmax(soft / 0.7, dim=1) * weights).sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(hard.grad, soft.grad)


def test_gumbel_noise_makes_top1_sample_by_the_softmax() -> None:
    row = torch.tensor([[0.0, 1.0, 2.0]])
    drawn = gate(row.expand(40_000, 3), "top1", hard_gumbel=True, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.mean(dim=0), torch.softmax(row[0], dim=0), atol=0.01, rtol=0)


def test_gumbel_noise_is_that_of_its_generator() -> None:
    one, same, other = (
        gate(logits(), "soft", hard_gumbel=True, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert one.equal(same)
    assert not one.equal(other)


def test_probabilities_keep_the_null_column() -> None:
    found = probabilities(logits(CARDS + 1), mask=torch.tensor([True, False, False, False, False]), null=True)
    assert found.shape == (ROWS, CARDS + 1)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(ROWS, dtype=torch.float64))
    assert found[:, 1:-1].count_nonzero() == 0


def test_annealing_falls_by_equal_factors() -> None:
    schedule = Annealing(start=2.0, end=0.5, steps=4)
    assert [schedule.at(step) for step in (0, 2, 4, 100)] == pytest.approx([2.0, 1.0, 0.5, 0.5])
    assert schedule.at(1) / schedule.at(0) == pytest.approx(schedule.at(4) / schedule.at(3))


def test_annealing_sharpens_toward_top1() -> None:
    schedule = Annealing(start=5.0, end=1e-5, steps=10)
    torch.testing.assert_close(gate(logits(), "soft", temperature=schedule.at(10)), gate(logits(), "top1"))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"mode": "top3"}, "expected a mode"),
        ({"mode": "soft", "temperature": 0.0}, "temperature above 0"),
        ({"mode": "threshold", "max_experts": 0}, "max_experts"),
        (
            {"mode": "soft", "mask": torch.ones(CARDS + 1, dtype=torch.bool)},
            r"expected a bool mask \(40, 5\) or \(5,\)",
        ),
        ({"mode": "soft", "mask": torch.ones(CARDS)}, "got torch.float32"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: dict[str, object], match: str) -> None:
    with pytest.raises(GateError, match=match):
        gate(logits(), **arguments)  # type: ignore[arg-type]


def test_logits_of_a_wrong_shape_are_refused() -> None:
    with pytest.raises(GateError, match="expected logits"):
        gate(torch.zeros(3), "soft")


@pytest.mark.parametrize("wrong", [{"start": 0.0}, {"end": -1.0}, {"steps": 0}])
def test_an_annealing_that_cannot_be_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(GateError, match="expected temperatures above 0"):
        Annealing(**wrong)  # type: ignore[arg-type]
