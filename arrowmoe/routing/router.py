"""The router: cards are registered and unregistered as they come and go; features go in, gates with reasons come out.

It decides without I/O but for one thing: the featurizer embeds a card's own words when the card is registered. A card
that a peer holds is a *virtual candidate*: routed to like any other, fetched when it is chosen.

Two questions, two scores. *Which* card: the joint score of `closed_form`, in which cards compete. *Any* card: the
p-value of `acceptance`, which asks the chosen card alone, and so holds its rate of false alarms whoever else is there.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from arrowmoe.base_names import same_base
from arrowmoe.errors import RoutingError
from arrowmoe.features import Features, Featurizer
from arrowmoe.routing.closed_form import ClosedForm, RowScores
from arrowmoe.routing.densities import Array
from arrowmoe.routing.gates import Candidate, Decision, Gates
from arrowmoe.routing.modes import Mode, gate
from arrowmoe.routing.policy import CONSIDERED, Opinion, Policy
from arrowmoe.routing.probe import Probe, measured
from arrowmoe.routing.profile import Describable, Profile, profile_of
from arrowmoe.routing.statistics import CardStatistics


class Router(Protocol):
    """Features in, gates out."""

    def route(self, features: Features, *, mask: Collection[str] | None = None) -> Gates:
        """Gates with one row per row of `features`; `mask` are the digests that may be chosen, None is all."""


class WeightScorer(Protocol):
    """Judges cards by their weights, where they say nothing else of themselves."""

    def best(self, text: str, mask: Collection[str] | None) -> tuple[str, float] | None:
        """Digest and z-score of the card that `text` concerns most, among those in `mask`."""


@dataclass(frozen=True, kw_only=True)
class _Row:
    """One prompt on its way: its candidates best first, and the mode that decides."""

    candidates: tuple[Candidate, ...]
    mode: Mode
    note: str = ""


class LoRARouter:
    """Closed-form routing over cards' statistics; needs no training. `cache` keeps the probe's vectors between runs."""

    def __init__(self, featurizer: Featurizer, *, policy: Policy | None = None, cache: Path | None = None) -> None:
        self.policy = policy or Policy()
        self.featurizer = featurizer
        self.cache = cache
        self._probe: Probe | None = None
        self._cards: ClosedForm | None = None
        self._profiles: dict[str, Profile] = {}
        self.by_weights: Sequence[WeightScorer] = ()
        """Asked, in turn, about prompts that no card accepts."""
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._profiles)

    def __contains__(self, digest: str) -> bool:
        return digest in self._profiles

    @property
    def probe(self) -> Probe:
        """The probe in this router's space, embedded when it is first needed."""
        with self._lock:
            if self._probe is None:
                self._probe = measured(self.featurizer, self.cache)
            return self._probe

    def profiles(self) -> Mapping[str, Profile]:
        """What is known of each indexed card, by digest."""
        return dict(self._profiles)

    def digests(self) -> set[str]:
        """Digests of all indexed cards, virtual ones among them."""
        return set(self._profiles)

    def is_virtual(self, digest: str) -> bool:
        """Whether a card is indexed whose weights are with a peer only."""
        profile = self._profiles.get(digest)
        return profile is not None and profile.virtual

    def register_card(self, card: Describable, statistics: CardStatistics | None = None) -> None:
        """Index a card whose weights are here; a virtual candidate of the same digest becomes real."""
        self._register(card, statistics)

    def register_virtual_candidate(
        self, card: Describable, source: str, statistics: CardStatistics | None = None
    ) -> None:
        """Index a card that peer `source` offers; a card that is already here stays what it is."""
        if card.digest not in self._profiles or self.is_virtual(card.digest):
            self._register(card, statistics, virtual=True, source=source)

    def unregister(self, digest: str) -> bool:
        """Forget a card; whether it was indexed."""
        with self._lock:
            self._profiles.pop(digest, None)
            return self._cards is not None and self._cards.remove(digest)

    def features(self, texts: Sequence[str]) -> Features:
        """Features of `texts` by this router's own featurizer."""
        return self.featurizer.features(texts)

    def route_texts(self, texts: Sequence[str], *, base: str | None = None) -> Gates:
        """Gates for `texts` over the cards made for base model `base` (None: all)."""
        return self.route(self.features(texts), mask=None if base is None else self.for_base(base))

    def for_base(self, base: str) -> set[str]:
        """Digests of the indexed cards that say they were made for base model `base`.

        A card that names no base is never chosen by itself, only by name: nothing says yet that it fits.
        """
        bases = {known for profile in list(self._profiles.values()) if (known := profile.base_name) is not None}
        fitting = {known for known in bases if same_base(known, base)}
        return {digest for digest, profile in list(self._profiles.items()) if profile.base_name in fitting}

    def route(
        self,
        features: Features,
        *,
        mask: Collection[str] | None = None,
        policy: Policy | None = None,
        opinions: Sequence[Opinion | None] = (),
    ) -> Gates:
        """Gates with one row per row of `features`; `policy` instead of the router's own, `opinions` one per row.

        Raises `RoutingError` for features of another embedder, and for an opinion on a card that nobody knows.
        """
        if features.embedder != self.featurizer.embedder:
            raise RoutingError(f"expected features by {self.featurizer.embedder}, got them by {features.embedder}")
        if opinions and len(opinions) != len(features):
            raise RoutingError(f"expected one opinion per row ({len(features)}), got {len(opinions)}")
        policy = policy or self.policy
        x = features.vectors.astype(np.float64)
        with self._lock:
            scores = self._cards.score(x, mask) if self._cards is not None else [_NOTHING] * len(x)
            rows = [self._ranked(one, policy.mode) for one in scores]
            if opinions:
                rows = [self._heard(*row, mask, policy) for row in zip(rows, x, opinions, strict=True)]
            rows = self._asked(rows, x, policy)
            if self.by_weights:
                asked = zip(rows, features.texts, strict=True)
                rows = [self._weighed(row, text, mask, policy) for row, text in asked]
        return self._decided(rows, policy)

    def _register(
        self, card: Describable, statistics: CardStatistics | None, *, virtual: bool = False, source: str | None = None
    ) -> None:
        probe = self.probe
        profile = profile_of(card, statistics, featurizer=self.featurizer, probe=probe, virtual=virtual, source=source)
        with self._lock:
            if self._cards is None:
                self._cards = ClosedForm(len(probe.mean))
            self._cards.add(card.digest, profile.statistics)
            self._profiles[card.digest] = profile

    def _ranked(self, scores: RowScores, mode: Mode) -> _Row:
        """The best candidates of one row; equal scores by digest, so that every node decides alike."""
        order = sorted(range(len(scores.keys)), key=lambda at: (-scores.values[at], scores.keys[at]))[:CONSIDERED]
        made = [self._candidate(scores.keys[at], scores.values[at], scores.nearest[at]) for at in order]
        return _Row(candidates=tuple(made), mode=mode)

    def _candidate(self, digest: str, score: float, nearest: int) -> Candidate:
        profile = self._profiles[digest]
        return Candidate(
            digest=digest,
            name=profile.name,
            score=float(score),
            evidence=profile.evidence,
            nearest=profile.prototype(int(nearest)),
            virtual=profile.virtual,
            source=profile.source,
        )

    def _weighed(self, row: _Row, text: str, mask: Collection[str] | None, policy: Policy) -> _Row:
        """The row, led by the card whose weights concern the prompt most, if every other refuses it."""
        if any(self._accepts(candidate, policy) for candidate in row.candidates):
            return row
        found = [best for scorer in self.by_weights if (best := scorer.best(text, mask)) is not None]
        found = [(digest, z) for digest, z in found if digest in self._profiles]
        if not found:
            return row
        digest, z = max(found, key=lambda one: one[1])
        weighed = replace(self._candidate(digest, z, 0), evidence="weights", nearest="")
        others = [candidate for candidate in row.candidates if candidate.digest != digest]
        return replace(row, candidates=(weighed, *others)[:CONSIDERED], mode="top1")

    def _heard(
        self, row: _Row, x: Array, opinion: Opinion | None, mask: Collection[str] | None, policy: Policy
    ) -> _Row:
        """The row after an agent's say."""
        if opinion is None:
            return row
        assert self._cards is not None
        digest = self._meant(opinion.card, mask)
        scored = self._cards.exact(x[None], [digest])[0]
        named = self._candidate(digest, scored.values[0], int(scored.nearest[0]))
        others = [candidate for candidate in row.candidates if candidate.digest != digest]
        if opinion.use == "prior":
            cards = len(self._cards) if mask is None else len(mask)
            shifted = replace(named, score=named.score + opinion.log_odds(cards))
            ranked = sorted([shifted, *others], key=lambda one: (-one.score, one.digest))
            note = f"with a prior of {opinion.confidence:.2f} for {named.name}"
            return replace(row, candidates=tuple(ranked[:CONSIDERED]), note=note)
        if self._accepts(self._with_evidence([named], [x], policy)[0], policy):
            return _Row(candidates=(named, *others)[:CONSIDERED], mode="manual", note="the agent's choice")
        return replace(row, mode="top2", note=f"the agent's choice, {named.name}, does not fit and was vetoed")

    def _meant(self, card: str, mask: Collection[str] | None) -> str:
        """The digest of the card that an opinion names, among those that may be chosen."""
        allowed = [digest for digest in self._profiles if mask is None or digest in mask]
        meant = [digest for digest in allowed if card in (digest, self._profiles[digest].name)]
        if not meant:
            names = sorted({self._profiles[digest].name for digest in allowed})
            raise RoutingError(f"expected a card out of {', '.join(names) or 'none'}, got {card!r}")
        return meant[-1]

    def _asked(self, rows: Sequence[_Row], x: Array, policy: Policy) -> list[_Row]:
        """The rows with the evidence that their mode needs: of each card asked once for all rows that consider it."""
        places = [
            (row, rank) for row, one in enumerate(rows) for rank in range(min(_considered(one), len(one.candidates)))
        ]
        told = self._with_evidence(
            [rows[row].candidates[rank] for row, rank in places], [x[row] for row, _ in places], policy
        )
        candidates = [list(row.candidates) for row in rows]
        for (row, rank), candidate in zip(places, told, strict=True):
            candidates[row][rank] = candidate
        return [replace(row, candidates=tuple(of_row)) for row, of_row in zip(rows, candidates, strict=True)]

    def _with_evidence(self, candidates: Sequence[Candidate], x: Sequence[Array], policy: Policy) -> list[Candidate]:
        by_card: dict[str, list[int]] = defaultdict(list)
        for place, candidate in enumerate(candidates):
            by_card[candidate.digest].append(place)
        told = list(candidates)
        for digest, places in by_card.items():
            profile, prompts = self._profiles[digest], np.stack([x[place] for place in places])
            p_values, cosines = profile.p_values(prompts, self.probe, policy.alpha), profile.cosines(prompts)
            for at, place in enumerate(places):
                p_value = None if p_values is None else float(p_values[at])
                told[place] = replace(candidates[place], p_value=p_value, cosine=float(cosines[at]))
        return told

    @staticmethod
    def _accepts(candidate: Candidate, policy: Policy) -> bool:
        if candidate.evidence == "weights":
            return candidate.score >= policy.least_z
        if candidate.p_value is not None:
            return candidate.p_value >= policy.alpha
        return candidate.cosine is not None and candidate.cosine >= policy.threshold

    def _decided(self, rows: Sequence[_Row], policy: Policy) -> Gates:
        accepted = [[self._accepts(candidate, policy) for candidate in row.candidates] for row in rows]
        weights = [_weights(row, ok, policy) for row, ok in zip(rows, accepted, strict=True)]
        decisions = [_decision(row, chosen, policy) for row, chosen in zip(rows, weights, strict=True)]
        names = {digest: profile.name for digest, profile in self._profiles.items()}
        return Gates.of(weights, names, decisions)


