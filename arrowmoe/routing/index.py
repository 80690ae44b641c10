"""Prototypes of many cards, and how well a prompt fits each: the part of the router that decides what "fit" means.

This first form scores a card by the cosine between the prompt and the nearest of its prototypes. Adding and removing a
card touch only its own rows, whatever else is indexed.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from arrowmoe.features import Vectors


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """`values` (rows, cards) in [-1, 1] for the cards `keys`; `nearest` (rows, cards): the prototype that gave each."""

    keys: tuple[str, ...]
    values: Vectors
    nearest: npt.NDArray[np.intp]


class PrototypeIndex:
    """Unit vectors by card. Rows of removed cards are used again; the table doubles when it is full."""

    def __init__(self) -> None:
        self._vectors: Vectors = np.zeros((0, 0), dtype=np.float32)
        self._free: list[int] = []
        self._rows: dict[str, npt.NDArray[np.intp]] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def add(self, key: str, prototypes: Vectors) -> None:
        """Index a card under `key` by prototypes (n, d) of unit length; a card of the same key is replaced."""
        if key in self._rows:
            self.remove(key)
        rows = np.array([self._take_row(prototypes.shape[1]) for _ in prototypes], dtype=np.intp)
        self._vectors[rows] = prototypes
        self._rows[key] = rows

    def remove(self, key: str) -> bool:
        """Forget a card; whether it was there."""
        rows = self._rows.pop(key, None)
        if rows is None:
            return False
        self._vectors[rows] = 0
        self._free.extend(rows.tolist())
        return True

    def score(self, vectors: Vectors, keys: list[str]) -> Scores:
        """Score `vectors` (rows, d) of unit length against the cards `keys`, each of which must be indexed."""
        owned = [self._rows[key] for key in keys]
        starts = np.cumsum([0, *map(len, owned)])
        cosines = vectors @ self._vectors[np.concatenate(owned)].T
        parts = [cosines[:, start:end] for start, end in pairwise(starts)]
        return Scores(
            keys=tuple(keys),
            values=np.stack([part.max(axis=1) for part in parts], axis=1),
            nearest=np.stack([part.argmax(axis=1) for part in parts], axis=1),
        )

    def _take_row(self, width: int) -> int:
        if not self._free:
            self._grow(width)
        return self._free.pop()

    def _grow(self, width: int) -> None:
        used = len(self._vectors)
        grown = np.zeros((max(64, 2 * used), width), dtype=np.float32)
        if used:
            grown[:used] = self._vectors
        self._vectors = grown
        self._free.extend(range(len(grown) - 1, used - 1, -1))
