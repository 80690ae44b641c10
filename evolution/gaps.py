"""Gaps: what the dissonant requests of one base have in common, and whether it is worth learning.

Requests are clustered by HDBSCAN among a sample of ordinary ones, which give it the contrast: a night often has one
gap only, and one cloud of points has no clusters. Its smallest clusters, which are pure, are the cores of gaps: those
near each other are one gap, which then takes in the larger cluster around its cores and whatever lies close to it. What
belongs to no gap stays queued. The only scikit-learn user for clusters; what a gap is called: `evolution.naming`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import pdist
from sklearn.cluster import HDBSCAN

from evolution.protocols import Cover, Floats, Vectors
from evolution.signals import Signal
from registry.logs import get_logger

Ints = npt.NDArray[np.intp]
Mask = npt.NDArray[np.bool_]
NOISE = -1

_log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Clustering:
    """How requests become gaps; the cosines are those of MiniLM's space, where unrelated requests have about 0.06.

    `least_prompts` is the least number of distinct prompts of a gap, `neighbours` how many make a point dense (fewer
    find more, and more noise). Cores whose centroids, measured from the ordinary requests' mean, have at least
    `joined_cosine` on average are one gap. What has `close_cosine` on average with its nearest `neighbours` in a gap,
    and less with those among ordinary requests, is of that gap; a lone cloud whose points have it is a gap.
    At most `most_prompts` are clustered, the most dissonant ones.
    """

    least_prompts: int = 12
    neighbours: int = 5
    joined_cosine: float = 0.25
    close_cosine: float = 0.5
    most_prompts: int = 4000


@dataclass(frozen=True, kw_only=True, eq=False)
class Gap:
    """Signals that belong together. `centroid` (d,) is of unit length, `cohesion` the members' mean cosine with it.

    `size` counts distinct prompts; `traffic` the requests they stand for; `lift` is their mean dissonance.
    """

    base: str
    signals: tuple[str, ...]
    prompts: tuple[str, ...]
    centroid: Vectors
    cohesion: float
    traffic: float
    lift: float

    @property
    def size(self) -> int:
        """Number of distinct prompts."""
        return len(self.prompts)


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Who would answer a gap's prompts already: shares in [0, 1], and the card here or at a peer that takes most."""

    here: float
    elsewhere: float
    card: str | None = None
    peer_card: str | None = None
    peer_digest: str | None = None

    @property
    def accepted(self) -> float:
        """Share that some card takes, wherever it is."""
        return self.here + self.elsewhere

    @property
    def verdict(self) -> Literal["covered", "fetch", "gap"]:
        """Whether cards here answer most of them, or would with those at peers, or none does."""
        if self.here > 0.5:
            return "covered"
        return "fetch" if self.accepted > 0.5 else "gap"

    @property
    def why(self) -> str:
        """The verdict in words."""
        match self.verdict:
            case "covered":
                return f"{self.here:.0%} of its prompts are accepted by cards here, most by {self.card}"
            case "fetch":
                return f"fetch {self.peer_card} first: with it and other cards {self.accepted:.0%} are accepted"
            case "gap":
                return f"no card accepts {1 - self.accepted:.0%} of its prompts"


def find_gaps(
    signals: Sequence[Signal],
    vectors: Vectors,
    scores: Floats,
    *,
    ordinary: Vectors,
    clustering: Clustering | None = None,
) -> list[Gap]:
    """The gaps among dissonant `signals` of one base, the one with most lift × traffic first.

    `vectors` (n, d) are their features, of unit length, and `scores` (n,) their dissonance; `ordinary` (m, d) are
    features of requests that were answered well, or of any sentences. The same prompt asked again counts as traffic,
    not as another member.
    """
    clustering = clustering or Clustering()
    members = _by_prompt(signals)
    groups = sorted(members.values(), key=lambda rows: -scores[rows].max())[: clustering.most_prompts]
    if len(groups) < len(members):
        _log.warning("prompts_not_clustered", left_queued=len(members) - len(groups), most=clustering.most_prompts)
    labels = cluster(vectors[[rows[0] for rows in groups]], ordinary, clustering)
    gaps = []
    for label in range(labels.max(initial=NOISE) + 1):
        chosen = [groups[at] for at in np.flatnonzero(labels == label)]
        gaps.append(_gap(signals, vectors, scores, chosen))
    _log.info("gaps_found", gaps=len(gaps), prompts=len(members), left_queued=int((labels == NOISE).sum()))
    return sorted(gaps, key=lambda gap: -gap.lift * gap.traffic)


def cluster(vectors: Vectors, ordinary: Vectors, clustering: Clustering) -> Ints:
    """Unit rows (n, d) → gap of each (n,), from 0 on, or `NOISE`.

    HDBSCAN (Campello et al. 2013) on all rows in all dimensions: reducing them first made it find less or merge all.
    The leaves of its tree tell families apart, where excess of mass took two for one; but they are small.
    """
    rows = len(vectors)
    if rows < max(clustering.least_prompts, 2):
        return np.full(rows, NOISE)
    points = np.concatenate([vectors, ordinary.reshape(-1, vectors.shape[1])]).astype(np.float64)
    centred = points[:rows] - (points[rows:].mean(axis=0) if len(ordinary) else 0)
    cores = _dissonant(_hdbscan(points, clustering, "leaf"), rows, clustering)
    if not cores:
        alone = _hdbscan(points[:rows], clustering, "eom", alone=True)
        return _joined(centred, _masks(alone), clustering.joined_cosine)
    labels = _joined(centred, cores, clustering.joined_cosine)
    for whole in _dissonant(_hdbscan(points, clustering, "eom"), rows, clustering):
        gaps = set(labels[whole].tolist()) - {NOISE}
        if len(gaps) == 1:
            labels[whole] = gaps.pop()
    return _grown(labels, points[:rows], points[rows:], clustering)