_NOTHING = RowScores(keys=(), values=np.zeros(0), nearest=np.zeros(0, dtype=np.intp))


def _considered(row: _Row) -> int:
    return 1 if row.mode in ("top1", "manual") else CONSIDERED


def _weights(row: _Row, accepted: Sequence[bool], policy: Policy) -> dict[str, float]:
    """Digest → weight of the cards that one row uses."""
    if not any(accepted):
        return {}
    mode: Mode = "top1" if row.mode == "manual" else row.mode
    gates = gate(
        torch.tensor([[candidate.score for candidate in row.candidates]], dtype=torch.float64),
        mode,
        mask=torch.tensor([list(accepted)]),
        temperature=policy.temperature,
        threshold=policy.least_share,
        max_experts=policy.max_experts,
    )[0].tolist()
    return {one.digest: weight for one, weight in zip(row.candidates, gates, strict=True) if weight > 0}


def _decision(row: _Row, weights: Mapping[str, float], policy: Policy) -> Decision:
    best = row.candidates[0] if row.candidates else None
    why = _reason(row, weights, policy)
    return Decision(
        mode="override" if row.mode == "manual" else row.mode,
        why=f"{why}; {row.note}" if row.note else why,
        abstained=not weights,
        alpha=policy.alpha,
        threshold=policy.threshold,
        p_value=None if best is None else best.p_value,
        candidates=row.candidates,
    )


def _reason(row: _Row, weights: Mapping[str, float], policy: Policy) -> str:
    if not row.candidates:
        return "no card is known for this base model"
    if not weights:
        return f"no card fits: the nearest, {_measured(row.candidates[0], policy)}"
    used = [candidate for candidate in row.candidates if candidate.digest in weights]
    near = f": it is near “{used[0].nearest}”" if used[0].nearest else ""
    return ", ".join(_measured(one, policy) for one in used) + near


def _measured(candidate: Candidate, policy: Policy) -> str:
    """A card and how well it fits, beside what was asked."""
    if candidate.evidence == "weights":
        return f"{candidate.name} by its weights, z {candidate.score:.1f} (asked {policy.least_z:g})"
    if candidate.p_value is not None:
        return f"{candidate.name} p {candidate.p_value:.3f} (asked {policy.alpha:g})"
    return f"{candidate.name} by its {candidate.evidence} {candidate.cosine or 0:.2f} (asked {policy.threshold:.2f})"


__all__ = ["LoRARouter", "Router"]
