"""Trains and scores one LoRA on a causal language model, which is asked as a user would."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch

from evolution import fine_tuning
from evolution.fine_tuning import FineTuning
from scripts.demo_cards.splits import Pair

MAX_NEW_TOKENS: Final = 24
SCORING_BATCH: Final = 30


def train(model: Any, tokenizer: Any, examples: Sequence[Pair], tuning: FineTuning) -> None:
    """Moves the adapter's weights in place."""
    pairs = [fine_tuning.Pair(prompt=_messages(example.prompt), answer=example.answer) for example in examples]
    fine_tuning.train(model, tokenizer, pairs, tuning)


def exact_match(model: Any, tokenizer: Any, examples: Sequence[Pair]) -> float:
    """The share of greedy answers that equal the expected one after stripping white space."""
    answers = generate(model, tokenizer, [example.prompt for example in examples])
    hits = sum(got == example.answer for got, example in zip(answers, examples, strict=True))
    return hits / len(examples)


@torch.inference_mode()
def generate(model: Any, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """Greedy answers, stripped; batches are padded on the left."""
    answers: list[str] = []
    for start in range(0, len(prompts), SCORING_BATCH):
        texts = [_chat(tokenizer, prompt) for prompt in prompts[start : start + SCORING_BATCH]]
        batch = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
        made = model.generate(
            **batch,
            do_sample=False,
            max_new_tokens=MAX_NEW_TOKENS,
            pad_token_id=tokenizer.pad_token_id,
        )
        new = made[:, batch["input_ids"].shape[1] :]
        answers += [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return answers


def _chat(tokenizer: Any, prompt: str) -> str:
    text: str = tokenizer.apply_chat_template(_messages(prompt), tokenize=False, add_generation_prompt=True)
    return text


def _messages(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]
