"""What stands behind `router eval|compare`: routers over the cards of a home, judged on labelled prompts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from arrowmoe.base_names import logical_name
from arrowmoe.describing import Indexed, indexed, read_dataset
from arrowmoe.errors import RoutingError
from arrowmoe.features import Features
from arrowmoe.router_commands import Json, Workbench
from arrowmoe.routing import heads
from arrowmoe.routing.by_weights import ByWeights
from arrowmoe.routing.dataset import RoutingExample
from arrowmoe.routing.evaluation import score_router
from arrowmoe.routing.gates import Gates
from arrowmoe.routing.generative import GenerativeRouter
from arrowmoe.routing.learned import HeadRouter
from arrowmoe.routing.metrics import RoutingEvaluation
from arrowmoe.routing.policy import Policy
from arrowmoe.routing.prompting import PromptFeaturizer
from arrowmoe.routing.report import NO_CARD, Example, html
from arrowmoe.routing.router import LoRARouter
from arrowmoe.routing.statistics import CardStatistics
from registry.entries import CardEntry
from registry.logs import get_logger

COMPARED_MODES = ("top1", "top2", "soft", "threshold")
COMPARED_ALPHAS = (0.0, 0.01, 0.05, 0.1)
SHOWN_EXAMPLES = 24
log = get_logger(__name__)


def evaluate(
    bench: Workbench, data: Path, *, base: str | None, mode: str | None, alpha: float | None, report: Path | None
) -> Json:
    """Figures of the closed-form router on a labelled dataset; `report` is where an HTML report is written."""
    examples, cards = _judged(bench, data, base)
    entrant = Entrant(router=_as_a_node(bench, cards, base), cards=cards)
    policy = bench.policy(mode=mode, alpha=alpha)
    entrant = replace(entrant, options={"policy": policy})
    name = _named(policy)
    bench.on_progress("routing", 0, 0)
    evaluation = score_router(entrant, examples)
    if report is not None:
        _write(report, {name: evaluation}, _examples(entrant, examples))
    return {"router": name, "unknown": _unknown(examples, cards), **evaluation.to_json()}


def compare(
    bench: Workbench,
    data: Path,
    *,
    base: str | None,
    causal: str,
    trained: Sequence[Path],
    generative: Sequence[str],
    report: Path | None,
) -> Json:
    """Figures of many routers on one labelled dataset: modes, levels, ablations, and trained ones by file or card.

    `causal` is the base model that generative routers, and heads on hidden states, run on.
    """
    examples, cards = _judged(bench, data, base)
    found: dict[str, RoutingEvaluation] = {}
    for name, entrant in list(_entrants(bench, cards, base, causal, trained, generative)):
        bench.on_progress(f"routing by {name}", len(found), 0)
        found[name] = score_router(entrant, examples)
    if report is not None:
        _write(report, found, ())
    routers = [{"router": name, **evaluation.to_json()} for name, evaluation in found.items()]
    return {"unknown": _unknown(examples, cards), "routers": routers}


class Routes(Protocol):
    """What any router does; most take more options."""

    def features(self, texts: Sequence[str]) -> Features:
        """Features of `texts`."""

    @property
    def route(self) -> Callable[..., Gates]:
        """Features, and the digests that may be chosen → gates."""


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """A router with the options that it is judged with, over `cards` that were chosen for one base model already."""

    router: Routes
    cards: Sequence[Indexed]
    options: Mapping[str, Any] = field(default_factory=dict)

    def features(self, texts: Sequence[str]) -> Features:
        """Features of `texts`."""
        return self.router.features(texts)

    def route(self, features: Features, *, mask: Collection[str] | None = None) -> Gates:
        """Gates with one row per row of `features`."""
        return self.router.route(features, mask=mask, **self.options)

    def for_base(self, base: str) -> set[str]:
        """All of the cards: they were chosen before."""
        return {one.entry.digest for one in self.cards}


def _entrants(
    bench: Workbench,
    cards: Sequence[Indexed],
    base: str | None,
    causal: str,
    trained: Sequence[Path],
    generative: Sequence[str],
) -> Iterator[tuple[str, Entrant]]:
    closed = Entrant(router=_as_a_node(bench, cards, base), cards=cards)
    for mode in COMPARED_MODES:
        for alpha in COMPARED_ALPHAS:
            policy = bench.policy(mode=mode, alpha=alpha)
            yield _named(policy), replace(closed, options={"policy": policy})
    policy = bench.policy(mode="top1")
    without = _closed_form(bench, cards, _without_sketch)
    yield "prototypes alone", Entrant(router=without, cards=cards, options={"policy": policy})
    words = _closed_form(bench, cards, lambda kept: None)
    yield "words alone", Entrant(router=words, cards=cards, options={"policy": policy})
    by_name = {one.entry.name: one.entry for one in cards}
    for path in trained:
        yield f"head {path}", Entrant(router=_head_router(bench, path, by_name, causal), cards=cards)
    for ref in generative:
        yield f"generative {ref}", Entrant(router=_generative(bench, ref, cards, causal), cards=cards)


def _closed_form(
    bench: Workbench, cards: Sequence[Indexed], change: Callable[[CardStatistics | None], CardStatistics | None]
) -> LoRARouter:
    router = LoRARouter(bench.featurizer, policy=bench.policy(), cache=bench.settings.cache_dir)
    for one in cards:
        router.register_card(one.entry, change(one.statistics))
    return router


def _as_a_node(bench: Workbench, cards: Sequence[Indexed], base: str | None) -> LoRARouter:
    """The router of a node with `base`, else with the settings' bases, where mere names are judged by their weights."""
    router = _closed_form(bench, cards, lambda kept: kept)
    profiles = router.profiles()
    silent = [one.card for one in cards if profiles[one.entry.digest].evidence == "name"]
    for model in bench.settings.bases if base is None else (base,):
        known = router.for_base(logical_name(model))
        if fitting := [card for card in silent if card.digest in known]:
            scorer = ByWeights(bench.engine(model))
            scorer.keep(fitting)
            router.by_weights = (*router.by_weights, scorer)
    return router


