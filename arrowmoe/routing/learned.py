"""A trained head as a router: the softmax of its logits over the cards that are there, and none below a probability."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from arrowmoe.base_names import same_base
from arrowmoe.errors import RoutingError
from arrowmoe.features import Features, Featurizer
from arrowmoe.routing.gates import Candidate, Decision, Gates
from arrowmoe.routing.heads import SavedHead
from arrowmoe.routing.modes import gate, probabilities
from arrowmoe.routing.policy import CONSIDERED, Policy
from arrowmoe.routing.profile import Describable

DEFAULT_LEAST = 0.5
EVIDENCE = "trained head"


class HeadRouter:
    """Routes over those of `cards` (by name) that the head was trained to name; the policy says how many share.

    A row abstains where the likeliest card's probability is below `least`, or the null expert, if the head has one, is
    likelier. Probabilities are normalised over the cards that may be chosen. Raises `RoutingError` for a head of
    another embedder, or one that names none of `cards`.
    """

    def __init__(
        self,
        featurizer: Featurizer,
        saved: SavedHead,
        cards: Mapping[str, Describable],
        *,
        policy: Policy | None = None,
        least: float = DEFAULT_LEAST,
    ) -> None:
        if saved.embedder != featurizer.embedder:
            raise RoutingError(f"expected a head for features by {featurizer.embedder}, got one for {saved.embedder}")
        self._featurizer, self._saved = featurizer, saved
        self._policy, self._least = policy or Policy(), least
        self._cards = {column: cards[name] for column, name in enumerate(saved.names) if name in cards}
        if not self._cards:
            raise RoutingError(
                f"expected cards that the head names ({', '.join(saved.names)}), got {', '.join(cards) or 'none'}",
                hint="import these cards, or train a head on a dataset of those that are here",
            )

    def features(self, texts: Sequence[str]) -> Features:
        """Features of `texts` by the featurizer that the head was trained on."""
        return self._featurizer.features(texts)

    def for_base(self, base: str) -> set[str]:
        """Digests of the cards that say they were made for base model `base`."""
        cards = self._cards.values()
        return {card.digest for card in cards if card.base_name is not None and same_base(card.base_name, base)}

    @torch.inference_mode()
    def route(self, features: Features, *, mask: Collection[str] | None = None) -> Gates:
        """Gates with one row per row of `features`; `mask` are the digests that may be chosen, None is all."""
        null, names = self._saved.head.config.null, self._saved.names
        logits = self._saved.head(torch.from_numpy(features.vectors).to(_device(self._saved)))
        allowed = torch.zeros(len(names), dtype=torch.bool, device=logits.device)
        columns = [column for column, card in self._cards.items() if mask is None or card.digest in mask]
        allowed[columns] = True
        probs = probabilities(logits, mask=allowed, null=null)[:, : len(names)]
        weights = gate(
            logits,
            self._policy.mode,
            mask=allowed,
            threshold=self._policy.least_share,
            max_experts=self._policy.max_experts,
            null=null,
        )
        weights = self._sure(probs, weights)
        decisions = [
            self._decision(row, routed, columns)
            for row, routed in zip(probs.tolist(), (weights > 0).any(dim=1).tolist(), strict=True)
        ]
        rows = [{self._cards[at].digest: row[at] for at in columns if row[at] > 0} for row in weights.tolist()]
        return Gates.of(rows, {card.digest: card.name for card in self._cards.values()}, decisions)

    def _sure(self, probs: Tensor, weights: Tensor) -> Tensor:
        """Weights with a row of zeros wherever the router abstains."""
        best = probs.amax(dim=1)
        sure = best >= self._least
        if self._saved.head.config.null:
            sure &= best > 1 - probs.sum(dim=1)
        return weights * sure[:, None]

    def _decision(self, probs: Sequence[float], routed: bool, columns: Sequence[int]) -> Decision:
        ranked = sorted(columns, key=lambda at: (-probs[at], self._cards[at].digest))[:CONSIDERED]
        candidates = [
            Candidate(
                digest=self._cards[at].digest, name=self._cards[at].name, score=float(probs[at]), evidence=EVIDENCE
            )
            for at in ranked
        ]
        return Decision(
            mode=self._policy.mode,
            why=self._reason(candidates, routed),
            abstained=not routed,
            threshold=self._least,
            candidates=tuple(candidates),
        )

    def _reason(self, candidates: Sequence[Candidate], routed: bool) -> str:
        if not candidates:
            return "no card that the head can name may be chosen"
        best = f"{candidates[0].name} has probability {candidates[0].score:.2f} (asked {self._least:.2f})"
        return f"the head says {best}" if routed else f"no card fits: the likeliest, {best}"


def _device(saved: SavedHead) -> torch.device:
    return next(saved.head.parameters()).device


__all__ = ["DEFAULT_LEAST", "HeadRouter"]
