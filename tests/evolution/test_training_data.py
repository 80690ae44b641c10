"""Rows as the model sees them: asked as the engine asks, refused where they do not fit, none seen twice before all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from evolution.errors import EvolutionError, TrainingError
from evolution.protocols import Example
from evolution.training_data import IGNORED, batches, encode_examples, examples_at, pad, targets
from tests.arrowmoe.tiny import tokenizer
from tests.evolution.jobs import data
from tests.peft_models import tiny_llama

MODEL = tiny_llama()
END = 1


def test_a_prompt_is_asked_as_a_chat_and_its_answer_ends() -> None:
    talker = tokenizer()
    talker.chat_template = "w50 {{ messages[0]['content'] }} w51"
    row = encode_examples(MODEL, talker, [Example(prompt="w3 w4", answer="w5")])
    assert row == [([50, 3, 4, 51], [5, END])]
    talker.chat_template = None
    assert encode_examples(MODEL, talker, [Example(prompt="w3 w4", answer="w5")]) == [([3, 4], [5, END])]


def test_running_text_is_neither_asked_nor_ended() -> None:
    [row] = encode_examples(MODEL, tokenizer(), [Example(prompt="", answer="w5 w6 w7")])
    assert row == ([], [5, 6, 7])
    assert targets(row) == 2  # nothing comes before the first token


@pytest.mark.parametrize("example", [Example(prompt="w3 " * 127, answer="w4"), Example(prompt="", answer="w3")])
def test_what_does_not_fit_is_refused_by_its_number(example: Example) -> None:
    with pytest.raises(TrainingError, match=r"expected 2 to 128 tokens.*example 1"):
        encode_examples(MODEL, tokenizer(), [Example(prompt="w3", answer="w4"), example])


def test_files_that_hold_no_examples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="at least one example"):
        examples_at(data(tmp_path, "empty", []))
    with pytest.raises(TrainingError, match="expected examples at"):
        examples_at((tmp_path / "none.jsonl").as_uri())
    (tmp_path / "bad.jsonl").write_text('{"prompt": "w3"}\n')
    with pytest.raises(EvolutionError, match="line 1"):
        examples_at((tmp_path / "bad.jsonl").as_uri())


def test_every_row_is_seen_before_any_is_seen_again() -> None:
    order = [row for batch in batches(5, 4, 5, seed=3) for row in batch]
    assert len(order) == 20
    assert all(sorted(order[start : start + 5]) == list(range(5)) for start in range(0, 20, 5))
    assert batches(5, 4, 5, seed=3) != batches(5, 4, 5, seed=4)


def test_padding_is_on_the_right_and_labels_are_answers() -> None:
    ids, labels = pad([([5, 6], [7]), ([8], [9, 1, 1])])
    assert torch.equal(ids, torch.tensor([[5, 6, 7, 0], [8, 9, 1, 1]]))
    assert torch.equal(labels, torch.tensor([[IGNORED, IGNORED, 7, IGNORED], [IGNORED, 9, 1, 1]]))
