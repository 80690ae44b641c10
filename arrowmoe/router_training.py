"""What stands behind `router train`: a head on the embedder's features or through a base model, or a router LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from arrowmoe.base_model import BaseModel
from arrowmoe.describing import indexed, read_dataset
from arrowmoe.errors import RoutingError, UnknownAdapterError
from arrowmoe.features import Featurizer
from arrowmoe.router_commands import Json, Workbench
from arrowmoe.routing import heads
from arrowmoe.routing.dataset import RoutingExample
from arrowmoe.routing.generative import routes_of, train_router_lora
from arrowmoe.routing.heads import HeadConfig, RouterHead
from arrowmoe.routing.mixed import MultiLoRAWithRouter
from arrowmoe.routing.prompting import PromptFeaturizer, answer_batch, balanced_batches, held_out
from arrowmoe.routing.training import Stage1, Stage2, TrainingReport, train_stage1, train_stage2, train_stage3
from evolution.fine_tuning import FineTuning
from registry.card import LoRACard

BATCH_ROWS = 16
HELD_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class HeadTraining:
    """How a head is trained; `steps` are those of its last stage, `layer` whose hidden states Stages 2 and 3 read."""

    stage: int = 1
    base: str
    layer: int = 4
    steps: int | None = None
    seed: int = 0


def train_head(bench: Workbench, data: Path, how: HeadTraining, out: Path) -> Json:
    """Train a head up to stage `how.stage`, write it to `out`; Stage 3 publishes its cards' new versions.

    Stage 1 alone reads the embedder; Stages 2 and 3 read the base model that answers, and need rows with answers.
    """
    examples = read_dataset(data)
    names = sorted({row.card for row in examples if row.card is not None})
    through = None if how.stage == 1 else _through_base(bench, examples, names, how)
    featurizer: Featurizer = bench.featurizer if through is None else through.featurizer
    head, first = _on_labels(bench, featurizer, examples, names, how)
    stages, published = [_told(1, first, names)], list[Json]()
    if through is not None:
        mixed = MultiLoRAWithRouter(through.base, through.cards, head, through.featurizer.hidden)
        stages += _later_stages(bench, mixed, through.answered, names, how)
        published = _published(bench, mixed) if how.stage == 3 else []
    heads.save(head.cpu(), names, out, embedder=featurizer.embedder)
    return {
        "kind": "mlp",
        "path": str(out),
        "embedder": featurizer.embedder,
        "names": names,
        "null": head.config.null,
        "stages": stages,
        "published": published,
    }


def train_generative(bench: Workbench, data: Path, *, base: str, name: str, steps: int | None, seed: int) -> Json:
    """Train a router LoRA for a base model, and publish it as the next version of card `name`."""
    examples = read_dataset(data)
    tuning = FineTuning(seed=seed) if steps is None else FineTuning(seed=seed, steps=steps)
    model = bench.engine(base).base
    bench.on_progress(f"training {name}", 0, 0)
    card = train_router_lora(model, examples, tuning, name=name)
    entry = bench.registry.publish(card.describe(version=bench.registry.next_version(name)))
    return {
        "kind": "generative",
        "name": entry.name,
        "version": entry.version,
        "digest": entry.digest,
        "names": list(routes_of(card)),
        "steps": tuning.steps,
        "seconds": card.manifest.training["seconds"],
    }


@dataclass(frozen=True, kw_only=True, eq=False)
class _Through:
    """What Stages 2 and 3 need beside the head: all of it is looked for before anything is trained."""

    base: BaseModel
    featurizer: PromptFeaturizer
    cards: Sequence[LoRACard]
    answered: Sequence[RoutingExample]


def _through_base(
    bench: Workbench, examples: Sequence[RoutingExample], names: Sequence[str], how: HeadTraining
) -> _Through:
    answered = [row for row in examples if row.card is not None and row.answer is not None]
    if not answered:
        raise RoutingError(
            f"expected rows with a card and an answer for stage {how.stage}, got {len(examples)} rows without",
            hint='give rows {"text", "card", "answer"}, or train stage 1, which needs no answers',
        )
    base = bench.engine(how.base).base
    cards = _cards(bench, names, base.name)
    return _Through(base=base, featurizer=PromptFeaturizer(base, layer=how.layer), cards=cards, answered=answered)


def _on_labels(
    bench: Workbench,
    featurizer: Featurizer,
    examples: Sequence[RoutingExample],
    names: Sequence[str],
    how: HeadTraining,
) -> tuple[RouterHead, TrainingReport]:
    """Stage 1; rows out of scope, if there are any, train the null expert."""
    bench.on_progress("stage 1", 0, 0)
    features = torch.from_numpy(featurizer.features([row.text for row in examples]).vectors)
    labels = torch.tensor([len(names) if row.card is None else names.index(row.card) for row in examples])
    null = any(row.card is None for row in examples)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(how.seed)
        head = RouterHead(HeadConfig(d_hidden=features.shape[1], n_cards=len(names), null=null))
    settings = Stage1(seed=how.seed)
    if how.steps is not None and how.stage == 1:
        settings = replace(settings, steps=how.steps)
    return head, train_stage1(head, features, labels, settings=settings)


def _later_stages(
    bench: Workbench,
    mixed: MultiLoRAWithRouter,
    answered: Sequence[RoutingExample],
    names: Sequence[str],
    how: HeadTraining,
) -> list[Json]:
    """Stage 2, and 3 if it is asked for, on rows with answers; what each did."""
    train, held = held_out(answered, HELD_SHARE, seed=how.seed)
    validation = [answer_batch(mixed.base, held[at : at + BATCH_ROWS]) for at in range(0, len(held), BATCH_ROWS)]
    told: list[Json] = []
    for stage, run in ((2, train_stage2), (3, train_stage3))[: how.stage - 1]:
        bench.on_progress(f"stage {stage}", 0, 0)
        settings = Stage2(seed=how.seed)
        if how.steps is not None and stage == how.stage:
            settings = replace(settings, steps=how.steps)
        batches = balanced_batches(mixed.base, train, BATCH_ROWS, seed=how.seed)
        told.append(_told(stage, run(mixed, batches, validation=validation, settings=settings), names))
    return told


def _cards(bench: Workbench, names: Sequence[str], base: str) -> list[LoRACard]:
    """The newest version of each card that was made for the base model."""
    here = {one.entry.name: one.card for one in indexed(bench.registry, base)}
    if missing := [name for name in names if name not in here]:
        raise UnknownAdapterError(
            f"expected cards for {base} called {', '.join(names)}, got none called {', '.join(missing)}",
            hint="`arrowmoe skills ls` lists the cards of this home with their base models",
        )
    return [here[name] for name in names]


def _published(bench: Workbench, mixed: MultiLoRAWithRouter) -> list[Json]:
    registry = bench.registry
    made = [card.describe(version=registry.next_version(card.name)) for card in mixed.trained_cards("trained")]
    entries = [registry.publish(card) for card in made]
    return [{"name": entry.name, "version": entry.version, "digest": entry.digest} for entry in entries]


def _told(stage: int, report: TrainingReport, names: Sequence[str]) -> Json:
    return {
        "stage": stage,
        "steps": report.steps,
        "best": report.best,
        "stopped_why": report.stopped_why,
        "losses": list(report.losses),
        "validation": list(report.validation),
        "marginal": dict(zip(names, report.marginal, strict=True)),
    }


__all__ = ["HeadTraining", "train_generative", "train_head"]
