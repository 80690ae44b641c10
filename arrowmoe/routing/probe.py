"""The probe: ordinary sentences that every node has, so that "how well does this fit" is asked against the same rest.

A card's fit is a ratio of two densities, the card's and everything's. What everything is must not depend on which cards
happen to be here, or a p-value would change with every arrival: it is the card itself and the probe, half and half.
The sentences are examples of usage from WordNet 3.0 (its licence lies beside them).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from arrowmoe.features import Featurizer
from arrowmoe.routing.densities import Array, Dense
from registry.digest import Digest, digest_of
from registry.logs import get_logger

_FILE = Path(__file__).with_name("probe_sentences.txt")
CHECKED = 16
TOLERANCE = 0.003
"""Ten times what bfloat16 moves a coordinate of the mean; the coordinates themselves are near 0.02."""
RECHECKED = 4
log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class Probe:
    """Mean (d,) and covariance (d, d) of the probe's sentences in the space of `embedder`."""

    embedder: str
    digest: Digest
    mean: Array
    covariance: Array
    _bases: dict[float, Dense] = field(default_factory=dict, repr=False)

    def half(self, variance: float) -> Dense:
        """½ covariance + variance · I, factorised once for each `variance`."""
        if variance not in self._bases:
            self._bases[variance] = Dense(self.covariance / 2 + variance * np.eye(len(self.mean)))
        return self._bases[variance]

    @property
    def check(self) -> tuple[float, ...]:
        """The mean's first coordinates: other weights, pooling or scaling under the same name give others."""
        return tuple(round(float(value), 4) for value in self.mean[:CHECKED])

    def is_same_space(self, check: tuple[float, ...]) -> bool:
        """Whether `check` was made in this space, give or take an element type's precision."""
        return len(check) == len(self.check) and bool(np.allclose(check, self.check, rtol=0, atol=TOLERANCE))


def sentences() -> tuple[str, ...]:
    """The probe's sentences."""
    return tuple(_FILE.read_text(encoding="utf-8").splitlines())


def measured(featurizer: Featurizer, cache: Path | None = None) -> Probe:
    """The probe in `featurizer`'s space; embedding it takes seconds, so it is kept in `cache`, a directory."""
    digest = digest_of(_FILE.read_bytes())
    name = digest_of(f"{featurizer.embedder} {digest}".encode()).rpartition(":")[2][:32]
    path = None if cache is None else cache / "probes" / f"{name}.npy"
    vectors = _kept(path, featurizer) if path is not None else None
    if vectors is None:
        vectors = featurizer.features(sentences()).vectors.astype(np.float64)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial.npy")
            np.save(partial, vectors)
            partial.replace(path)
    mean = vectors.mean(axis=0)
    return Probe(embedder=featurizer.embedder, digest=digest, mean=mean, covariance=np.cov(vectors.T, bias=True))


def _kept(path: Path, featurizer: Featurizer) -> Array | None:
    """The vectors at `path`, if `featurizer` still makes them: other weights may have come under the same name."""
    try:
        kept = np.asarray(np.load(path, allow_pickle=False), dtype=np.float64)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as error:
        log.warning("probe_cache_damaged", path=str(path), error=str(error))
        return None
    few = featurizer.features(sentences()[:RECHECKED]).vectors
    same = kept.shape == (len(sentences()), few.shape[1]) and np.allclose(kept[:RECHECKED], few, rtol=0, atol=TOLERANCE)
    if not same:
        log.warning("probe_cache_of_another_model", path=str(path), embedder=featurizer.embedder)
    return kept if same else None


__all__ = ["Probe", "measured", "sentences"]
