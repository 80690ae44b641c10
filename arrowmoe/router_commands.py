"""What stands behind `skills describe` and `router fit`: the cards of a home described for routers.

All of it happens in the process that asks, node or no node: a running node sees new versions in the shared registry.
Results are values that JSON can hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from arrowmoe.base_model import load_base_model
from arrowmoe.describing import (
    Describer,
    Progress,
    RememberingFeaturizer,
    read_dataset,
    read_prompts,
)
from arrowmoe.engine import ArrowEngine
from arrowmoe.features import TextFeaturizer
from arrowmoe.router_view import summary
from arrowmoe.routing.dataset import RoutingDataError, RoutingExample
from arrowmoe.routing.policy import Policy
from arrowmoe.routing.probe import Probe, measured
from arrowmoe.settings import Settings
from registry.card import LoRACard
from registry.entries import CardEntry
from registry.store import Registry

Json = dict[str, Any]


class Workbench:
    """A home's registry with the embedder of its settings, which is loaded when it is first needed."""

    def __init__(self, registry: Registry, settings: Settings, on_progress: Progress) -> None:
        self.registry, self.settings, self.on_progress = registry, settings, on_progress
        self._engines: dict[str, ArrowEngine] = {}

    @cached_property
    def featurizer(self) -> RememberingFeaturizer:
        """Features by the settings' embedder."""
        return RememberingFeaturizer(TextFeaturizer(self.engine(self.settings.embedder)), self.on_progress)

    @cached_property
    def probe(self) -> Probe:
        """The probe in the embedder's space."""
        return measured(self.featurizer, self.settings.cache_dir)

    def engine(self, model: str) -> ArrowEngine:
        """The engine of a base model, loaded once."""
        if model not in self._engines:
            self.on_progress(f"loading {model}", 0, 0)
            chosen = self.settings
            quantise = None if model == chosen.embedder else chosen.engine.quantised
            base = load_base_model(
                model, device=chosen.device, dtype=chosen.dtype, cache=chosen.cache_dir, quantise=quantise
            )
            self._engines[model] = ArrowEngine(base, registry=self.registry)
        return self._engines[model]

    def policy(self, **changes: Any) -> Policy:
        """The settings' policy, with changes that are not None."""
        given = {name: value for name, value in changes.items() if value is not None}
        return Policy(**self.settings.router.model_dump() | given)


@dataclass(frozen=True, kw_only=True)
class Description:
    """How a card is described: its prompts' file, or none for the examples that it shows; None keeps its words."""

    examples: Path | None = None
    calibration: Path | None = None
    description: str | None = None
    min_prompts: int
    budget_bytes: int


def describe(bench: Workbench, ref: str, how: Description, *, publish: bool) -> Json:
    """A new version of a card with statistics of prompts; kept in the registry if `publish`."""
    entry = bench.registry.entry(ref)
    prompts, others = _prompts(entry, how.examples)
    held, _ = read_prompts(how.calibration, entry.name) if how.calibration else ([], 0)
    changes = {} if how.description is None else {"description": how.description}
    card = _described(bench, entry, prompts, held, how, changes)
    return _told(bench, entry, card, prompts=len(prompts), held_out=len(held), publish=publish) | {"others": others}


def undescribe(bench: Workbench, ref: str, *, description: str | None, publish: bool) -> Json:
    """A new version of a card without statistics: it is routed to by its words."""
    entry = bench.registry.entry(ref)
    changes = {} if description is None else {"description": description}
    card = _next(bench, entry, changes).with_routing(None)
    return _told(bench, entry, card, prompts=0, held_out=0, publish=publish) | {"others": 0}


def fit(bench: Workbench, data: Path, how: Description) -> list[Json]:
    """`describe` for every card that a routing dataset names; all are computed before any is published."""
    by_card = _by_card(read_dataset(data))
    held_by_card = _by_card(read_dataset(how.calibration)) if how.calibration else {}
    if not by_card:
        raise RoutingDataError(f"{data}: expected rows that name a card, got rows out of scope only")
    if unknown := held_by_card.keys() - by_card.keys():
        raise RoutingDataError(f"{how.calibration}: expected prompts of the cards of {data}, got {sorted(unknown)} too")
    entries = {name: bench.registry.entry(name) for name in by_card}
    made = [
        (name, _described(bench, entry, by_card[name], held_by_card.get(name, []), how, {}))
        for name, entry in entries.items()
    ]
    return [
        _told(
            bench,
            entries[name],
            card,
            prompts=len(by_card[name]),
            held_out=len(held_by_card.get(name, [])),
            publish=True,
        )
        for name, card in made
    ]


def _prompts(entry: CardEntry, file: Path | None) -> tuple[list[RoutingExample], int]:
    """The prompts that describe a card: those of the file, else the examples that the card shows."""
    if file is not None:
        return read_prompts(file, entry.name)
    return [RoutingExample(text=text, card=entry.name) for text in entry.examples if text.strip()], 0


def _described(
    bench: Workbench,
    entry: CardEntry,
    prompts: Sequence[RoutingExample],
    held: Sequence[RoutingExample],
    how: Description,
    changes: Mapping[str, Any],
) -> LoRACard:
    describer = Describer(
        featurizer=bench.featurizer, probe=bench.probe, min_prompts=how.min_prompts, budget_bytes=how.budget_bytes
    )
    return describer.described(_next(bench, entry, changes), prompts, held_out=held)


def _next(bench: Workbench, entry: CardEntry, changes: Mapping[str, Any]) -> LoRACard:
    """The next version of a card, with the same weights."""
    version = bench.registry.next_version(entry.name)
    return bench.registry.get(entry.digest).describe(version=version, parents=[entry.digest], **changes)


def _told(bench: Workbench, entry: CardEntry, card: LoRACard, *, prompts: int, held_out: int, publish: bool) -> Json:
    kept = bench.registry.publish(card, tags=entry.tags) if publish else None
    return {
        "name": card.name,
        "version": card.version,
        "digest": None if kept is None else kept.digest,
        "parent": entry.digest,
        "prompts": prompts,
        "held_out": held_out,
        "statistics": summary(card),
    }


def _by_card(examples: Sequence[RoutingExample]) -> dict[str, list[RoutingExample]]:
    found: dict[str, list[RoutingExample]] = {}
    for example in examples:
        if example.card is not None:
            found.setdefault(example.card, []).append(example)
    return found


__all__ = ["Description", "Json", "Workbench", "describe", "fit", "undescribe"]
