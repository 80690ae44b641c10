"""Which card fits best: the cards' statistics, added up. Adding a card is an update, removing one a downdate.

With Nᵪ prompts, prototypes μ, and covariance Sᵪ around them of each card c, and W = Σ Nᵪ Sᵪ / Σ Nᵪ:

    score(x, c) = log Σₖ wₖ N(x; μₖ, (1 − a) W + λ I + a Sᵪ) − log N(x; m, T)

where m and T are mean and covariance of everything, hence the relative Mahalanobis distance (Ren et al. 2021,
arXiv:2106.09022) of a mixture discriminant (Hastie & Tibshirani 1996) whose covariances are pulled towards the pool's
(Friedman 1989). The sums are kept in float64; what is made of them is made anew after each change, when it is asked.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from arrowmoe.errors import RoutingError
from arrowmoe.routing.coarse import CoarseIndex
from arrowmoe.routing.densities import Array, Dense, Mixture
from arrowmoe.routing.statistics import CardStatistics

OWN_SHARE, MOST_OWN_SHARE, BROAD_PROMPTS = 0.3, 0.5, 1000
"""a, how much of a card's covariance is its own: more than OWN_SHARE where cards have fewer prompts than BROAD_PROMPTS
on average, by the fourth root of the quotient, for such cards are narrow and differ more in shape than they share."""
LEAST_VARIANCE, MOST_VARIANCE, FEW_PROMPTS = 0.6, 10.0, 100
"""λ in units of 1 / d: (FEW_PROMPTS / mean number of prompts per card)², within these bounds."""
REST_VARIANCE = 1.5
"""λ of everything, in units of the cards' λ."""
SHORTLIST = 32
EXHAUSTIVE = 64
"""Up to so many cards every one is scored exactly; beyond, the SHORTLIST that the coarse index finds."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RowScores:
    """Scores in nats of the cards `keys` for one row, and the prototype of each that is nearest."""

    keys: tuple[str, ...]
    values: Array
    nearest: npt.NDArray[np.intp]


@dataclass(kw_only=True, eq=False)
class _Sums:
    """What adds up: prompts, their sum (d,), the prototypes' second moment and the scatter around them (d, d)."""

    prompts: float
    total: Array
    moment: Array
    scatter: Array

    def change(self, card: CardStatistics, sign: float) -> None:
        self.prompts += sign * card.count
        self.total += sign * card.count * card.mean
        self.moment += sign * (card.prototypes * card.counts[:, None]).T @ card.prototypes
        self.scatter += sign * card.count * (card.sketch.T @ card.sketch)


class _Pool:
    """The factorised matrices of one state of the sums."""

    def __init__(self, sums: _Sums, cards: int) -> None:
        dimension = len(sums.total)
        scatter, mean = sums.scatter / sums.prompts, sums.total / sums.prompts
        variance = float(np.clip((FEW_PROMPTS * cards / sums.prompts) ** 2, LEAST_VARIANCE, MOST_VARIANCE)) / dimension
        floor = variance * np.eye(dimension)
        self._own_share = _own_share(sums.prompts / cards)
        self._scatter, self._floor = scatter, floor
        self.covariance = (1 - self._own_share) * scatter + floor
        self.blended = Dense(self.covariance)
        self._rest = Dense(scatter + sums.moment / sums.prompts - np.outer(mean, mean) + REST_VARIANCE * floor)
        self._whole = Mixture(mean[None], np.ones(1), np.zeros((0, dimension)), self._rest)

    @cached_property
    def shared(self) -> Dense:
        """For cards without a covariance of their own."""
        return Dense(self._scatter + self._floor)

    def outside(self, x: Array) -> Array:
        """Log density (n,) of rows under everything."""
        values, _ = self._whole.log_density(self._rest.whiten(x))
        return values

    def mixture(self, card: CardStatistics) -> Mixture:
        """The card's density."""
        return Mixture(card.prototypes, card.weights, np.sqrt(self._own_share) * card.sketch, self.base(card))

    def base(self, card: CardStatistics) -> Dense:
        """What the card's density is over."""
        return self.blended if len(card.sketch) else self.shared


