"""Trains and scores one LoRA on a sentence encoder.

Loss: in-batch supervised contrastive (Khosla et al. 2020, equation 2): rows of one label attract.
Score: the share of held-out texts whose nearest neighbour in the reference set has their label.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Final

import torch

from evolution.fine_tuning import FineTuning, Optimiser
from registry.logs import get_logger
from scripts.demo_cards.splits import Labelled

TEMPERATURE: Final = 0.1
LOG_EVERY: Final = 10

log = get_logger(__name__)


def train(model: Any, tokenizer: Any, examples: Sequence[Labelled], tuning: FineTuning) -> None:
    """Moves the adapter's weights in place; every batch holds each label equally often."""
    rng = random.Random(tuning.seed)
    by_label = _by_label(examples)
    share = tuning.batch_size // len(by_label)
    optimiser = Optimiser(model, tuning)
    model.train()
    for step in range(tuning.steps):
        rows = [row for group in by_label.values() for row in rng.sample(group, share)]
        labels = torch.tensor([list(by_label).index(row.label) for row in rows])
        vectors = embed(model, tokenizer, [row.text for row in rows])
        loss_nats = contrastive_loss(vectors, labels)
        optimiser.step(loss_nats)
        if step % LOG_EVERY == 0:
            log.info("step", step=step, loss_nats=round(loss_nats.item(), 4))
    model.eval()


def embed(model: Any, tokenizer: Any, texts: Sequence[str]) -> torch.Tensor:
    """Mean of the token states under the attention mask, then L2 normalised: (len(texts), d)."""
    batch = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
    states = model(**batch).last_hidden_state.float()
    mask = batch["attention_mask"].unsqueeze(-1).float()
    mean = (states * mask).sum(dim=1) / mask.sum(dim=1)
    return torch.nn.functional.normalize(mean, dim=-1)


def contrastive_loss(vectors: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`vectors` (batch, d) normalised, `labels` (batch,); every label must occur twice or more."""
    own = torch.eye(len(labels), dtype=torch.bool)
    similarity = (vectors @ vectors.T / TEMPERATURE).masked_fill(own, float("-inf"))
    log_share = similarity.log_softmax(dim=1).masked_fill(own, 0.0)
    positive = (labels[:, None] == labels[None, :]) & ~own
    return -((log_share * positive).sum(dim=1) / positive.sum(dim=1)).mean()


@torch.inference_mode()
def nearest_neighbour_accuracy(
    model: Any, tokenizer: Any, heldout: Sequence[Labelled], reference: Sequence[Labelled]
) -> float:
    """The share of `heldout` whose most similar text of `reference` carries the same label."""
    queries = embed(model, tokenizer, [example.text for example in heldout])
    keys = embed(model, tokenizer, [example.text for example in reference])
    nearest: list[int] = (queries @ keys.T).argmax(dim=1).tolist()
    hits = [reference[index].label == query.label for query, index in zip(heldout, nearest, strict=True)]
    return sum(hits) / len(hits)


def _by_label(examples: Sequence[Labelled]) -> dict[str, list[Labelled]]:
    groups: dict[str, list[Labelled]] = {}
    for example in examples:
        groups.setdefault(example.label, []).append(example)
    return groups
