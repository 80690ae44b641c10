"""Arrow's scores (Ostapenko et al. 2024, arXiv:2405.11157): how much of a text lies in each card's main direction.

A card's prototype at a module is the first right singular vector v of B A, the direction of input that it moves most.
Arrow, and PEFT's `create_arrow_model`, route every token at every layer by |v · x|, through a softmax over the best k.
Here |v · x| is averaged over tokens and modules to one score for a text: a card is chosen once, for all layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from arrowmoe.base_model import BaseModel
from arrowmoe.features import Vectors
from arrowmoe.routing.spectral import low_rank_core, matrices_of, mean_norms
from evolution.gated import LowRank
from registry.card import LoRACard


class ArrowScorer:
    """Scores texts by the mean |v · x| over tokens and modules, as it is: unit vectors need no probe texts.

    Cards that target different modules meet different inputs, so compare cards that target the same ones. A base that
    an engine runs is scored inside the engine's `computing()`, without gates.
    """

    def __init__(self, base: BaseModel, cards: Sequence[LoRACard]) -> None:
        """Raises as `add`."""
        self._base = base
        self._prototypes: dict[str, dict[str, Tensor]] = {}
        self.add(*cards)

    @property
    def digests(self) -> tuple[str, ...]:
        """The cards, one for each column of the scores."""
        return tuple(self._prototypes)

    def add(self, *cards: LoRACard) -> None:
        """Score `cards` too, all or none of them. Raises `AdapterMismatchError` for one that does not fit the base."""
        self._prototypes |= {card.digest: matrices_of(self._base, card, prototype) for card in cards}

    def remove(self, digest: str) -> bool:
        """Forget a card; whether it was scored."""
        return self._prototypes.pop(digest, None) is not None

    def scores(self, texts: Sequence[str]) -> Vectors:
        """(rows, cards) float32 >= 0, in the order of `digests`."""
        scores: Vectors = mean_norms(self._base, list(self._prototypes.values()), texts).numpy()
        return scores


def prototype(adapter: LowRank) -> Tensor:
    """First right singular vector of B A, as (1, d_in) float32, its sign arbitrary; zero if B A is.

    B A = Q (R A), Q orthonormal, has the right singular vectors of R A (r, d_in).
    """
    _, singular, right = torch.linalg.svd(low_rank_core(adapter), full_matrices=False)
    first: Tensor = right[:1] * (singular[:1, None] > 0)
    return first
