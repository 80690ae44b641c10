"""What the engine is asked with: prompts, and which adapters each is for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from numbers import Real
from typing import TypeVar

from arrowmoe.errors import GateError, PromptError
from arrowmoe.generation import Prompt
from arrowmoe.routing.gates import Gates

Mixture = Mapping[str, float]
Adapter = str | Mixture | Sequence["str | Mixture | None"] | Gates | None
T = TypeVar("T")
_ADAPTER = "the name of an adapter, a mixture {name: weight} or None"
_LOAD = "a card is loaded by load_lora(), and then named"


def prompt_text(prompt: Prompt) -> str:
    """What a router reads of a prompt: the string, or the last message of a user. Raises `PromptError`."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Mapping):
        raise PromptError("expected a string or a list of messages, got one message", hint="put it in a list")
    if not _is_list(prompt):
        raise PromptError(f"expected a string or a list of messages, got {_kind(prompt)}")
    said = [_text(message, "content") for message in prompt if _text(message, "role") == "user"]
    if not said:
        raise PromptError("expected at least one message with role 'user'")
    return said[-1]


def listed(what: str, given: Iterable[T]) -> list[T]:
    """`given` as a list of `what`. Raises `PromptError`: one string would be a list of letters, a set has no order."""
    if isinstance(given, str):
        raise PromptError(f"expected a list of {what}, got one string", hint="put it in a list")
    if isinstance(given, bytes | Mapping | Set) or not isinstance(given, Iterable):
        raise PromptError(f"expected a list of {what}, got {_kind(given)}")
    return list(given)


def strings(what: str, given: Iterable[str]) -> list[str]:
    """`given` as a list of strings. Raises `PromptError`."""
    found = listed(what, given)
    if odd := [one for one in found if not isinstance(one, str)]:
        raise PromptError(f"expected {what} as strings, got {_kind(odd[0])}")
    return found


def per_row(adapter: str | Mixture | Sequence[str | Mixture | None] | None, rows: int) -> list[Mixture]:
    """One mixture per row: the same for all, or one entry each. Raises `GateError`."""
    if adapter is None or isinstance(adapter, str | Mapping):
        return [_mixture(adapter)] * rows
    if not _is_list(adapter):
        raise GateError(f"expected {_ADAPTER}, or a list with one of these per row, got {_kind(adapter)}", hint=_LOAD)
    if len(adapter) != rows:
        raise GateError(f"expected one adapter per row ({rows}), got {len(adapter)}")
    return [_mixture(entry) for entry in adapter]


def _mixture(entry: str | Mixture | None) -> Mixture:
    if entry is None:
        return {}
    if isinstance(entry, str):
        return {entry: 1.0}
    if not isinstance(entry, Mapping):
        raise GateError(f"expected {_ADAPTER}, got {_kind(entry)}", hint=_LOAD)
    if odd := [weight for weight in entry.values() if not _is_finite(weight)]:
        raise GateError(f"expected finite numbers as weights, got {odd[0]!r}")
    return entry


def _text(message: object, field: str) -> str:
    found = message.get(field) if isinstance(message, Mapping) else None
    if not isinstance(found, str):
        raise PromptError(f"expected messages with role and content, both strings, got {message!r:.100}")
    return found


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _is_finite(weight: object) -> bool:
    try:
        return isinstance(weight, Real) and math.isfinite(weight)
    except OverflowError:  # an integer beyond the largest float
        return False


def _kind(value: object) -> str:
    return "None" if value is None else f"a value of type {type(value).__name__}"


def by_digest(row: Mixture, digests: Mapping[str, str]) -> dict[str, float]:
    """Weights by digest; two names for one card add up."""
    weights: dict[str, float] = {}
    for name, weight in row.items():
        weights[digests[name]] = weights.get(digests[name], 0.0) + weight
    return weights


__all__ = ["Adapter", "Mixture", "by_digest", "listed", "per_row", "prompt_text", "strings"]
