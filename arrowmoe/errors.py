"""Errors of the top floor: the engine, the router and the node.

ArrowMoEError (registry.errors)
└── EngineError
    ├── ModelLoadError          a base model cannot be loaded
    ├── UnknownAdapterError     no adapter of that name is loaded or in the registry
    ├── AdapterMismatchError    the card does not fit the base model: name, modules, shapes
    ├── UnsupportedCardError    the card is sound, but holds something this engine cannot compute
    ├── AdapterMemoryError      no room for adapters: over the budget, or the device's memory is out
    ├── GateError               gates do not fit the batch
    ├── PromptError             a prompt cannot be computed: empty, too long, no chat template
    ├── BusyError               too many rows wait; `retry_s` says when to ask again
    ├── DeadlineError           the answer was not there in the time that the caller gave it
    └── RoutingError            a routed answer was asked for, and no router can give one
"""

from __future__ import annotations

from registry.errors import ArrowMoEError


class EngineError(ArrowMoEError):
    """The engine cannot do what was asked; it never answers with the bare base model instead."""


class ModelLoadError(EngineError):
    """A base model cannot be loaded."""


class UnknownAdapterError(EngineError):
    """No adapter of that name is loaded or in the registry."""


class AdapterMismatchError(EngineError):
    """A card does not fit the base model."""


class UnsupportedCardError(EngineError):
    """A card holds something that this engine cannot compute."""


class AdapterMemoryError(EngineError):
    """There is no room for adapters; `later` if there may be once the batches in flight are done."""

    def __init__(self, message: str, *, hint: str | None = None, later: bool = False) -> None:
        super().__init__(message, hint=hint)
        self.later = later


class GateError(EngineError):
    """Gates do not fit the batch."""


class PromptError(EngineError):
    """A prompt cannot be computed."""


class BusyError(EngineError):
    """Too many rows wait already; ask again in some `retry_s` seconds."""

    def __init__(self, message: str, *, retry_s: float) -> None:
        super().__init__(message, hint=f"ask again in {retry_s:.1f} s")
        self.retry_s = retry_s


class DeadlineError(EngineError):
    """An answer was not there in time."""


class RoutingError(EngineError):
    """A routed answer was asked for, and no router can give one."""
