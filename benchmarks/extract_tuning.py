"""What the extraction benchmark trains and how it scores: SmolLM2 whole, or a LoRA of it, on one CLINC150 domain.

Greedy decoding gives an answer exactly if every one of its tokens is the likeliest after those before it, so one
forward pass scores what `generate` would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional

from benchmarks.night_tasks import intents
from evolution.fine_tuning import Optimiser, answer_logits, answer_loss, attach, train
from evolution.training_data import Encoded, Pair, batches, encode, targets
from evolution.training_job import FineTuning
from registry.card import LoRACard
from registry.logs import get_logger
from registry.tensor import Role

WHOLE = FineTuning(steps=60, learning_rate=1e-4)
LORA = replace(WHOLE, alpha=32, learning_rate=1e-3)
"""Ten times the rate of the whole model and alpha 32 at every rank (Schulman et al. 2025, LoRA Without Regret)."""
PER_INTENT = 40
TEST_PER_INTENT = 10
BATCH_ROWS = 50

log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Score:
    """Share of the test's answers that are given exactly, and the mean loss of their tokens."""

    exact: float
    nats: float


@dataclass(frozen=True, kw_only=True)
class Task:
    """Pairs to train on, and token ids to score on."""

    train: tuple[Pair, ...]
    test: tuple[Encoded, ...]


def task_of(tokenizer: Any) -> Task:
    """The domain; a message is completed by the name of its intent."""
    family = intents(PER_INTENT, TEST_PER_INTENT)
    train_pairs, test_pairs = (
        tuple(Pair(prompt=f"{one.prompt}\nIntent:", answer=f" {one.answer}") for one in examples)
        for examples in (family.traffic, family.test)
    )
    return Task(train=train_pairs, test=tuple(encode(tokenizer, pair) for pair in test_pairs))


def tune_whole(model: Any, tokenizer: Any, task: Task, tuning: FineTuning) -> None:
    """Train every weight of `model`, embeddings and norms too, in place."""
    rows = [encode(tokenizer, pair) for pair in task.train]
    model.requires_grad_(True).train()
    optimiser = Optimiser(model, tuning)
    for step, batch in enumerate(batches(len(rows), tuning.batch_size, tuning.steps, tuning.seed)):
        loss_nats = answer_loss(model, [rows[row] for row in batch])
        optimiser.step(loss_nats)
        if step % 10 == 0:
            log.info("step", step=step, loss_nats=round(loss_nats.item(), 4))
    model.requires_grad_(False).eval()


def tuned_lora(model: Any, tokenizer: Any, task: Task, tuning: FineTuning) -> tuple[Score, int]:
    """The score of a LoRA that is trained at this rank from the start, and its bytes; `model` stays as it was."""
    adapted = attach(model, tuning, base_name="base")
    try:
        train(adapted, tokenizer, task.train, tuning)
        size = sum(weight.nbytes for weight in adapted.parameters() if weight.requires_grad)
        return score(adapted.get_base_model(), task.test), size
    finally:
        adapted.unload()


@torch.no_grad()
def score(model: Any, rows: Sequence[Encoded]) -> Score:
    """How `model` answers `rows`."""
    exact, nats, tokens = 0, 0.0, 0
    for start in range(0, len(rows), BATCH_ROWS):
        batch = rows[start : start + BATCH_ROWS]
        logits, wanted = answer_logits(model, batch)
        right = torch.split(logits.argmax(-1) == wanted, [targets(row) for row in batch])
        exact += sum(bool(row.all()) for row in right)
        nats += functional.cross_entropy(logits, wanted, reduction="sum").item()
        tokens += len(wanted)
    return Score(exact=exact / len(rows), nats=nats / tokens)


@torch.no_grad()
def put_pairs(model: Any, card: LoRACard) -> None:
    """Add the card's pairs to the weights of `model`: W + scaling · B A, the plain formula."""
    for module, tensors in card.modules.items():
        if Role.A in tensors:
            a, b = (torch.tensor(tensors[role].float32()) for role in (Role.A, Role.B))
            scaling = card.manifest.adapter.scaling_of(module)
            model.get_parameter(f"{module}.weight").addmm_(b, a, alpha=scaling)


@torch.no_grad()
def put_whole(model: Any, card: LoRACard) -> None:
    """Put the parameters that the card keeps whole in the place of the model's."""
    for tensor in card.tensors:
        if tensor.role is Role.FULL:
            model.get_parameter(tensor.name).copy_(torch.tensor(tensor.float32()))
