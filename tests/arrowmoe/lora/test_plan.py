"""A batch whose rows come and go: what follows equals a plan made afresh, and only what changed is written."""

from __future__ import annotations

import random

import pytest
import torch

from arrowmoe.errors import GateError
from arrowmoe.lora import layouts
from arrowmoe.lora.plan import Plan
from tests.arrowmoe.lora.test_layouts import D_IN, D_OUT, Slots, adapters, normal, plain, relative_error


def added(plan: Plan, slots: Slots) -> torch.Tensor:
    share = plan.at("m", slots)
    assert share is not None
    return share.add(torch.zeros(plan.rows, 1, D_OUT), normal(plan.rows, 1, D_IN, seed=7), None)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[layouts.RowChoice]:
    """What was written into row buffers."""
    rows: list[layouts.RowChoice] = []
    write = layouts._write
    monkeypatch.setattr(layouts, "_write", lambda a, b, row: (rows.append(row), write(a, b, row))[1])
    return rows


@pytest.fixture(autouse=True)
def by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arrowmoe.lora.costs.cheapest", lambda *_: "by_row")


def gates_of(choices: list[int], count: int) -> torch.Tensor:
    return torch.eye(count)[choices]


def test_only_a_row_that_changed_is_laid_out_anew(written: list[layouts.RowChoice]) -> None:
    slots = adapters(5)
    plan = Plan(tuple(slots), gates_of([0, 1, 2, 3], 5))
    added(plan, slots)
    assert len(written) == 4
    following = plan.followed_by(tuple(slots), gates_of([0, 4, 2, 3], 5))
    added(following, slots)
    assert len(written) == 5
    assert written[-1][0][0] is slots["a4"].low_rank


def test_a_changed_weight_is_a_change(written: list[layouts.RowChoice]) -> None:
    slots = adapters(2)
    plan = Plan(tuple(slots), gates_of([0, 1], 2))
    added(plan, slots)
    added(plan.followed_by(tuple(slots), torch.tensor([[1.0, 0.0], [0.0, 0.5]])), slots)
    assert len(written) == 3


def test_a_row_that_leaves_costs_one_row(written: list[layouts.RowChoice]) -> None:
    slots = adapters(4)
    plan = Plan(tuple(slots), gates_of([0, 1, 2, 3], 4))
    added(plan, slots)
    added(plan.followed_by(tuple(slots), gates_of([0, 3, 2], 4)), slots)
    assert len(written) == 5, "the last row has taken the place of the one that left"


@pytest.mark.parametrize("seed", range(4))
def test_any_sequence_of_batches_equals_the_plain_formula(seed: int) -> None:
    """Rows, adapters, ranks (1 to 64) and weights change at every step."""
    chance, slots = random.Random(seed), adapters(9)
    names = list(slots)
    plan = Plan(tuple(names), gates_of([0, 1], 9))
    for _ in range(25):
        some = chance.sample(names, chance.randint(1, 9))
        gates = torch.zeros(chance.randint(1, 12), len(some))
        for row in gates:
            for column in chance.sample(range(len(some)), chance.randint(0, min(2, len(some)))):
                row[column] = chance.choice([1.0, 0.5, -2.0])
        gates[0, 0] = 1.0
        plan = plan.followed_by(tuple(some), gates)
        x, nothing = normal(plan.rows, 1, D_IN, seed=7), torch.zeros(plan.rows, 1, D_OUT)
        expected = plain(nothing, x, gates[:, None], {name: slots[name] for name in some})
        assert relative_error(added(plan, slots), expected) <= 1e-6


def test_a_plan_that_was_followed_does_not_run_again() -> None:
    slots = adapters(2)
    plan = Plan(tuple(slots), gates_of([0, 1], 2))
    added(plan, slots)
    plan.followed_by(tuple(slots), gates_of([1, 0], 2))
    with pytest.raises(GateError, match="another plan has followed"):
        added(plan, slots)


def test_layouts_are_counted_in_bytes() -> None:
    slots = adapters(4)  # ranks 1, 8, 64, 3
    plan = Plan(tuple(slots), gates_of([0, 1, 2, 3], 4))
    assert plan.nbytes == 0
    added(plan, slots)
    assert plan.nbytes == 4 * 64 * (D_IN + D_OUT) * 4
