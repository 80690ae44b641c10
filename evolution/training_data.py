"""From examples to token ids: what a prompt looks like to the model, which rows a step sees, padding."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from evolution.errors import TrainingError
from evolution.examples import read_examples
from evolution.protocols import Example
from evolution.training_job import path_of

IGNORED: Final = -100

Encoded = tuple[list[int], list[int]]
"""Token ids of a prompt and of its answer; only the answer has a loss."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """What is asked and the whole answer. `prompt` is a string, completed as it is, or chat messages."""

    prompt: str | Sequence[Mapping[str, str]]
    answer: str


def examples_at(url: str) -> list[Example]:
    """JSON lines of `prompt` and `answer`; an empty prompt means running text. Raises `EvolutionError`."""
    try:
        examples = read_examples(path_of(url))
    except OSError as error:
        raise TrainingError(f"expected examples at {url}, so nothing is trained: {error}") from error
    if not examples:
        raise TrainingError(f"expected at least one example at {url}, got none")
    return examples


def encode_examples(model: Any, tokenizer: Any, examples: Sequence[Example]) -> list[Encoded]:
    """Examples as the engine will ask them. Raises `TrainingError` for one that is too long or has nothing to learn."""
    rows = [encode(tokenizer, _asked(tokenizer, example)) for example in examples]
    most = getattr(model.config.get_text_config(), "max_position_embeddings", math.inf)
    for number, row in enumerate(rows):
        tokens = sum(map(len, row))
        if tokens > most or targets(row) < 1:
            raise TrainingError(f"expected 2 to {most} tokens, got {tokens} in example {number}, so it cannot train")
    return rows


def encode(tokenizer: Any, pair: Pair) -> Encoded:
    """Token ids; an answer to something ends, text without a prompt need not end where it was cut."""
    if isinstance(pair.prompt, str):
        prompt = tokenizer(pair.prompt)["input_ids"]
    else:
        messages = [dict(message) for message in pair.prompt]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    answer = tokenizer(pair.answer, add_special_tokens=False)["input_ids"]
    return list(prompt), [*answer, tokenizer.eos_token_id] if pair.prompt else list(answer)


def batches(count: int, size: int, steps: int, seed: int) -> list[list[int]]:
    """Row numbers of each step; every row is seen once before any is seen again."""
    rng = random.Random(seed)
    order: list[int] = []
    while len(order) < steps * size:
        order += rng.sample(range(count), count)
    return [order[step * size : (step + 1) * size] for step in range(steps)]


def pad(rows: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
    """Token ids and labels, both (batch, seq), padded on the right; any id pads, for labels say what counts."""
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.zeros((len(rows), width), dtype=torch.long)
    labels = torch.full((len(rows), width), IGNORED)
    for row, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return ids, labels


def targets(row: Encoded) -> int:
    """How many tokens of a row have a loss: the answer's, less one that nothing precedes."""
    prompt, answer = row
    return len(answer) if prompt else len(answer) - 1


def _asked(tokenizer: Any, example: Example) -> Pair:
    chat = bool(example.prompt) and tokenizer.chat_template is not None
    messages = [{"role": "user", "content": example.prompt}]
    return Pair(prompt=messages if chat else example.prompt, answer=example.answer)


__all__ = ["IGNORED", "Encoded", "Pair", "batches", "encode", "encode_examples", "examples_at", "pad", "targets"]
