"""What a router sees of a request: features, a value of their own, so that images can join text later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class Features:
    """`vectors` (rows, d) float32 of unit length, in the space of the model that `embedder` names.

    `side` holds further pooled features by name, each (rows, d_name), for routers that can use them.
    """

    texts: tuple[str, ...]
    vectors: Vectors
    embedder: str
    side: Mapping[str, Vectors] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.texts)


class Featurizer(Protocol):
    """Turns requests into features; all features of one router come from one featurizer."""

    @property
    def embedder(self) -> str:
        """Name of the embedding model."""

    def features(self, texts: Sequence[str]) -> Features:
        """Features of `texts`, one row each."""


class Encoder(Protocol):
    """What a featurizer needs of an engine."""

    @property
    def name(self) -> str:
        """Name of the base model."""

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Texts → (rows, d) float32."""


class TextFeaturizer:
    """Features of texts by an encoder engine, without adapters."""

    def __init__(self, engine: Encoder) -> None:
        self._engine = engine

    @property
    def embedder(self) -> str:
        """Name of the engine's base model."""
        return self._engine.name

    def features(self, texts: Sequence[str]) -> Features:
        """Embed `texts` and scale each to unit length; a zero vector stays zero."""
        vectors = self._engine.encode(texts)
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        return Features(
            texts=tuple(texts),
            vectors=(vectors / np.where(norms == 0, 1, norms)).astype(np.float32, copy=False),
            embedder=self.embedder,
        )
