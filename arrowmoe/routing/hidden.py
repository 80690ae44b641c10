"""Features from inside the base model: one of its hidden states, pooled over the prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from arrowmoe.base_model import BaseModel, Pooling
from arrowmoe.encoding import pool
from arrowmoe.errors import RoutingError
from arrowmoe.features import Features

Pool = Literal["mean", "cls", "last"]


class HiddenFeaturizer:
    """Hidden state after layer `layer` of a base model (0: the embeddings), causal or encoder.

    `pool` takes the mean over the attended tokens, the first of them (`cls`) or the last. Vectors have unit length;
    a head normalises them again. Whatever else is known of a request (pooled vision, say) is a head's `side`.
    """

    def __init__(self, base: BaseModel, *, layer: int = 4, pool: Pool = "mean") -> None:
        layers = int(base.model.config.get_text_config().num_hidden_layers)
        if not 0 <= layer <= layers:
            raise RoutingError(f"{base.name} has {layers} layers: expected layer 0 to {layers}, got {layer}")
        self._base = base
        self._layer = layer
        self._pooling = Pooling(mode=pool, normalise=True)

    @property
    def embedder(self) -> str:
        """Base model, layer and pooling."""
        return f"{self._base.name}#layer{self._layer}-{self._pooling.mode}"

    def features(self, texts: Sequence[str]) -> Features:
        """Features of `texts`, as one batch."""
        batch = self._base.tokenizer(
            list(texts),
            padding=True,
            padding_side="right",
            truncation=self._base.max_positions is not None,
            max_length=self._base.max_positions,
            return_tensors="pt",
        ).to(self._base.device)
        vectors = self.vectors(batch["input_ids"], batch["attention_mask"])
        return Features(texts=tuple(texts), vectors=vectors.cpu().numpy(), embedder=self.embedder)

    @torch.no_grad()
    def vectors(self, input_ids: Tensor, mask: Tensor, images: Mapping[str, Tensor] | None = None) -> Tensor:
        """Token ids and mask (rows, tokens), padded on the right → (rows, d) float32 of unit length."""
        output = self._base.model.base_model(
            input_ids=input_ids, attention_mask=mask, output_hidden_states=True, **(images or {})
        )
        return pool(output.hidden_states[self._layer].float(), mask, self._pooling)
