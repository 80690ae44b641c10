"""Prompts as a base model is asked them, for heads that read its hidden states: in training and in routing alike."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from arrowmoe.base_model import BaseModel
from arrowmoe.base_names import same_base
from arrowmoe.errors import RoutingError
from arrowmoe.features import Features
from arrowmoe.generation import Prompt, tokenise
from arrowmoe.routing.dataset import RoutingExample
from arrowmoe.routing.hidden import HiddenFeaturizer
from arrowmoe.routing.training import IGNORED, BalancedSampler, Batch

BATCH_ROWS = 32
_EMBEDDER = re.compile(r"(.+)#layer(\d+)-mean-asked")


class PromptFeaturizer:
    """Hidden state after layer `layer`, mean over a prompt written in the model's chat form, if it has one."""

    def __init__(self, base: BaseModel, *, layer: int) -> None:
        self.hidden = HiddenFeaturizer(base, layer=layer)
        self._base = base

    @classmethod
    def called(cls, embedder: str, base: BaseModel) -> PromptFeaturizer:
        """The featurizer that goes by this name. Raises `RoutingError` if it is not one of `base`."""
        found = _EMBEDDER.fullmatch(embedder)
        if found is None or not same_base(found[1], base.name):
            raise RoutingError(
                f"expected a head for hidden states of {base.name}, got one for features by {embedder}",
                hint="name the base model that the head was trained on with --base",
            )
        return cls(base, layer=int(found[2]))

    @property
    def embedder(self) -> str:
        """Base model, layer, pooling, and that prompts are asked."""
        return f"{self.hidden.embedder}-asked"

    def features(self, texts: Sequence[str]) -> Features:
        """Features of `texts`, unit length."""
        vectors = []
        for start in range(0, len(texts), BATCH_ROWS):
            ids, mask = _padded([prompt_ids(self._base, text) for text in texts[start : start + BATCH_ROWS]], 0)
            device = self._base.device
            vectors.append(self.hidden.vectors(ids.to(device), mask.to(device)).cpu().numpy())
        return Features(texts=tuple(texts), vectors=np.concatenate(vectors), embedder=self.embedder)


def prompt_ids(base: BaseModel, text: str) -> list[int]:
    """Token ids of a prompt as `arrowmoe.ask` writes it. Raises `PromptError`."""
    prompt: Prompt = [{"role": "user", "content": text}] if base.tokenizer.chat_template else text
    ids: list[int] = tokenise(base, [prompt], 0)["input_ids"][0].tolist()
    return ids


def answer_batch(base: BaseModel, examples: Sequence[RoutingExample]) -> Batch:
    """Examples with an answer as a batch whose labels are the answers and the model's end of text."""
    prompts, answers = [], []
    for example in examples:
        prompts.append(prompt_ids(base, example.text))
        answer = base.tokenizer(example.answer, add_special_tokens=False)["input_ids"]
        answers.append([*answer, base.tokenizer.eos_token_id])
    ids, mask = _padded([[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)], 0)
    labels, _ = _padded(
        [[*[IGNORED] * len(prompt), *answer] for prompt, answer in zip(prompts, answers, strict=True)], IGNORED
    )
    device = base.device
    return Batch(input_ids=ids.to(device), attention_mask=mask.to(device), labels=labels.to(device))


def balanced_batches(
    base: BaseModel, examples: Sequence[RoutingExample], batch_size: int, *, seed: int
) -> Iterator[Batch]:
    """Endless batches in which every card has equally many examples."""
    names = sorted({example.card or "" for example in examples})
    labels = [names.index(example.card or "") for example in examples]
    for picked in BalancedSampler(labels, batch_size, seed=seed):
        yield answer_batch(base, [examples[row] for row in picked])


def held_out(
    examples: Sequence[RoutingExample], share: float, *, seed: int
) -> tuple[list[RoutingExample], list[RoutingExample]]:
    """Examples to train on, and the same share of every card's (rounded down) to validate on."""
    by_card: dict[str | None, list[RoutingExample]] = defaultdict(list)
    for example in examples:
        by_card[example.card].append(example)
    rng, train, held = random.Random(seed), list[RoutingExample](), list[RoutingExample]()
    for rows in by_card.values():
        drawn, count = rng.sample(rows, len(rows)), int(share * len(rows))
        held += drawn[:count]
        train += drawn[count:]
    return train, held


def _padded(rows: Sequence[Sequence[int]], fill: int) -> tuple[Tensor, Tensor]:
    """Rows of ids as (rows, tokens), padded on the right with `fill`, and where they are not padded."""
    width = max(map(len, rows))
    padded = torch.full((len(rows), width), fill)
    mask = torch.zeros_like(padded)
    for at, row in enumerate(rows):
        padded[at, : len(row)] = torch.tensor(row)
        mask[at, : len(row)] = 1
    return padded, mask


__all__ = ["PromptFeaturizer", "answer_batch", "balanced_batches", "held_out", "prompt_ids"]