def coverage(covers: Sequence[Cover]) -> Coverage:
    """What the router says of a gap's prompts. Leave out those called bad: what a card gets wrong it does not cover."""
    present = [_named(cover) for cover in covers if cover.accepted and not cover.virtual]
    virtual = [_named(cover) for cover in covers if cover.accepted and cover.virtual]
    card, _ = _most_common(present)
    peer_card, peer_digest = _most_common(virtual)
    return Coverage(
        here=len(present) / max(1, len(covers)),
        elsewhere=len(virtual) / max(1, len(covers)),
        card=card,
        peer_card=peer_card,
        peer_digest=peer_digest,
    )


def worth(gap: Gap, *, cost_microusd: float) -> float:
    """lift × traffic ÷ cost: answers expected to turn right for each millionth of a dollar; free counts as one.

    The expected lift is the gap's mean dissonance, as if a card would put right whatever is wrong.
    """
    return gap.lift * gap.traffic / max(1.0, cost_microusd)


def _named(cover: Cover) -> tuple[str | None, str | None]:
    return cover.name or cover.digest, cover.digest


def _most_common(cards: Sequence[tuple[str | None, str | None]]) -> tuple[str | None, str | None]:
    return Counter(cards).most_common(1)[0][0] if cards else (None, None)


def _by_prompt(signals: Sequence[Signal]) -> dict[str, list[int]]:
    """Rows of each distinct prompt, whatever its case and spacing."""
    rows: dict[str, list[int]] = defaultdict(list)
    for at, signal in enumerate(signals):
        rows[" ".join(signal.prompt.casefold().split())].append(at)
    return rows


def _gap(signals: Sequence[Signal], vectors: Vectors, scores: Floats, groups: Sequence[list[int]]) -> Gap:
    every, first = [at for rows in groups for at in rows], [rows[0] for rows in groups]
    weights = np.array([signals[at].weight for at in every])
    centroid = _unit(vectors[first].mean(axis=0, dtype=np.float64))
    return Gap(
        base=signals[first[0]].base,
        signals=tuple(signals[at].id for at in every),
        prompts=tuple(signals[at].prompt for at in first),
        centroid=centroid.astype(np.float32),
        cohesion=float((vectors[first] @ centroid).mean()),
        traffic=float(weights.sum()),
        lift=float(np.average(scores[every], weights=weights)),
    )


def _hdbscan(points: Floats, clustering: Clustering, method: str, *, alone: bool = False) -> Ints:
    """Labels (n,); `alone` also sees one cloud, cut off where neighbours have less than `close_cosine`."""
    found = HDBSCAN(
        min_cluster_size=max(2, clustering.least_prompts),
        min_samples=min(clustering.neighbours, len(points)),
        cluster_selection_method=method,
        allow_single_cluster=alone,
        cluster_selection_epsilon=float(np.sqrt(2 - 2 * clustering.close_cosine)) if alone else 0.0,
        copy=True,
    ).fit_predict(points)
    return np.asarray(np.maximum(found, NOISE), np.intp)


def _masks(labels: Ints) -> list[Mask]:
    return [labels == label for label in range(labels.max(initial=NOISE) + 1)]


def _dissonant(labels: Ints, rows: int, clustering: Clustering) -> list[Mask]:
    """The clusters as masks of the first `rows` points; one that is ordinary for the most part is none."""
    found = [(inside[:rows], int(inside[rows:].sum())) for inside in _masks(labels)]
    return [own for own, others in found if own.sum() >= max(others, clustering.least_prompts / 2)]


def _grown(labels: Ints, points: Floats, ordinary: Floats, clustering: Clustering) -> Ints:
    """Labels (n,) with the gap's for what lies close to it, and then close to that, as far as it goes."""
    labels, cosines = labels.copy(), points @ points.T
    np.fill_diagonal(cosines, -1.0)
    usual = _nearest(points @ ordinary.T, clustering.neighbours)
    while True:
        near = np.stack([_nearest(cosines[:, inside], clustering.neighbours) for inside in _masks(labels)])
        best = near.max(axis=0)
        close = (labels == NOISE) & (best >= clustering.close_cosine) & (best > usual)
        if not close.any():
            return labels
        labels[close] = near.argmax(axis=0)[close]


def _nearest(cosines: Floats, count: int) -> Floats:
    """(n, m) → (n,): the mean of each row's `count` largest, or of all if there are fewer."""
    count = min(count, cosines.shape[1])
    if not count:
        return np.full(len(cosines), -1.0)
    return np.asarray(np.partition(cosines, -count, axis=1)[:, -count:].mean(axis=1), np.float64)


def _joined(centred: Floats, clusters: Sequence[Mask], cosine: float) -> Ints:
    """Clusters given as masks (n,) → labels (n,), those near each other (average linkage of centroids) as one."""
    labels = np.full(len(centred), NOISE)
    centroids = [_unit(centred[inside].mean(axis=0)) for inside in clusters]
    groups = [1] * len(clusters)
    if len(clusters) > 1:
        groups = fcluster(linkage(pdist(centroids, "cosine"), "average"), 1 - cosine, "distance").tolist()
    for inside, group in zip(clusters, groups, strict=True):
        labels[inside] = group - 1
    return labels


def _unit(vector: Floats) -> Floats:
    return np.asarray(vector / max(float(np.linalg.norm(vector)), 1e-12), np.float64)


__all__ = ["NOISE", "Clustering", "Coverage", "Gap", "cluster", "coverage", "find_gaps", "worth"]
