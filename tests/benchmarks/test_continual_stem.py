"""Blocks that are computed once for each row: the model says what it said, whatever the batch."""

from __future__ import annotations

import torch

from benchmarks.continual_stem import remember
from tests.peft_models import tiny_llama

IDS = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, 0, 0], [11, 12, 0, 0, 0]])
LENGTHS = (5, 3, 2)


def test_a_model_says_what_it_said() -> None:
    plain, model = tiny_llama(), tiny_llama()
    remember(model, 1)
    for _ in range(2):
        for rows, width in ([0, 1, 2], 5), ([2, 1], 3), ([1], 4):
            wanted, got = (one(input_ids=IDS[rows, :width]).logits for one in (plain, model))
            for at, row in enumerate(rows):
                length = min(LENGTHS[row], width)
                torch.testing.assert_close(got[at, :length], wanted[at, :length], rtol=1e-5, atol=1e-6)


def test_a_row_is_computed_once() -> None:
    model, calls = tiny_llama(), []
    remember(model, 1)
    model.base_model.layers[0].blocks[0].register_forward_hook(lambda _, args, __: calls.append(len(args[0])))
    for rows in ([0, 1], [1, 2], [2, 1, 0]):
        model(input_ids=IDS[rows])
    assert calls == [2, 1]
