"""What a card says about the prompts it is for, in numbers: small, additive, and without a single private prompt.

A card's prompts are summarised as a Gaussian mixture: prototypes (each the mean of at least `min_prompts` of them),
their counts, and the scatter around them as a sketch of low rank. These travel inside the card as its STATS tensors,
at most 64 KiB, and are all that another node needs to route to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy.cluster.hierarchy import fcluster, linkage

from arrowmoe.errors import RoutingError
from arrowmoe.features import Vectors
from arrowmoe.routing.densities import Array
from registry.card import LoRACard
from registry.digest import Digest
from registry.manifest import CALIBRATION, COUNTS, MAX_STATISTICS_BYTES, PROTOTYPES, SKETCH, RoutingSpec
from registry.tensor import Role, Tensor

MIN_PROMPTS = 3
SINGLE_EXAMPLES = 64
"""With `min_prompts` 1, up to so many prompts each stay a prototype of their own (a kernel on the examples)."""
PROMPTS_PER_PROTOTYPE, MAX_PROTOTYPES = 15, 20
"""Prototypes that are looked for where prompts carry no finer labels; chosen by cross-validation (docs/routing.md)."""
MOST_PROMPTS = 1_000_000
"""A card of more would take the others' digits along when it leaves the sums."""
UNIT_SLACK = 0.01
"""What float16 may add to a length of 1."""
PROMPTS_PER_DIRECTION = 3
"""A sketch has one direction for so many times `min_prompts` prompts, unless that is 1."""
STEPS_PER_QUARTILES = 16
"""Calibration fits are rounded to so many steps between their quartiles, or each would name the prompt behind it."""
CLUSTERED_PROMPTS = 4000
"""Ward's method takes memory quadratic in the prompts, so it looks at no more than these."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CardStatistics:
    """`prototypes` (k, d), `counts` (k,) prompts behind each, `sketch` (r, d) with sketchᵀ sketch ≈ the covariance.

    The covariance is that of a prompt around its prototype. `calibration` (q,) are ascending quantiles of the fit
    (nats) of `calibrated` prompts that the rest was not computed from; none: the card has no p-values.
    """

    embedder: str
    probe: Digest
    check: tuple[float, ...] = ()
    """The probe's own mark in the embedder's space, see `Probe.check`."""
    prototypes: Array
    counts: Array
    sketch: Array
    calibration: Array
    calibrated: int = 0
    min_prompts: int = MIN_PROMPTS

    @property
    def dimension(self) -> int:
        """Of the embedder's space."""
        return int(self.prototypes.shape[1])

    @property
    def count(self) -> float:
        """Prompts that were summarised."""
        return float(self.counts.sum())

    @property
    def weights(self) -> Array:
        """Share of the prompts behind each prototype (k,)."""
        return np.asarray(self.counts / self.counts.sum())

    @property
    def mean(self) -> Array:
        """Mean of all prompts (d,)."""
        return np.asarray(self.weights @ self.prototypes)

    @property
    def nbytes(self) -> int:
        """Size inside a card."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def between(self) -> Array:
        """F (k, d) with FᵀF the covariance of the prototypes around their mean."""
        return np.sqrt(self.weights)[:, None] * (self.prototypes - self.mean)

    def tensors(self) -> tuple[Tensor, ...]:
        """The STATS tensors that a card carries."""
        half = {PROTOTYPES: self.prototypes, SKETCH: self.sketch}
        full = {COUNTS: self.counts, CALIBRATION: self.calibration}
        kept = [Tensor.from_numpy(name, Role.STATS, array.astype(np.float16)) for name, array in half.items()]
        kept += [Tensor.from_numpy(name, Role.STATS, array.astype(np.float32)) for name, array in full.items()]
        return tuple(tensor for tensor in kept if tensor.nbytes)

    def spec(self) -> RoutingSpec:
        """What the manifest says of them."""
        return RoutingSpec(
            embedder=self.embedder,
            dimension=self.dimension,
            probe=self.probe,
            probe_check=self.check,
            count=round(self.count),
            calibration=self.calibrated,
            min_prompts=self.min_prompts,
        )

    def put_into(self, card: LoRACard) -> LoRACard:
        """A new, unsigned card with these statistics in place of any it had."""
        return card.with_routing(self.spec(), self.tensors())

    @classmethod
    def of(cls, spec: RoutingSpec, tensors: Mapping[str, Tensor]) -> CardStatistics:
        """Statistics as a card or a peer gives them. Raises `RoutingError` if no prompts could have them."""
        arrays = {name: tensor.float32().astype(np.float64) for name, tensor in tensors.items()}
        found = cls(
            embedder=spec.embedder,
            probe=spec.probe,
            check=spec.probe_check,
            prototypes=arrays[PROTOTYPES],
            counts=arrays[COUNTS],
            sketch=arrays.get(SKETCH, np.zeros((0, spec.dimension))),
            calibration=arrays.get(CALIBRATION, np.zeros(0)),
            calibrated=spec.calibration,
            min_prompts=spec.min_prompts,
        )
        for holds, expected, got in _claims(found, spec):
            if not holds:
                raise RoutingError(
                    f"statistics: expected {expected}, got {got}, so they are of no prompts",
                    hint="describe the card anew; if a peer published it, ask its owner to",
                )
        return found

    @classmethod
    def of_card(cls, card: LoRACard) -> CardStatistics | None:
        """The statistics inside a card, if it has any."""
        spec = card.manifest.routing
        return None if spec is None else cls.of(spec, card.statistics)

    def rounded(self) -> CardStatistics:
        """As another node will read them: in the precision that a card keeps."""
        return self.of(self.spec(), {tensor.name: tensor for tensor in self.tensors()})


def _claims(found: CardStatistics, spec: RoutingSpec) -> Iterator[tuple[bool, str, str]]:
    """What holds of the statistics of any prompts with vectors of unit length: (holds, expected, got)."""
    counts, least, total = found.counts, found.min_prompts, float(found.counts.sum())
    few = counts[(counts < least) & (counts != 1)]
    yield not len(few), f"counts of at least {least}, or 1 for a public text", f"{min(few, default=0):g}"
    yield total <= MOST_PROMPTS, f"at most {MOST_PROMPTS} prompts", f"{total:g}"
    yield round(total) == spec.count, f"counts of {spec.count} prompts together", f"{total:g}"
    lengths = np.linalg.norm(found.prototypes, axis=1)
    yield lengths.max() <= 1 + UNIT_SLACK, "prototypes of length 1 at most", f"{lengths.max():.3g}"
    moment = float(found.weights @ lengths**2 + (found.sketch**2).sum())
    yield moment <= (1 + UNIT_SLACK) ** 2, "prototypes and sketch with a second moment of 1 at most", f"{moment:.3g}"
    values = found.calibration
    yield bool((np.diff(values) >= 0).all()), "ascending calibration values", "others"
    yield len(values) <= found.calibrated, f"calibration values of {len(values)} prompts", f"{found.calibrated} prompts"


def summarise(
    vectors: Vectors,
    *,
    embedder: str,
    probe: Digest,
    check: tuple[float, ...] = (),
    labels: Sequence[str | None] | None = None,
    public: Vectors | None = None,
    min_prompts: int = MIN_PROMPTS,
    budget_bytes: int = MAX_STATISTICS_BYTES,
    calibration_values: int = 0,
) -> CardStatistics:
    """Statistics, not calibrated yet, of prompts with `vectors` (n, d) of unit length.

    `labels` finer than the card (intents) give one prototype each; without them clusters are found (Ward, 1963).
    `public` (p, d) are texts that the card shows anyway (its description's phrases): each a prototype of its own.
    `calibration_values` is room to leave in the budget. Raises `RoutingError` where it holds no prototype.
    """
    dimension = vectors.shape[1]
    x = vectors.astype(np.float64)
    groups = _grouped(x, labels, min_prompts)
    prototypes, counts, residuals = _means(x, groups)
    if public is not None and len(public):
        prototypes = np.concatenate([prototypes, public.astype(np.float64)])
        counts = np.concatenate([counts, np.ones(len(public))])
    spent = prototypes.size * 2 + 4 * (len(counts) + calibration_values)
    rank = (budget_bytes - spent) // (2 * dimension)
    if rank < 0 or not len(prototypes):
        raise RoutingError(
            f"expected room for {len(prototypes)} prototypes ({spent} bytes) in {budget_bytes} bytes, and one at least",
            hint="raise the budget, or give fewer labels; a card needs prompts or a description",
        )
    if min_prompts > 1:  # with the prototypes, more directions would give single prompts away (docs/privacy.md)
        rank = min(rank, (len(x) - len(np.unique(groups))) // (PROMPTS_PER_DIRECTION * min_prompts))
    found = CardStatistics(
        embedder=embedder,
        probe=probe,
        check=check,
        prototypes=prototypes,
        counts=counts,
        sketch=_sketch(residuals, counts.sum(), rank),
        calibration=np.zeros(0),
        min_prompts=min_prompts,
    )
    return found.rounded()


def calibrated(statistics: CardStatistics, fits: Array, values: int) -> CardStatistics:
    """With the fits (nats) of prompts that `statistics` were not computed from, as at most `values` quantiles."""
    low, high = np.quantile(fits, [0.25, 0.75])
    step = float(high - low) / STEPS_PER_QUARTILES
    ascending = np.sort(np.round(fits / step) * step if step else fits)
    if len(ascending) > values:
        ascending = np.quantile(ascending, np.linspace(0, 1, values))
    return replace(statistics, calibration=ascending, calibrated=len(fits)).rounded()


def _grouped(x: Array, labels: Sequence[str | None] | None, min_prompts: int) -> npt.NDArray[np.intp]:
    """A group for each prompt, each group of at least `min_prompts`; empty if there are not as many prompts."""
    if len(x) < max(1, min_prompts):
        return np.zeros(0, dtype=np.intp)
    if labels is not None and any(label is not None for label in labels):
        groups = np.unique([label or "" for label in labels], return_inverse=True)[1].astype(np.intp)
    elif min_prompts == 1 and len(x) <= SINGLE_EXAMPLES:
        groups = np.arange(len(x), dtype=np.intp)
    else:
        groups = _clusters(x, int(np.clip(len(x) // PROMPTS_PER_PROTOTYPE, 1, MAX_PROTOTYPES)))
    return _merged(x, groups, min_prompts)


def _clusters(x: Array, number: int) -> npt.NDArray[np.intp]:
    """Ward's clusters of the rows; of many rows an even sample is clustered and the rest joins the nearest mean."""
    if number == 1:
        return np.zeros(len(x), dtype=np.intp)
    step = -(-len(x) // CLUSTERED_PROMPTS)
    sample = x[::step]
    of_sample = fcluster(linkage(sample, "ward"), number, "maxclust") - 1
    if step == 1:
        return of_sample.astype(np.intp)
    means = np.stack([sample[of_sample == group].mean(axis=0) for group in range(of_sample.max() + 1)])
    return _nearest(x, means)


def _merged(x: Array, groups: npt.NDArray[np.intp], min_prompts: int) -> npt.NDArray[np.intp]:
    """Groups of fewer than `min_prompts` join the nearest other group, smallest first."""
    while True:
        sizes = np.bincount(groups)
        present = np.flatnonzero(sizes)
        small = present[np.argmin(sizes[present])]
        if sizes[small] >= min_prompts or len(present) == 1:
            return groups
        others = present[present != small]
        means = np.stack([x[groups == group].mean(axis=0) for group in others])
        groups = np.where(groups == small, others[_nearest(x[groups == small].mean(axis=0)[None], means)], groups)


def _nearest(x: Array, means: Array) -> npt.NDArray[np.intp]:
    return np.asarray((x @ means.T - (means**2).sum(axis=1) / 2).argmax(axis=1), dtype=np.intp)


def _means(x: Array, groups: npt.NDArray[np.intp]) -> tuple[Array, Array, Array]:
    """Mean (k, d) and size (k,) of each group, and every prompt's distance from its group's mean (n, d)."""
    present, place, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if not len(present):
        return np.zeros((0, x.shape[1])), np.zeros(0), np.zeros((0, x.shape[1]))
    means = np.stack([x[place == group].mean(axis=0) for group in range(len(present))])
    return means, sizes.astype(np.float64), x - means[place]


def _sketch(residuals: Array, count: float, rank: int) -> Array:
    """F (r, d), r ≤ rank, with FᵀF the best approximation of rank r of the residuals' covariance (Eckart–Young)."""
    if not len(residuals) or rank == 0:
        return np.zeros((0, residuals.shape[1]))
    values, axes = np.linalg.eigh(residuals.T @ residuals / count)
    strongest = np.argsort(-values)[:rank]
    kept = strongest[values[strongest] > 1e-9]
    return np.asarray(np.sqrt(values[kept])[:, None] * axes[:, kept].T)


__all__ = ["MIN_PROMPTS", "CardStatistics", "calibrated", "summarise"]
