"""Encoding: from texts to vectors, by pooling a base model's last hidden states."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from arrowmoe.base_model import BaseModel, Pooling
from arrowmoe.features import Vectors


def cut(base: BaseModel, texts: Sequence[str]) -> list[bool]:
    """Of each text, whether it is longer than the model reads, so that its end counts for nothing."""
    ids = base.tokenizer(list(texts), verbose=False)["input_ids"] if texts else []
    return [len(one) > _max_tokens(base) for one in ids]


@torch.inference_mode()
def encode_batch(base: BaseModel, texts: Sequence[str]) -> Vectors:
    """Texts → (n, d) float32, as one batch padded on the right; longer texts are cut at the model's own limit."""
    batch = base.tokenizer(
        list(texts),
        padding=True,
        padding_side="right",
        truncation=True,
        max_length=_max_tokens(base),
        return_tensors="pt",
    ).to(base.device)
    if batch["input_ids"].shape[1] == 0:  # empty texts alone, and a tokenizer that frames them with nothing
        return np.zeros((len(texts), base.d_model), dtype=np.float32)
    backbone = base.model.base_model
    states = backbone(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    vectors: Vectors = pool(states.float(), batch["attention_mask"], base.pooling).cpu().numpy()
    return vectors


def token_counts(base: BaseModel, texts: Sequence[str]) -> list[int]:
    """How many tokens `encode_batch` makes of each text."""
    return [len(ids) for ids in base.tokenizer(list(texts), truncation=True, max_length=_max_tokens(base))["input_ids"]]


def pool(states: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """States (n, tokens, d) under mask (n, tokens), padded on the right → (n, d)."""
    if pooling.mode == "mean":
        weights = mask.unsqueeze(-1).to(states.dtype)
        vectors = (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1e-9)
    elif pooling.mode == "cls":
        vectors = states[:, 0]
    else:
        vectors = states[torch.arange(len(states), device=states.device), mask.sum(dim=1) - 1]
    return torch.nn.functional.normalize(vectors, dim=-1) if pooling.normalise else vectors


def _max_tokens(base: BaseModel) -> int:
    """What the model, its tokenizer and its pooling agree on; a RoBERTa has two positions more than it takes tokens."""
    limits = (base.max_positions, base.tokenizer.model_max_length, base.pooling.max_tokens)
    return min(limit for limit in limits if limit is not None)
