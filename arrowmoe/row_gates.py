"""The gates of rows that are computed together, where some rows' tokens or layers have gates of their own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from arrowmoe.errors import GateError
from arrowmoe.routing.gates import Gates
from arrowmoe.rows import Row

NOTHING = Gates.of([{}], {})


def gates_of(rows: Sequence[Row | None]) -> Gates:
    """Gates for new tokens, which have those of their row's last one; a place without a row uses none."""
    if any(row is not None and row.finer is not None for row in rows):
        return _joined(rows, None).rows(range(len(rows)))
    weights = [{} if row is None else row.weights for row in rows]
    return Gates.of(weights, {digest: digest for row in weights for digest in row})


def check_tokens(gates: Gates, tokens: Sequence[int]) -> None:
    """Raise `GateError` unless gates for each token are for as many as the longest row has, of rows of `tokens`."""
    if gates.tokens is not None and gates.tokens != max(tokens, default=0):
        raise GateError(
            f"expected gates for each of {max(tokens)} tokens, as many as the longest row has, got {gates.tokens}"
        )


def by_row(gates: Gates, tokens: Sequence[int]) -> list[Gates]:
    """Each row's gates, for as many tokens as it has. Raises as `check_tokens`."""
    check_tokens(gates, tokens)
    return [gates.rows([row]).columns(0, count) for row, count in enumerate(tokens)]


def prompt_gates_of(rows: Sequence[Row], columns: int) -> Gates | None:
    """Gates for `columns` of prompts that are padded on the left; None where no row's tokens have their own."""
    if all(row.finer is None or row.finer.tokens is None for row in rows):
        return None
    return _joined(rows, columns)


def _joined(rows: Sequence[Row | None], columns: int | None) -> Gates:
    own = [
        NOTHING if row is None else row.finer or Gates.of([row.weights], dict.fromkeys(row.weights, "")) for row in rows
    ]
    adapters = tuple(dict.fromkeys(digest for gates in own for digest in gates.adapters))
    layers = dict.fromkeys(layer for gates in own for layer in gates.layers)
    return Gates(
        adapters=adapters,
        names=adapters,
        weights=np.stack([_placed(gates, "", adapters, columns) for gates in own]),
        layers={layer: np.stack([_placed(gates, layer, adapters, columns) for gates in own]) for layer in layers},
    )


def _placed(gates: Gates, layer: str, adapters: Sequence[str], columns: int | None) -> npt.NDArray[np.float32]:
    """One row's gates at `layer`, (columns, adapters) with its last token at the end; without columns (adapters,)."""
    tokens = np.atleast_2d(gates.at(layer)[0])
    placed: npt.NDArray[np.float32] = np.zeros((columns or 1, len(adapters)), dtype=np.float32)
    at = [adapters.index(digest) for digest in gates.adapters]
    if columns is None:
        placed[0, at] = tokens[-1]
        return placed.reshape(-1)
    first = 0 if len(tokens) == 1 else columns - len(tokens)
    placed[first:, at] = tokens
    return placed


__all__ = ["by_row", "check_tokens", "gates_of", "prompt_gates_of"]
