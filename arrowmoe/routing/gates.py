"""Gates: which adapters each row of a batch uses, with which weights, and why.

A value that knows neither torch nor a router: the router makes it, the engine computes with it, an answer shows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

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

    Weights may also be (rows, tokens, adapters): each row's first tokens, one by one, as many as the longest row has;
    what is beyond a shorter row's end is not read, and tokens that are generated keep the last one's. `layers` are
    weights, of either shape, for the modules under a path of the model (MoLE, arXiv:2404.13628); the longest path wins.
    """

    adapters: tuple[str, ...]
    names: tuple[str, ...]
    weights: npt.NDArray[np.float32]
    decisions: tuple[Decision, ...] = field(default=())
    layers: Mapping[str, npt.NDArray[np.float32]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.weights.ndim not in (2, 3) or self.weights.shape[-1] != len(self.adapters):
            raise GateError(f"expected weights (rows[, tokens], {len(self.adapters)}), got shape {self.weights.shape}")
        for layer, weights in self.layers.items():
            if weights.shape not in ((len(self), len(self.adapters)), self.weights.shape):
                raise GateError(
                    f"layer {layer!r}: expected weights ({len(self)}, {len(self.adapters)}) or as for the other "
                    f"modules {self.weights.shape}, got shape {weights.shape}"
                )
        if len(set(self.adapters)) != len(self.adapters) or len(self.names) != len(self.adapters):
            raise GateError("expected distinct adapters, each with a name")
        if not all(np.isfinite(weights).all() for weights in (self.weights, *self.layers.values())):
            raise GateError("expected finite weights, got NaN or infinity")
        if self.decisions and len(self.decisions) != len(self):
            raise GateError(f"expected one decision per row ({len(self)}), got {len(self.decisions)}")

    def __len__(self) -> int:
        return int(self.weights.shape[0])

    @property
    def tokens(self) -> int | None:
        """For how many tokens of each row there are weights; None where all of a row's have the same."""
        return self.weights.shape[1] if self.weights.ndim == 3 else None

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
        """Name → weight of the adapters that row `row` uses; a name that two cards share carries its digest.

        Where tokens or layers have weights of their own, the one that is farthest from zero.
        """
        used = [(index, float(weight)) for index, weight in enumerate(self._largest(row)) if weight != 0.0]
        shared = len({self.names[index] for index, _ in used}) < len(used)
        return {
            f"{self.names[index]} ({self.adapters[index][:15]})" if shared else self.names[index]: weight
            for index, weight in used
        }

    def weights_of(self, row: int) -> dict[str, float]:
        """Digest → weight of the adapters that row `row` uses, as `attribution` has them."""
        used = zip(self.adapters, self._largest(row).tolist(), strict=True)
        return {digest: weight for digest, weight in used if weight != 0.0}

    def rows(self, indices: Sequence[int]) -> Gates:
        """The gates of a subset of rows, in the order given, without adapters that none of them uses."""
        weights = self.weights[list(indices)]
        layers = {layer: own[list(indices)] for layer, own in self.layers.items()}
        used = [(own != 0).any(axis=tuple(range(own.ndim - 1))) for own in (weights, *layers.values())]
        kept = np.flatnonzero(np.any(used, axis=0))
        return Gates(
            adapters=tuple(self.adapters[index] for index in kept),
            names=tuple(self.names[index] for index in kept),
            weights=weights[..., kept],
            decisions=tuple(self.decisions[index] for index in indices) if self.decisions else (),
            layers={layer: own[..., kept] for layer, own in layers.items()},
        )

    def columns(self, start: int, stop: int) -> Gates:
        """The gates of the tokens from `start` to `stop`; those that are the same for all tokens stay."""
        return replace(
            self,
            weights=_cut(self.weights, start, stop),
            layers={layer: _cut(own, start, stop) for layer, own in self.layers.items()},
        )

    def at(self, path: str) -> npt.NDArray[np.float32]:
        """The weights at the module or layer `path` of the model: (rows[, tokens], adapters)."""
        over = [layer for layer in self.layers if f"{path}.".startswith(f"{layer}.")]
        return self.layers[max(over, key=len)] if over else self.weights

    def _largest(self, row: int) -> npt.NDArray[np.float32]:
        """Of each adapter the weight that is farthest from zero, over tokens and layers: (adapters,)."""
        given = np.concatenate([np.atleast_2d(own[row]) for own in (self.weights, *self.layers.values())])
        found: npt.NDArray[np.float32] = given[np.abs(given).argmax(axis=0), np.arange(len(self.adapters))]
        return found


def _cut(weights: npt.NDArray[np.float32], start: int, stop: int) -> npt.NDArray[np.float32]:
    return weights[:, start:stop] if weights.ndim == 3 else weights
