"""Trained routers: small networks from features to one logit per card.

They know neither cards nor base models: a saved head carries the names its columns stand for and the embedder whose
features it was trained on, and refuses any other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from arrowmoe.errors import RoutingError
from arrowmoe.routing.balance import load_balance_loss
from arrowmoe.routing.modes import gate, probabilities

_METADATA = "arrowmoe.head"


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """Sizes of a head: features `d_hidden` (+ `d_side`) wide, `width` inside, a logit per card (+ the null expert)."""

    d_hidden: int
    n_cards: int
    d_side: int = 0
    width: int = 256
    dropout: float = 0.1
    null: bool = False

    def __post_init__(self) -> None:
        if min(self.d_hidden, self.n_cards, self.width) < 1 or self.d_side < 0 or not 0 <= self.dropout < 1:
            raise RoutingError(f"expected sizes of at least 1 and dropout in [0, 1), got {self}")

    @property
    def n_logits(self) -> int:
        """Columns of the logits."""
        return self.n_cards + self.null


class Trunk(nn.Module):
    """Features, side features → LayerNorm → projection → the first layer of the MLP: (rows, width)."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        d_in = config.d_hidden + config.d_side
        self.config = config
        self.norm = nn.LayerNorm(d_in)
        self.projection = nn.Linear(d_in, config.width)
        self.layer = nn.Linear(config.width, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden: Tensor, side: Tensor | None = None) -> Tensor:
        """Hidden (rows, d_hidden) and side (rows, d_side), if the head has one → (rows, width)."""
        got = (hidden.shape[-1], 0 if side is None else side.shape[-1])
        if got != (self.config.d_hidden, self.config.d_side):
            expected = (self.config.d_hidden, self.config.d_side)
            raise RoutingError(f"expected features and side features {expected} wide, got {got}")
        features = hidden if side is None else torch.cat([hidden, side], dim=-1)
        projected = self.projection(self.norm(features))
        states: Tensor = self.dropout(nn.functional.gelu(self.layer(projected)))
        return states


class RouterHead(nn.Module):
    """LayerNorm, projection and a two-layer MLP with dropout: features → logits, one per card (and the null expert)."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        self.trunk = Trunk(config)
        self.output = nn.Linear(config.width, config.n_logits)

    def forward(self, hidden: Tensor, side: Tensor | None = None) -> Tensor:
        """Hidden (rows, d_hidden), side (rows, d_side) → logits (rows, n_cards [+ 1])."""
        logits: Tensor = self.output(self.trunk(hidden, side))
        return logits


@dataclass(frozen=True, kw_only=True, eq=False)
class SavedHead:
    """A head, the name of the card that each column stands for, and the embedder of its features."""

    head: RouterHead
    names: tuple[str, ...]
    embedder: str


def save(head: RouterHead, names: Sequence[str], path: Path | str, *, embedder: str) -> None:
    """Write a head as safetensors, with its names, sizes and embedder as metadata. Raises `RoutingError`."""
    _check_names(head.config, names)
    about = {"config": asdict(head.config), "names": list(names), "embedder": embedder}
    weights = {name: tensor.detach().contiguous() for name, tensor in head.state_dict().items()}
    save_file(weights, str(path), metadata={_METADATA: json.dumps(about)})


def load(path: Path | str, *, embedder: str | None = None) -> SavedHead:
    """Read a head, in eval mode. Raises `RoutingError` for another file, or one made for another `embedder`."""
    try:
        with safe_open(str(path), framework="pt") as file:
            about = json.loads((file.metadata() or {})[_METADATA])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        head = RouterHead(HeadConfig(**about["config"]))
        head.load_state_dict(weights)
        saved = SavedHead(head=head.eval(), names=tuple(about["names"]), embedder=str(about["embedder"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise RoutingError(
            f"{path}: expected a router head, got: {error}", hint="`arrowmoe router train --out FILE` writes one"
        ) from error
    _check_names(head.config, saved.names)
    if embedder not in (None, saved.embedder):
        raise RoutingError(
            f"{path}: expected a head for features by {embedder}, got one for {saved.embedder}",
            hint="train a head on these features, or use the featurizer that it was trained with",
        )
    return saved


def _check_names(config: HeadConfig, names: Sequence[str]) -> None:
    if len(names) != config.n_cards or len(set(names)) != len(names):
        raise RoutingError(f"expected {config.n_cards} distinct card names, got {list(names)}")


@dataclass(frozen=True, kw_only=True)
class MultiExpertConfig:
    """Settings of `MultiExpertRouter`; `threshold` is that of p, and `topk` takes `max_experts` whatever their p."""

    d_hidden: int
    n_experts: int
    threshold: float = 0.3
    max_experts: int = 4
    capacity_factor: float = 1.25
    load_balancing_weight: float = 0.01
    router_type: Literal["threshold", "topk"] = "threshold"
    use_router_bias: bool = True

    def __post_init__(self) -> None:
        if min(self.d_hidden, self.n_experts, self.max_experts) < 1 or self.capacity_factor <= 0:
            raise RoutingError(f"expected sizes of at least 1 and a capacity factor above 0, got {self}")
        if self.router_type not in ("threshold", "topk"):
            raise RoutingError(f"expected router_type threshold or topk, got {self.router_type!r}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Routed:
    """`weights` (rows, n) after the capacity; `dropped` (rows, n) bool: chosen, but the expert was full."""

    weights: Tensor
    logits: Tensor
    dropped: Tensor
    balance_loss: Tensor


class MultiExpertRouter(nn.Module):
    """A linear router that gives each row none to `max_experts` experts, and each expert a limited number of rows."""

    def __init__(self, config: MultiExpertConfig) -> None:
        super().__init__()
        self.config = config
        self.router = nn.Linear(config.d_hidden, config.n_experts, bias=config.use_router_bias)

    def forward(self, hidden: Tensor) -> Routed:
        """Hidden (rows, d_hidden) → weights; an expert that is full drops the later rows, as Switch does.

        Dropped weights are 0 and the row's others stay as they are. `balance_loss` is already weighted.
        """
        config = self.config
        logits: Tensor = self.router(hidden)
        threshold = config.threshold if config.router_type == "threshold" else 0.0
        weights = gate(logits, "threshold", threshold=threshold, max_experts=config.max_experts)
        chosen = weights > 0
        dropped = chosen & (chosen.cumsum(dim=0) > self.capacity(len(hidden)))
        balance_loss = config.load_balancing_weight * load_balance_loss(probabilities(logits), chosen)
        return Routed(weights=weights * ~dropped, logits=logits, dropped=dropped, balance_loss=balance_loss)

    def capacity(self, rows: int) -> int:
        """Rows that one expert takes of a batch: ⌈capacity_factor · rows · k / n⌉, arXiv:2101.03961, eq. 3."""
        share = min(self.config.max_experts, self.config.n_experts) / self.config.n_experts
        return math.ceil(self.config.capacity_factor * rows * share)
