"""Among thousands of cards, a few dozen that are worth an exact look: nearest prototypes in a space of few dimensions.

The space is the pool's whitened one. A few points of every card are looked at in its strongest directions, then all
prototypes of the cards that are nearest in all of them. It is chosen when the index is first asked and again after as
many changes as it has cards; in between, what was chosen stays, for the exact stage decides.
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
LOOKED_AT = 256
"""Cards that are looked at again, in all directions."""
POINTS = 6
"""Points that stand for one card: its prototypes, merged (Ward) where they are more."""
FIRST_COLUMNS = 256


class CoarseIndex:
    """Points of cards, a column of a fixed number for each; columns of removed cards are used again."""

    def __init__(self, dimension: int) -> None:
        self._dimension = dimension
        self._projection: Array | None = None
        self._points: Vectors = np.zeros((POINTS, 0, min(DIRECTIONS, dimension)), dtype=np.float32)
        self._offsets: Vectors = np.zeros((POINTS, 0), dtype=np.float32)
        self._keys: list[str] = []
        self._slots: dict[str, int] = {}
        self._free: list[int] = []
        self._prototypes: dict[str, tuple[Vectors, Vectors]] = {}
        self._changes = 0

    def add(self, key: str, card: CardStatistics) -> None:
        """Index a card, if the index is in use."""
        self._changes += 1
        if self._projection is not None:
            self._put(key, _points(card), card.prototypes)

    def remove(self, key: str) -> None:
        """Forget a card."""
        self._changes += 1
        slot = self._slots.pop(key, None)
        if slot is not None:
            del self._prototypes[key]
            self._offsets[:, slot] = -np.inf
            self._free.append(slot)

    def shortlists(
        self, x: Array, keys: Sequence[str] | None, size: int, cards: Mapping[str, CardStatistics], covariance: Array
    ) -> list[list[str]]:
        """For each row the `size` nearest cards among `keys` (None: all), `covariance` the pool's."""
        if self._projection is None or self._changes > len(cards):
            self._rebuild(cards, covariance)
        assert self._projection is not None
        slots = None if keys is None else np.array([self._slots[key] for key in keys])
        rows = (x @ self._projection.T).astype(np.float32)
        return [self._nearest(row, self._roughly(row, slots), size) for row in rows]

    def _roughly(self, row: Vectors, slots: npt.NDArray[np.intp] | None) -> list[str]:
        """Keys of those of `slots` (None: all) whose points are nearest in few directions."""
        points, directions = self._offsets.size, self._points.shape[2]
        products = (self._points.reshape(points, directions) @ row[:directions]).reshape(self._offsets.shape)
        nearness = (products + self._offsets).max(axis=0)
        looked_at = _largest(nearness, LOOKED_AT) if slots is None else slots[_largest(nearness[slots], LOOKED_AT)]
        return [self._keys[slot] for slot in looked_at if np.isfinite(nearness[slot])]

    def _nearest(self, row: Vectors, keys: Sequence[str], size: int) -> list[str]:
        """Those of `keys` that have the nearest prototypes in all directions."""
        found = [self._prototypes[key] for key in keys]
        starts = np.cumsum([0, *(len(lengths) for _, lengths in found[:-1])])
        nearness = np.concatenate([points for points, _ in found]) @ row - np.concatenate([half for _, half in found])
        return [keys[at] for at in _largest(np.maximum.reduceat(nearness, starts), size)]

    def _rebuild(self, cards: Mapping[str, CardStatistics], covariance: Array) -> None:
        self._slots, self._prototypes, self._changes = {}, {}, 0
        self._offsets[:] = -np.inf
        self._free = list(range(len(self._keys)))[::-1]
        points = [_points(card) for card in cards.values()]
        self._projection = _discriminant(np.concatenate(points), covariance)
        for own, (key, card) in zip(points, cards.items(), strict=True):
            self._put(key, own, card.prototypes)

    def _put(self, key: str, points: Array, prototypes: Array) -> None:
        if not self._free:
            self._grow()
        slot = self._slots[key] = self._free.pop()
        self._keys[slot] = key
        few = self._projected(points)[:, : self._points.shape[2]]
        self._points[: len(few), slot] = few
        self._offsets[: len(few), slot] = -_half_squares(few)
        every = self._projected(prototypes)
        self._prototypes[key] = every, _half_squares(every)

    def _projected(self, points: Array) -> Vectors:
        assert self._projection is not None
        return np.asarray(points @ self._projection.T, dtype=np.float32)

    def _grow(self) -> None:
        """By half, for memory; new columns are infinitely far."""
        before = len(self._keys)
        columns = max(FIRST_COLUMNS, before // 2)
        self._points = np.pad(self._points, ((0, 0), (0, columns), (0, 0)))
        self._offsets = np.pad(self._offsets, ((0, 0), (0, columns)), constant_values=-np.inf)
        self._keys.extend([""] * columns)
        self._free.extend(range(before + columns - 1, before - 1, -1))


def _largest(values: Vectors, size: int) -> npt.NDArray[np.intp]:
    """Places of the `size` largest values, in no order."""
    return np.arange(len(values)) if len(values) <= size else np.argpartition(-values, size - 1)[:size]


def _half_squares(points: Vectors) -> Vectors:
    return np.asarray((points**2).sum(axis=1) / 2, dtype=np.float32)


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