def _own_share(mean_prompts: float) -> float:
    return float(np.clip(OWN_SHARE * (BROAD_PROMPTS / mean_prompts) ** 0.25, OWN_SHARE, MOST_OWN_SHARE))


class ClosedForm:
    """Statistics by card, in one embedder's space of `dimension`."""

    def __init__(self, dimension: int) -> None:
        self._dimension = dimension
        self._cards: dict[str, CardStatistics] = {}
        self._sums = self._nothing()
        self._pool: _Pool | None = None
        self._mixtures: dict[str, Mixture] = {}
        self._coarse = CoarseIndex(dimension)

    def __len__(self) -> int:
        return len(self._cards)

    def __contains__(self, key: str) -> bool:
        return key in self._cards

    def statistics(self, key: str) -> CardStatistics:
        """What was added under `key`."""
        return self._cards[key]

    def add(self, key: str, card: CardStatistics) -> None:
        """Add a card; one of the same key is replaced. Raises `RoutingError` for another dimension."""
        if card.dimension != self._dimension:
            raise RoutingError(f"expected statistics of dimension {self._dimension}, got {card.dimension}")
        self.remove(key)
        self._cards[key] = card
        self._sums.change(card, 1.0)
        self._coarse.add(key, card)
        self._forget()

    def remove(self, key: str) -> bool:
        """Take a card out; whether it was there."""
        card = self._cards.pop(key, None)
        if card is None:
            return False
        self._sums.change(card, -1.0)
        if not self._cards:
            self._sums = self._nothing()
        self._coarse.remove(key)
        self._forget()
        return True

    def score(self, x: Array, keys: Collection[str] | None = None) -> list[RowScores]:
        """Scores of unit rows `x` (n, d) for the cards `keys` (None: all); if they are many, for a shortlist."""
        allowed = list(self._cards) if keys is None else [key for key in keys if key in self._cards]
        if not allowed:
            return [RowScores(keys=(), values=np.zeros(0), nearest=np.zeros(0, dtype=np.intp))] * len(x)
        if len(allowed) <= EXHAUSTIVE:
            return self.exact(x, allowed)
        shortlists = self._coarse.shortlists(
            x, None if keys is None else allowed, SHORTLIST, self._cards, self._ready().covariance
        )
        return [self.exact(x[row : row + 1], shortlist)[0] for row, shortlist in enumerate(shortlists)]

    def exact(self, x: Array, keys: Sequence[str]) -> list[RowScores]:
        """Scores of rows `x` for every card of `keys`."""
        pool = self._ready()
        outside, white = pool.outside(x), dict[Dense, Array]()
        values, nearest = np.empty((len(x), len(keys))), np.empty((len(x), len(keys)), dtype=np.intp)
        for column, key in enumerate(keys):
            base = pool.base(self._cards[key])
            if base not in white:
                white[base] = base.whiten(x)
            inside, nearest[:, column] = self._mixture(key, pool).log_density(white[base])
            values[:, column] = inside - outside
        return [RowScores(keys=tuple(keys), values=one, nearest=at) for one, at in zip(values, nearest, strict=True)]

    def _mixture(self, key: str, pool: _Pool) -> Mixture:
        if key not in self._mixtures:
            self._mixtures[key] = pool.mixture(self._cards[key])
        return self._mixtures[key]

    def _ready(self) -> _Pool:
        if self._pool is None:
            self._pool = _Pool(self._sums, len(self._cards))
        return self._pool

    def _forget(self) -> None:
        self._pool = None
        self._mixtures.clear()

    def _nothing(self) -> _Sums:
        d = self._dimension
        return _Sums(prompts=0.0, total=np.zeros(d), moment=np.zeros((d, d)), scatter=np.zeros((d, d)))


__all__ = ["ClosedForm", "RowScores"]
