"""Errors of the top floor: the engine, the router and the node.

ArrowMoEError (registry.errors)
└── EngineError
    ├── ModelLoadError          a base model cannot be loaded
    ├── UnknownAdapterError     no adapter of that name is loaded or in the registry
    ├── AdapterMismatchError    the card does not fit the base model: name, modules, shapes
    ├── UnsupportedCardError    the card is sound, but holds something this engine cannot compute
    ├── GateError               gates do not fit the batch
    ├── PromptError             a prompt cannot be computed: empty, too long, no chat template
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


class GateError(EngineError):
    """Gates do not fit the batch."""


class PromptError(EngineError):
    """A prompt cannot be computed."""


class RoutingError(EngineError):
    """A routed answer was asked for, and no router can give one."""
