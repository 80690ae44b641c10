"""Trains and scores one LoRA on a causal language model: loss and `lm_head` on the answer only."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Final

import torch

from registry.logs import get_logger
from scripts.demo_cards.optim import Optimiser
from scripts.demo_cards.recipes import Schedule
from scripts.demo_cards.splits import Pair

IGNORED: Final = -100
MAX_NEW_TOKENS: Final = 24
SCORING_BATCH: Final = 30
LOG_EVERY: Final = 10

log = get_logger(__name__)


def train(model: Any, tokenizer: Any, examples: Sequence[Pair], schedule: Schedule) -> None:
    """Moves the adapter's weights in place."""
    encoded = [_encode(tokenizer, example) for example in examples]
    batches = _batches(len(encoded), schedule)
    optimiser = Optimiser(model, schedule)
    model.train()
    for step, rows in enumerate(batches):
        ids, labels = _pad([encoded[row] for row in rows], tokenizer.pad_token_id)
        loss_nats = _loss(model.base_model.model, ids, labels)
        optimiser.step(loss_nats)
        if step % LOG_EVERY == 0:
            log.info("step", step=step, loss_nats=round(loss_nats.item(), 4))
    model.eval()


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
    messages = [{"role": "user", "content": prompt}]
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text


def _encode(tokenizer: Any, example: Pair) -> tuple[list[int], list[int]]:
    prompt = tokenizer(_chat(tokenizer, example.prompt), add_special_tokens=False).input_ids
    answer = tokenizer(example.answer, add_special_tokens=False).input_ids
    answer = [*answer, tokenizer.eos_token_id]
    return prompt, answer


def _batches(count: int, schedule: Schedule) -> list[list[int]]:
    rng = random.Random(schedule.seed)
    order: list[int] = []
    while len(order) < schedule.steps * schedule.batch_size:
        order += rng.sample(range(count), count)
    size = schedule.batch_size
    return [order[step * size : (step + 1) * size] for step in range(schedule.steps)]


def _pad(rows: Sequence[tuple[list[int], list[int]]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, both (batch, seq), padded on the right."""
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.full((len(rows), width), pad_id)
    labels = torch.full((len(rows), width), IGNORED)
    for row, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return ids, labels


def _loss(causal: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    # Padding is on the right and attention is causal, so no answer position ever sees it.
    hidden = causal.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    targets = labels[:, 1:]
    wanted = targets != IGNORED
    logits = causal.lm_head(hidden[wanted]).float()
    return torch.nn.functional.cross_entropy(logits, targets[wanted])
