"""Gates: which adapters each row of a batch uses, with which weights, and why.

A value that knows neither torch nor a router: the router makes it, the engine computes with it, an answer shows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from arrowmoe.errors import GateError


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A card that the router considered for one row; `virtual` if its weights are with peer `source` only.

    `evidence` is what it was judged by: statistics, examples, description, name, or weights. `p_value` is that of the
    prompt among the card's own, None where that was not asked or the card is not calibrated; `cosine` stands in then.
    """

    digest: str
    name: str
    score: float
    p_value: float | None = None
    cosine: float | None = None
    evidence: str = ""
    nearest: str = ""
    virtual: bool = False
    source: str | None = None


@dataclass(frozen=True, kw_only=True)
class Decision:
    """How one row was decided: `candidates` best first, `why` one sentence for people.

    A calibrated card was asked for a p-value of at least `alpha`, any other for a cosine of at least `threshold`.
    """

    mode: str
    why: str
    abstained: bool = False
    alpha: float | None = None
    threshold: float | None = None
    p_value: float | None = None
    candidates: tuple[Candidate, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Gates:
    """`weights` (rows, adapters) float32 over `adapters` (card digests, distinct, with their names in `names`).

    A row of zeros is the bare base model, a one-hot row a single adapter, anything else a mixture (a weighted sum of
    the adapters' contributions). `decisions` holds one entry per row, or none for gates that were given by hand.
    """

    adapters: tuple[str, ...]
    names: tuple[str, ...]
    weights: npt.NDArray[np.float32]
    decisions: tuple[Decision, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.weights.ndim != 2 or self.weights.shape[1] != len(self.adapters):
            raise GateError(f"expected weights (rows, {len(self.adapters)}), got shape {self.weights.shape}")
        if len(set(self.adapters)) != len(self.adapters) or len(self.names) != len(self.adapters):
            raise GateError("expected distinct adapters, each with a name")
        if not np.isfinite(self.weights).all():
            raise GateError("expected finite weights, got NaN or infinity")
        if self.decisions and len(self.decisions) != len(self):
            raise GateError(f"expected one decision per row ({len(self)}), got {len(self.decisions)}")

    def __len__(self) -> int:
        return int(self.weights.shape[0])

    @classmethod
    def of(
        cls,
        rows: Sequence[Mapping[str, float]],
        names: Mapping[str, str],
        decisions: Sequence[Decision] = (),
    ) -> Gates:
        """Gates from one mapping digest → weight per row; `names` gives each digest its name."""
        adapters = tuple(dict.fromkeys(digest for row in rows for digest in row))
        weights = np.zeros((len(rows), len(adapters)), dtype=np.float32)
        column = {digest: index for index, digest in enumerate(adapters)}
        for index, row in enumerate(rows):
            for digest, weight in row.items():
                weights[index, column[digest]] = weight
        return cls(
            adapters=adapters,
            names=tuple(names[digest] for digest in adapters),
            weights=weights,
            decisions=tuple(decisions),
        )

    def attribution(self, row: int) -> dict[str, float]:
        """Name → weight of the adapters that row `row` uses; a name that two cards share carries its digest."""
        used = [(index, float(weight)) for index, weight in enumerate(self.weights[row]) if weight != 0.0]
        shared = len({self.names[index] for index, _ in used}) < len(used)
        return {
            f"{self.names[index]} ({self.adapters[index][:15]})" if shared else self.names[index]: weight
            for index, weight in used
        }

    def weights_of(self, row: int) -> dict[str, float]:
        """Digest → weight of the adapters that row `row` uses."""
        used = zip(self.adapters, self.weights[row].tolist(), strict=True)
        return {digest: weight for digest, weight in used if weight != 0.0}

    def rows(self, indices: Sequence[int]) -> Gates:
        """The gates of a subset of rows, in the order given, without adapters that none of them uses."""
        weights = self.weights[list(indices)]
        kept = np.flatnonzero((weights != 0).any(axis=0))
        return Gates(
            adapters=tuple(self.adapters[index] for index in kept),
            names=tuple(self.names[index] for index in kept),
            weights=weights[:, kept],
            decisions=tuple(self.decisions[index] for index in indices) if self.decisions else (),
        )