def _without_sketch(kept: CardStatistics | None) -> CardStatistics | None:
    """Prototypes and counts alone; p-values were made with the sketch, so they go too."""
    if kept is None:
        return None
    return replace(kept, sketch=np.zeros((0, kept.dimension)), calibration=np.zeros(0), calibrated=0)


def _head_router(bench: Workbench, path: Path, cards: Mapping[str, CardEntry], causal: str) -> HeadRouter:
    saved = heads.load(path)
    if saved.embedder == logical_name(bench.settings.embedder):
        return HeadRouter(bench.featurizer, saved, cards, policy=bench.policy())
    featurizer = PromptFeaturizer.called(saved.embedder, bench.engine(causal).base)
    return HeadRouter(featurizer, saved, cards, policy=bench.policy())


def _generative(bench: Workbench, ref: str, cards: Sequence[Indexed], causal: str) -> GenerativeRouter:
    router = GenerativeRouter(bench.engine(causal), bench.registry.get(ref))
    named = [one.entry for one in cards if one.entry.name in router.names]
    if not named:
        raise RoutingError(f"expected cards that router {ref!r} can name ({', '.join(router.names)}), got none of them")
    for entry in named:
        router.register_card(entry)
    return router


def _judged(bench: Workbench, data: Path, base: str | None) -> tuple[list[RoutingExample], list[Indexed]]:
    """Labelled prompts, and the cards to choose from."""
    examples, cards = read_dataset(data), indexed(bench.registry, None if base is None else logical_name(base))
    if not cards:
        raise RoutingError(
            f"expected cards to choose from{f' for {base}' if base else ''}, got none",
            hint="`arrowmoe skills ls` lists the cards of this home with their base models",
        )
    return examples, cards


def _unknown(examples: Sequence[RoutingExample], cards: Sequence[Indexed]) -> list[str]:
    """Cards that the dataset names and no router can choose: each of their prompts counts as an error."""
    named = {example.card for example in examples if example.card is not None}
    return sorted(named - {one.entry.name for one in cards})


def _named(policy: Policy) -> str:
    return f"{policy.mode} α {policy.alpha:g}"


def _examples(entrant: Entrant, examples: Sequence[RoutingExample]) -> list[Example]:
    """Prompts spread evenly over the dataset, and what the router does with them."""
    step = -(-len(examples) // SHOWN_EXAMPLES)
    shown = examples[::step]
    gates = entrant.route(entrant.features([example.text for example in shown]))
    return [
        Example(
            text=example.text,
            gates=gates.attribution(row),
            label=example.card or NO_CARD,
            p_value=gates.decisions[row].p_value,
            why=gates.decisions[row].why,
        )
        for row, example in enumerate(shown)
    ]


def _write(path: Path, named: Mapping[str, RoutingEvaluation], examples: Sequence[Example]) -> None:
    try:
        path.write_text(html(named, examples=examples), encoding="utf-8")
    except OSError as error:
        raise RoutingError(f"the report cannot be written: {error}") from error
    log.info("report_written", path=str(path), routers=len(named))


__all__ = ["compare", "evaluate"]
