"""Gates of their own for each layer, as in MoLE (arXiv:2404.13628): one trunk, one output per layer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from arrowmoe.errors import RoutingError
from arrowmoe.routing.heads import HeadConfig, Trunk

_BLOCK = re.compile(r"^.*?\.\d+(?=\.|$)")


class PerLayerHead(nn.Module):
    """A router head with a shared trunk and logits for each layer in `layers` (path prefixes of modules)."""

    def __init__(self, config: HeadConfig, layers: Sequence[str]) -> None:
        super().__init__()
        if not layers or len(set(layers)) != len(layers):
            raise RoutingError(f"expected distinct layers, at least one, got {list(layers)}")
        self.config = config
        self.layers = tuple(layers)
        self.trunk = Trunk(config)
        self.output = nn.Linear(config.width, len(layers) * config.n_logits)

    def forward(self, hidden: Tensor, side: Tensor | None = None) -> Tensor:
        """Hidden (rows, d_hidden), side (rows, d_side) → logits (rows, layers, n_cards [+ 1])."""
        logits: Tensor = self.output(self.trunk(hidden, side))
        return logits.view(len(logits), len(self.layers), self.config.n_logits)


def layers_of(modules: Iterable[str]) -> tuple[str, ...]:
    """The blocks that module paths are in (`model.layers.3`), in order; a path outside any block is its own layer."""
    return tuple(dict.fromkeys(match.group() if (match := _BLOCK.match(path)) else path for path in modules))
