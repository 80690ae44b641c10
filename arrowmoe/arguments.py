"""What the engine is asked with: prompts, and which adapters each is for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from arrowmoe.errors import GateError, PromptError
from arrowmoe.generation import Prompt
from arrowmoe.routing.gates import Gates

Mixture = Mapping[str, float]
Adapter = str | Mixture | Sequence["str | Mixture | None"] | Gates | None


def prompt_text(prompt: Prompt) -> str:
    """What a router reads of a prompt: the string, or the last message of a user."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Mapping):
        raise PromptError("expected a string or a list of messages, got one message", hint="put it in a list")
    said = [message["content"] for message in prompt if message["role"] == "user"]
    if not said:
        raise PromptError("expected at least one message with role 'user'")
    return said[-1]


def refuse_one_string(what: str, given: Sequence[object]) -> None:
    """Raise `PromptError` for a string where a list of `what` is meant, which would be a list of letters."""
    if isinstance(given, str):
        raise PromptError(f"expected a list of {what}, got one string", hint="put it in a list")


def per_row(adapter: str | Mixture | Sequence[str | Mixture | None] | None, rows: int) -> list[Mixture]:
    """One mixture per row: the same for all, or one entry each. Raises `GateError`."""
    if adapter is None or isinstance(adapter, str | Mapping):
        return [_mixture(adapter)] * rows
    if len(adapter) != rows:
        raise GateError(f"expected one adapter per row ({rows}), got {len(adapter)}")
    return [_mixture(entry) for entry in adapter]


def _mixture(entry: str | Mixture | None) -> Mixture:
    if entry is None:
        return {}
    return {entry: 1.0} if isinstance(entry, str) else entry


def by_digest(row: Mixture, digests: Mapping[str, str]) -> dict[str, float]:
    """Weights by digest; two names for one card add up."""
    weights: dict[str, float] = {}
    for name, weight in row.items():
        weights[digests[name]] = weights.get(digests[name], 0.0) + weight
    return weights


__all__ = ["Adapter", "Mixture", "by_digest", "per_row", "prompt_text", "refuse_one_string"]
