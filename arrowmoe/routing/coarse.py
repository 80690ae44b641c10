"""Among thousands of cards, a few dozen that are worth an exact look: nearest prototypes in a space of few dimensions.

The space is the pool's whitened one. All points are looked at in its strongest directions, the few nearest in all of
them. It is chosen when the index is first asked and again after as many changes as it has cards; in between, what was
chosen stays, for the exact stage decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.linalg import eigh

from arrowmoe.features import Vectors
from arrowmoe.routing.densities import Array
from arrowmoe.routing.statistics import CardStatistics

DIRECTIONS = 64
"""In which all cards are looked at."""
LOOKED_AT = 128
"""Cards that are looked at again, in all directions."""
POINTS = 6
"""Points that stand for one card: its prototypes, merged (Ward) where they are more."""
FIRST_ROWS = 256


class CoarseIndex:
    """Points of cards, a fixed number of rows each; rows of removed cards are used again."""

    def __init__(self, dimension: int) -> None:
        self._dimension = dimension
        self._projection: Array | None = None
        self._rough, self._fine = _Points(min(DIRECTIONS, dimension)), _Points(dimension)
        self._keys: list[str | None] = []
        self._slots: dict[str, int] = {}
        self._free: list[int] = []
        self._changes = 0

    def add(self, key: str, card: CardStatistics) -> None:
        """Index a card, if the index is in use."""
        self._changes += 1
        if self._projection is not None:
            self._put(key, card)

    def remove(self, key: str) -> None:
        """Forget a card."""
        self._changes += 1
        slot = self._slots.pop(key, None)
        if slot is not None:
            self._keys[slot] = None
            self._rough.drop(slot)
            self._free.append(slot)

    def shortlists(
        self, x: Array, keys: Sequence[str] | None, size: int, cards: Mapping[str, CardStatistics], covariance: Array
    ) -> list[list[str]]:
        """For each row the `size` cards among `keys` (None: all) whose points are nearest, `covariance` the pool's."""
        if self._projection is None or self._changes > len(cards):
            self._projection = _discriminant(np.concatenate([_points(card) for card in cards.values()]), covariance)
            self._rebuild(cards)
        projected = (x @ self._projection.T).astype(np.float32)
        allowed = None if keys is None else np.array([self._slots[key] for key in keys])
        return [self._nearest(row, allowed, size) for row in projected]

    def _nearest(self, row: Vectors, allowed: npt.NDArray[np.intp] | None, size: int) -> list[str]:
        slots = np.arange(len(self._keys)) if allowed is None else allowed
        slots = _largest(self._rough.nearness(row[:DIRECTIONS])[slots], slots, max(LOOKED_AT, size))
        slots = _largest(self._fine.nearness(row, slots), slots, size)
        return [key for slot in slots if (key := self._keys[slot]) is not None]

    def _rebuild(self, cards: Mapping[str, CardStatistics]) -> None:
        self._rough, self._fine = _Points(min(DIRECTIONS, self._dimension)), _Points(self._dimension)
        self._keys, self._slots, self._free, self._changes = [], {}, [], 0
        for key, card in cards.items():
            self._put(key, card)

    def _put(self, key: str, card: CardStatistics) -> None:
        assert self._projection is not None
        if not self._free:
            self._grow()
        slot = self._free.pop()
        points = (_points(card) @ self._projection.T).astype(np.float32)
        self._rough.put(slot, points[:, :DIRECTIONS])
        self._fine.put(slot, points)
        self._keys[slot], self._slots[key] = key, slot

    def _grow(self) -> None:
        rows = max(FIRST_ROWS, len(self._keys))
        self._rough.grow(rows)
        self._fine.grow(rows)
        self._free.extend(range(len(self._keys) + rows - 1, len(self._keys) - 1, -1))
        self._keys.extend([None] * rows)


class _Points:
    """POINTS points (slots, POINTS, directions), those that a card lacks infinitely far."""

    def __init__(self, directions: int) -> None:
        self._values: Vectors = np.zeros((0, POINTS, directions), dtype=np.float32)
        self._offsets: Vectors = np.zeros((0, POINTS), dtype=np.float32)

    def put(self, slot: int, points: Vectors) -> None:
        self.drop(slot)
        self._values[slot, : len(points)] = points
        self._offsets[slot, : len(points)] = -(points**2).sum(axis=1) / 2

    def drop(self, slot: int) -> None:
        self._offsets[slot] = -np.inf

    def grow(self, rows: int) -> None:
        self._values = np.concatenate([self._values, np.zeros((rows, *self._values.shape[1:]), dtype=np.float32)])
        self._offsets = np.concatenate([self._offsets, np.full((rows, POINTS), -np.inf, dtype=np.float32)])

    def nearness(self, row: Vectors, slots: npt.NDArray[np.intp] | slice = slice(None)) -> Vectors:
        """−½ squared distance of `row` to the nearest point of each slot, up to a constant."""
        values, offsets = self._values[slots], self._offsets[slots]
        found = (values.reshape(-1, len(row)) @ row).reshape(offsets.shape) + offsets
        return np.asarray(found.max(axis=1), dtype=np.float32)


def _largest(values: Vectors, slots: npt.NDArray[np.intp], size: int) -> npt.NDArray[np.intp]:
    """The slots of the `size` largest values."""
    return slots if len(slots) <= size else slots[np.argpartition(-values, size - 1)[:size]]


def _points(card: CardStatistics) -> Array:
    """At most POINTS points (p, d) that stand for a card."""
    if len(card.prototypes) <= POINTS:
        return card.prototypes
    groups = fcluster(linkage(card.prototypes, "ward"), POINTS, "maxclust") - 1
    share = np.eye(POINTS)[groups] * card.counts[:, None]
    share = share[:, share.any(axis=0)]
    return np.asarray((share / share.sum(axis=0)).T @ card.prototypes)


def _discriminant(points: Array, covariance: Array) -> Array:
    """V (d, d) with V covariance Vᵀ = I, first the directions in which the points differ most (Fisher)."""
    centred = points - points.mean(axis=0)
    _, axes = eigh(centred.T @ centred, covariance)
    return np.ascontiguousarray(axes.T[::-1])
