"""arrowmoe: a federated registry for LoRA adapters, and a daemon that grows new ones.

Everything a user needs is importable from here. Names resolve on first use (PEP 562), so `import arrowmoe` costs
milliseconds and imports no torch, no pyarrow and no SQLAlchemy. For the same reason our own code reaches heavy parts
from light paths (the command line, a node that only serves) as attributes of this package.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from arrowmoe import encoding as encoding
    from arrowmoe import evolution_commands as evolution_commands
    from arrowmoe import evolution_view as evolution_view
    from arrowmoe import extraction as extraction
    from arrowmoe import inference as inference
    from arrowmoe import nested_training as nested_training
    from arrowmoe import nested_view as nested_view
    from arrowmoe import operations as operations
    from arrowmoe import peering as peering
    from arrowmoe import router_commands as router_commands
    from arrowmoe import router_training as router_training
    from arrowmoe import router_trials as router_trials
    from arrowmoe import router_view as router_view
    from arrowmoe import signal_view as signal_view
    from arrowmoe import signalling as signalling
    from arrowmoe import training as training
    from arrowmoe import views as views
    from arrowmoe.base_model import BaseModel, load_base_model
    from arrowmoe.base_names import BUILTINS
    from arrowmoe.batching import BatchLimits
    from arrowmoe.engine import ArrowEngine
    from arrowmoe.errors import EngineError
    from arrowmoe.evolving import Evolution, evolution_of_engine, evolution_of_node
    from arrowmoe.features import Features, TextFeaturizer
    from arrowmoe.generation import Chunk, Generation
    from arrowmoe.lora.layer import LoRALinear
    from arrowmoe.lora.manager import LoRAManager
    from arrowmoe.lora.slots import LoadedLoRA
    from arrowmoe.node import Node, serve
    from arrowmoe.request import Answer, ask
    from arrowmoe.routing import Candidate, Decision, Gates, LoRARouter, Opinion, Policy
    from arrowmoe.routing.acceptance import Prompts, describe
    from arrowmoe.routing.by_weights import ByWeights
    from arrowmoe.routing.heads import MultiExpertRouter
    from arrowmoe.routing.mixed import MultiLoRAWithRouter
    from arrowmoe.routing.statistics import CardStatistics
    from arrowmoe.settings import Settings
    from arrowmoe.swarm import Offer, Swarm
    from federation.client import LoRAFlightClient
    from federation.discovery import Discovery, browse
    from federation.errors import FederationError, PeerError, TransportError
    from federation.peer import Peer, parse_address
    from federation.server import LoRAFlightServer
    from federation.sync import SyncReport, sync
    from registry.card import LoRACard
    from registry.entries import CardEntry, Origin
    from registry.errors import ArrowMoEError, CardError, RegistryError
    from registry.format import LoRAFormat
    from registry.identity import Identity
    from registry.merging import Merge, merge
    from registry.quantising import quantise
    from registry.store import Registry

__all__ = [
    "BUILTINS",
    "Answer",
    "ArrowEngine",
    "ArrowMoEError",
    "BaseModel",
    "BatchLimits",
    "ByWeights",
    "Candidate",
    "CardEntry",
    "CardError",
    "CardStatistics",
    "Chunk",
    "Decision",
    "Discovery",
    "EngineError",
    "Evolution",
    "Features",
    "FederationError",
    "Gates",
    "Generation",
    "Identity",
    "LoRACard",
    "LoRAFlightClient",
    "LoRAFlightServer",
    "LoRAFormat",
    "LoRALinear",
    "LoRAManager",
    "LoRARouter",
    "LoadedLoRA",
    "Merge",
    "MultiExpertRouter",
    "MultiLoRAWithRouter",
    "Node",
    "Offer",
    "Opinion",
    "Origin",
    "Peer",
    "PeerError",
    "Policy",
    "Prompts",
    "Registry",
    "RegistryError",
    "Settings",
    "Swarm",
    "SyncReport",
    "TextFeaturizer",
    "TransportError",
    "__version__",
    "ask",
    "browse",
    "describe",
    "evolution_of_engine",
    "evolution_of_node",
    "load_base_model",
    "merge",
    "parse_address",
    "quantise",
    "serve",
    "sync",
]

_NAMES_OF_MODULE = {
    "arrowmoe.request": ("Answer", "ask"),
    "arrowmoe.base_model": ("BaseModel", "load_base_model"),
    "arrowmoe.base_names": ("BUILTINS",),
    "arrowmoe.batching": ("BatchLimits",),
    "arrowmoe.engine": ("ArrowEngine",),
    "arrowmoe.errors": ("EngineError",),
    "arrowmoe.evolving": ("Evolution", "evolution_of_engine", "evolution_of_node"),
    "arrowmoe.features": ("Features", "TextFeaturizer"),
    "arrowmoe.generation": ("Chunk", "Generation"),
    "arrowmoe.lora.layer": ("LoRALinear",),
    "arrowmoe.lora.manager": ("LoRAManager",),
    "arrowmoe.lora.slots": ("LoadedLoRA",),
    "arrowmoe.node": ("Node", "serve"),
    "arrowmoe.routing": ("Candidate", "Decision", "Gates", "LoRARouter", "Opinion", "Policy"),
    "arrowmoe.routing.acceptance": ("Prompts", "describe"),
    "arrowmoe.routing.by_weights": ("ByWeights",),
    "arrowmoe.routing.heads": ("MultiExpertRouter",),
    "arrowmoe.routing.mixed": ("MultiLoRAWithRouter",),
    "arrowmoe.routing.statistics": ("CardStatistics",),
    "arrowmoe.settings": ("Settings",),
    "arrowmoe.swarm": ("Offer", "Swarm"),
    "federation.client": ("LoRAFlightClient",),
    "federation.discovery": ("Discovery", "browse"),
    "federation.errors": ("FederationError", "PeerError", "TransportError"),
    "federation.peer": ("Peer", "parse_address"),
    "federation.server": ("LoRAFlightServer",),
    "federation.sync": ("SyncReport", "sync"),
    "registry.card": ("LoRACard",),
    "registry.entries": ("CardEntry", "Origin"),
    "registry.errors": ("ArrowMoEError", "CardError", "RegistryError"),
    "registry.format": ("LoRAFormat",),
    "registry.identity": ("Identity",),
    "registry.merging": ("Merge", "merge"),
    "registry.quantising": ("quantise",),
    "registry.store": ("Registry",),
}
_LAZY_MODULES = frozenset(
    {
        *("encoding", "extraction", "healing", "inference", "operations"),
        *("peer_checks", "peering", "pushing", "training", "views"),
        *("evolution_commands", "evolution_view", "nested_training", "nested_view", "signal_view", "signalling"),
        *("bench_commands", "router_commands", "router_training", "router_trials", "router_view"),
    }
)
_MODULE_OF_NAME = {name: module for module, names in _NAMES_OF_MODULE.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
    elif name in _LAZY_MODULES:
        value = import_module(f"arrowmoe.{name}")
    elif name in _MODULE_OF_NAME:
        value = getattr(import_module(_MODULE_OF_NAME[name]), name)
    else:
        raise AttributeError(f"module 'arrowmoe' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    metadata = import_module("importlib.metadata")  # slow to import, and seldom wanted
    try:
        return str(metadata.version("arrowmoe"))
    except metadata.PackageNotFoundError:
        return "0+source"  # run from a checkout that was never installed
