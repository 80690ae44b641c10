"""A router that is itself a LoRA: asked which adapter should handle a text, it writes the adapter's name.

Router and experts share one loaded base model: a forward pass with the router's adapter chooses, further ones with the
chosen expert's answer. What is written is constrained to the names, and each name's probability is exact.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import torch
from torch import Tensor

from arrowmoe.base_model import BaseModel
from arrowmoe.base_names import same_base
from arrowmoe.errors import RoutingError
from arrowmoe.features import Features
from arrowmoe.lora.slots import LoadedLoRA
from arrowmoe.routing.constrained import Trie, choose
from arrowmoe.routing.dataset import NONE, RoutingExample, routing_prompt
from arrowmoe.routing.gates import Candidate, Decision, Gates
from arrowmoe.routing.policy import CONSIDERED
from arrowmoe.routing.profile import Describable
from evolution.fine_tuning import FineTuning, Pair, fine_tune
from registry.card import LoRACard
from registry.manifest import ROUTES

MODE: Final = "generative"
DEFAULT_THRESHOLD: Final = 0.5
BATCH_ROWS: Final = 32


class Host(Protocol):
    """What the router needs of an engine."""

    @property
    def base(self) -> BaseModel:
        """The base model, with the adapters it holds."""

    def hold(self, card: LoRACard) -> LoadedLoRA:
        """Load a card beside those that are loaded."""

    def computing(self, gates: Gates) -> AbstractContextManager[None]:
        """Be the only one to run forward passes, with `gates`."""


@dataclass(frozen=True, kw_only=True)
class _Entry:
    digest: str
    base_name: str | None


class GenerativeRouter:
    """Routes by the probability that a router LoRA gives each card's name, among the names that may be chosen.

    The likeliest card is chosen with weight 1 if its probability is at least `threshold`; below, or where the router
    was taught to write "none" and that is likelier, the row abstains: bare base. Names that a mask or a missing card
    leaves out take no part: the others' probabilities are normalised again.
    """

    def __init__(self, engine: Host, card: LoRACard, *, threshold: float = DEFAULT_THRESHOLD) -> None:
        if not 0 <= threshold <= 1:
            raise RoutingError(f"expected a threshold between 0 and 1, got {threshold}")
        self.threshold = threshold
        self.card = card
        self.names = routes_of(card)
        self._engine = engine
        self._trie = Trie(engine.base, card.manifest.training[ROUTES])
        self._entries: dict[str, _Entry] = {}
        engine.hold(card)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def embedder(self) -> str:
        """Name of the features: texts, read by this router itself."""
        return f"{self._engine.base.name}#text"

    def register_card(self, card: Describable) -> None:
        """Make a card choosable; one of the same name is replaced. Raises `RoutingError` for a name not trained on."""
        if card.name not in self.names:
            raise RoutingError(
                f"router {self.card.name!r} was trained to name {', '.join(self.names)}, got card {card.name!r}, "
                "which it cannot name",
                hint="train it again on examples of all the cards: `arrowmoe router train --kind generative`",
            )
        self._entries[card.name] = _Entry(digest=card.digest, base_name=card.base_name)

    def unregister(self, digest: str) -> bool:
        """Forget a card; whether it was choosable."""
        kept = {name: entry for name, entry in self._entries.items() if entry.digest != digest}
        found = len(kept) < len(self._entries)
        self._entries = kept
        return found

    def features(self, texts: Sequence[str]) -> Features:
        """Features of `texts`: the texts themselves, without vectors."""
        empty = np.zeros((len(texts), 0), dtype=np.float32)
        return Features(texts=tuple(texts), vectors=empty, embedder=self.embedder)

    def route_texts(self, texts: Sequence[str], *, base: str | None = None) -> Gates:
        """Gates for `texts` over the cards made for base model `base` (None: all)."""
        entries = self._entries.values()
        mask = {entry.digest for entry in entries if entry.base_name is not None and same_base(entry.base_name, base)}
        return self.route(self.features(texts), mask=None if base is None else mask)

    def route(self, features: Features, *, mask: Collection[str] | None = None) -> Gates:
        """Gates with one row per row of `features`, whose texts alone are read; whoever embedded them."""
        digests = {
            name: entry.digest for name, entry in sorted(self._entries.items()) if mask is None or entry.digest in mask
        }
        if not digests:
            nothing = Decision(mode=MODE, why="no card that the router can name is here", abstained=True)
            return Gates.of([{}] * len(features), {}, [nothing] * len(features))
        allowed = [*digests, *([NONE] if NONE in self._trie.strings else [])]
        columns = [self._trie.strings.index(name) for name in allowed]
        probs = self.log_probs_nats(features.texts)[:, columns].softmax(dim=-1)
        decisions = [self._decide(dict(zip(allowed, row.tolist(), strict=True)), digests) for row in probs]
        rows = [{} if decision.abstained else {decision.candidates[0].digest: 1.0} for decision in decisions]
        return Gates.of(rows, {digest: name for name, digest in digests.items()}, decisions)

    def log_probs_nats(self, texts: Sequence[str]) -> Tensor:
        """(rows, routes): log P of writing each route and ending there, over all that could be written."""
        scores = torch.zeros((len(texts), len(self._trie.strings)))
        by_length = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        for start in range(0, len(texts), BATCH_ROWS):
            rows = by_length[start : start + BATCH_ROWS]
            prompts = [routing_prompt(texts[row], self.names) for row in rows]
            gates = Gates.of([{self.card.digest: 1.0}] * len(rows), {self.card.digest: self.card.name})
            choices = choose(self._engine.base, prompts, self._trie, partial(self._engine.computing, gates))
            scores[rows] = choices.log_probs_nats.cpu()
        return scores

    def _decide(self, probs: Mapping[str, float], digests: Mapping[str, str]) -> Decision:
        ranked = sorted(digests, key=lambda name: (-probs[name], name))
        best, none = ranked[0], probs.get(NONE, 0.0)
        abstained = probs[best] < self.threshold or none > probs[best]
        return Decision(
            mode=MODE,
            why=_reason(best, probs[best], none, self.threshold, abstained=abstained),
            abstained=abstained,
            threshold=self.threshold,
            candidates=tuple(
                Candidate(digest=digests[name], name=name, score=probs[name]) for name in ranked[:CONSIDERED]
            ),
        )


def train_router_lora(
    base: BaseModel, examples: Sequence[RoutingExample], tuning: FineTuning, *, name: str = "router"
) -> LoRACard:
    """Train a LoRA that writes the name of an example's card, or "none" where it has none.

    `base` holds no adapters, and is left as it was. The names are those that occur in `examples`; the router can write
    no other. Raises `RoutingError`.
    """
    cards = sorted({example.card for example in examples if example.card is not None})
    if len(cards) < 2:
        raise RoutingError(f"expected examples of at least two cards, got {len(cards)}, so there is nothing to route")
    pairs = [Pair(prompt=routing_prompt(row.text, cards), answer=row.card or NONE) for row in examples]
    routes = [*cards, *([NONE] if any(row.card is None for row in examples) else [])]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        peft = Path(directory) / name
        fine_tune(base.model, base.tokenizer, pairs, tuning, base_name=base.name, directory=peft)
        training = {ROUTES: routes, "seconds": time.perf_counter() - start, **asdict(tuning)}
        return LoRACard.from_peft(peft, training=training, description=f"Routes to: {', '.join(cards)}.")


def extend(
    card: LoRACard, base: BaseModel, examples: Sequence[RoutingExample], tuning: FineTuning, *, version: str
) -> LoRACard:
    """The router `card` trained anew, so that it can name new cards too; the new card names it as its parent.

    `examples` are of the new cards and of all the old ones. Raises `RoutingError` where an old one has none.
    """
    forgotten = set(routes_of(card)) - {example.card for example in examples}
    if forgotten:
        raise RoutingError(
            f"expected examples of every card that {card.name!r} names, got none of {', '.join(sorted(forgotten))}",
            hint="give examples of the old cards too; a router forgets what it is not shown",
        )
    trained = train_router_lora(base, examples, tuning, name=card.name)
    return trained.describe(version=version, parents=[card.digest])


def routes_of(card: LoRACard) -> tuple[str, ...]:
    """The names of cards that a router card was trained to write. Raises `RoutingError` for another kind of card."""
    routes = card.manifest.training.get(ROUTES)
    if not isinstance(routes, list) or not all(isinstance(route, str) for route in routes):
        raise RoutingError(
            f"expected a router's card, got {card.name!r}, whose training says nothing of {ROUTES}",
            hint="`arrowmoe router train --kind generative` trains one",
        )
    return tuple(route for route in routes if route != NONE)


def _reason(best: str, prob: float, none: float, threshold: float, *, abstained: bool) -> str:
    if not abstained:
        return f"the router writes {best} with probability {prob:.2f} (asked {threshold:.2f})"
    if none > prob:
        return f"the router writes {NONE} with probability {none:.2f}; the likeliest card, {best}, has {prob:.2f}"
    return f"no card fits: the likeliest, {best}, has probability {prob:.2f} where {threshold:.2f} is asked"


__all__ = ["GenerativeRouter", "Host", "extend", "routes_of", "train_router_lora"]
