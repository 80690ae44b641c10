"""The lower blocks of a frozen language model, computed once for each row: they carry no adapter and never change.

With a causal mask and padding on the right, what a block makes of a row does not depend on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence


class Remembered(nn.Module):
    """Blocks in a row that stand in the place of the first one; `padding` (d,) is the padding token's embedding."""

    def __init__(self, blocks: Sequence[nn.Module], padding: Tensor) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self._padding = padding.detach()
        self._made: dict[bytes, Tensor] = {}

    @torch.no_grad()
    def forward(self, hidden_states: Tensor, **others: Any) -> Tensor:
        """Embeddings (rows, seq, d), padded on the right → what the last of the blocks makes of them."""
        lengths = self._lengths(hidden_states)
        keys = [_key(row[:length]) for row, length in zip(hidden_states, lengths, strict=True)]
        new = [at for at, key in enumerate(keys) if key not in self._made]
        if new:
            made = hidden_states[new]
            for block in self.blocks:
                made = block(made, **others)
            self._made |= {keys[at]: row[: lengths[at]].clone() for at, row in zip(new, made, strict=True)}
        rows = pad_sequence([self._made[key] for key in keys], batch_first=True)
        return nn.functional.pad(rows, (0, 0, 0, hidden_states.shape[1] - rows.shape[1]))

    def _lengths(self, hidden_states: Tensor) -> list[int]:
        real = (hidden_states != self._padding).any(dim=-1)
        last = real * torch.arange(1, hidden_states.shape[1] + 1)
        return [int(length) for length in last.amax(dim=1)]


def remember(causal: Any, blocks: int) -> None:
    """Have the first `blocks` of a decoder remembered; block `blocks` then has the index 1."""
    decoder = causal.base_model
    stem = Remembered(list(decoder.layers[:blocks]), decoder.embed_tokens.weight[0])
    decoder.layers = nn.ModuleList([stem, *decoder.layers[blocks:]])


def _key(row: Tensor) -> bytes:
    return row.contiguous().view(torch.uint8).numpy().tobytes()
