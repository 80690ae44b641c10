"""A nested set as ordinary cards and back: the slow pair, each fast one, or slow with all fast in one card.

A card of a part changes what that part does, so the engine computes a nested set by the gates of its cards: the slow
one at 1 and a fast one at whatever its router gives. Weights go over as the fp32 bits that they are.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from evolution.consolidation import join
from evolution.errors import TrainingError
from evolution.nested import Factors, NestedLoRA, NestedLoRALinear
from registry.card import LoRACard
from registry.manifest import AdapterSpec
from registry.tensor import Role, Tensor

Part = Literal["slow", "sum", "mean"] | int
"""The slow pair, slow + sum or mean of all fast, or a task's fast pair alone."""


def card_of(nested: NestedLoRA, part: Part, *, name: str, **about: Any) -> LoRACard:
    """An unsigned card of one part; `about` are further fields of the manifest (base_name, parents, description …).

    `training["nested"]` says which part of how many tasks it is. Raises `TrainingError` for a task that is not there.
    """
    if isinstance(part, int):
        nested.check(part)
    pairs = {path: _factors_of(nested, layer, part) for path, layer in nested.layers.items()}
    training = {**about.pop("training", {}), "nested": {"part": part, "tasks": nested.tasks}}
    return LoRACard.build(
        name=name,
        adapter=AdapterSpec.of_ranks({path: len(a) for path, (a, _) in pairs.items()}, scaling=nested.scaling),
        tensors=[tensor for path, pair in pairs.items() for tensor in _tensors_of(path, pair)],
        base_architecture=about.pop("base_architecture", type(nested.model).__name__),
        training=training,
        **about,
    )


def load_card(nested: NestedLoRA, part: Literal["slow"] | int, card: LoRACard) -> None:
    """Have the slow pair, or a task's fast one, change what `card` does. Raises `TrainingError` for one that differs.

    The factors keep their bits where the card's scaling is the set's; else the quotient goes into B.
    """
    if isinstance(part, int):
        nested.check(part)
    _check_fits(nested, card)
    spec = card.manifest.adapter
    for path, layer in nested.layers.items():
        a, b = (torch.from_numpy(card.modules[path][role].float32().copy()) for role in (Role.A, Role.B))
        factor = spec.scaling_of(path) / nested.scaling
        pair = layer.slow if part == "slow" else layer.fast[part]
        device = layer.slow.a.device
        pair.become(a.to(device), (b if abs(factor - 1) < 1e-12 else factor * b).to(device))


def _factors_of(nested: NestedLoRA, layer: NestedLoRALinear, part: Part) -> Factors:
    if isinstance(part, int):
        return layer.fast[part].factors()
    if part == "slow":
        return layer.slow.factors()
    share = 1 / nested.tasks if part == "mean" else 1.0
    return join([(layer.slow.factors(), 1.0), *((pair.factors(), share) for pair in layer.fast)])


def _tensors_of(path: str, pair: Factors) -> list[Tensor]:
    return [
        Tensor.from_numpy(path, role, factor.cpu().numpy()) for role, factor in zip((Role.A, Role.B), pair, strict=True)
    ]


def _check_fits(nested: NestedLoRA, card: LoRACard) -> None:
    shapes = {path: (layer.base.in_features, layer.base.out_features) for path, layer in nested.layers.items()}
    found = {}
    for path, tensors in card.modules.items():
        if tensors.keys() == {Role.STATS}:
            continue
        if tensors.keys() != {Role.A, Role.B} or path in card.manifest.adapter.embeddings:
            raise TrainingError(f"expected A and B alone at {path!r}, got {sorted(tensors)}, so it cannot nest")
        found[path] = (tensors[Role.A].shape[1], tensors[Role.B].shape[0])
    odd = sorted(shapes.items() ^ found.items())
    if odd:
        raise TrainingError(
            f"expected the modules of the nested layers in card {card.name!r}, which differ first at {odd[0][0]!r}",
            hint="attach to the targets that the card has",
        )


__all__ = ["Part", "card_of", "load_card"]
