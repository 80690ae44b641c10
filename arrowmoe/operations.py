"""What can be asked of a node, as method → (params, progress) → JSON.

The control channel answers with these, and a command that finds no node running answers itself with the same ones.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import arrowmoe
from arrowmoe import views
from arrowmoe.control import Handler, Progress
from arrowmoe.inference import Inference
from arrowmoe.settings import Settings
from federation.care import Healing
from federation.diff import SyncFilter
from federation.peer import parse_id
from federation.sync import PeerReport, SyncReport

if TYPE_CHECKING:
    from arrowmoe.evolving import Evolution
    from arrowmoe.routing import Opinion

Params = Mapping[str, Any]


class Served(Protocol):
    """What the handlers ask of a node."""

    @property
    def settings(self) -> Settings:
        """How the node is set."""

    @property
    def inference(self) -> Inference:
        """What answers requests; there once the node is started."""

    @property
    def evolution(self) -> Evolution:
        """What grows experts; waits for the embedder."""

    def watch_nights(self) -> None:
        """Have nights begin by the schedule that is set now."""

    def status(self) -> dict[str, Any]:
        """What the node is doing, as JSON."""

    def peers(self) -> tuple[PeerReport, ...]:
        """Every known peer, asked just now."""

    def sync(
        self, peers: Any = ..., *, wanted: SyncFilter = ..., dry_run: bool = ..., on_progress: Any = ...
    ) -> SyncReport:
        """Copy what peers offer, is wanted and is not here."""

    def restore(self, digest: str) -> Healing:
        """Mend a lost or damaged card with a peer's copy."""

    def stop(self) -> None:
        """Ask the node to end."""


def node_handlers(node: Served) -> Mapping[str, Handler]:
    """Everything that a running node answers."""

    def stop(params: Params, progress: Progress) -> Any:
        node.stop()
        return {"stopping": True, "pid": os.getpid()}

    def watch(params: Params, progress: Progress) -> Any:
        node.watch_nights()
        return {"watching": True}

    return {
        "status": lambda params, progress: node.status(),
        "stop": stop,
        "peers": lambda params, progress: [views.peer_seen(report) for report in node.peers()],
        "sync": sync_handler(node.sync),
        "restore": restore_handler(node.restore),
        "ps": lambda params, progress: node.inference.adapters(),
        "route": _late("route", node),
        "ask": _late("ask", node),
        "generate": _late("generate", node),
        "encode": _late("encode", node),
        "evolve_run": lambda params, progress: arrowmoe.evolution_commands.run(
            node.evolution, node.settings, params, progress
        ),
        "evolve_watch": watch,
    }


def sync_handler(run: Callable[..., SyncReport]) -> Handler:
    """A sync with params `peers` (addresses; None: all known), `dry_run` and `wanted` (as `SyncFilter` has it)."""

    def handle(params: Params, progress: Progress) -> Any:
        dry_run = bool(params.get("dry_run"))
        report = run(
            params.get("peers"),
            wanted=_filter(params.get("wanted") or {}),
            dry_run=dry_run,
            on_progress=lambda done: progress(views.progress(done)),
        )
        return views.sync_report(report, dry_run=dry_run)

    return handle


def restore_handler(restore: Callable[[str], Healing]) -> Handler:
    """The mending of the card `digest`."""

    def handle(params: Params, progress: Progress) -> Any:
        done = restore(params["digest"])
        return {"digest": done.digest, "reason": done.reason, "error": done.error}

    return handle


def inference_handlers(inference: Inference) -> Mapping[str, Handler]:
    """`route`, `ask`, `generate` and `encode`."""

    def route(params: Params, progress: Progress) -> Any:
        base = params.get("base")
        gates = inference.route(params["text"], base=base, policy=params.get("policy"), opinion=_opinion(params))
        return views.routed(params["text"], gates, base=base)

    def ask(params: Params, progress: Progress) -> Any:
        engine = inference.engine(params.get("base"))
        return views.answer(inference.ask(**{**params, "opinion": _opinion(params)}), base=engine.name)

    def generate(params: Params, progress: Progress) -> Any:
        return [views.generation(made) for made in inference.generate(**params)]

    def encode(params: Params, progress: Progress) -> Any:
        engine = inference.engine(params.get("base"), kind="encoder")
        vectors = inference.encode(**params)
        return [
            {"text": text, "base": engine.name, "vector": [float(value) for value in vector], "cut": is_cut}
            for text, vector, is_cut in zip(params["texts"], vectors, inference.cut(**params), strict=True)
        ]

    return {"route": route, "ask": ask, "generate": generate, "encode": encode}


def _filter(said: Params) -> SyncFilter:
    """The filter of a command, whose lists came as JSON. Raises `FederationError` for what is no node id."""
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in said.items()}
    return SyncFilter(**fields | {"publishers": tuple(map(parse_id, fields.get("publishers", ())))})


def _opinion(params: Params) -> Opinion | None:
    """What an agent said of the prompt, if it said anything."""
    said = params.get("opinion")
    return arrowmoe.Opinion(**said) if said else None


def _late(method: str, node: Served) -> Handler:
    """The handler on the node's inference, which is there once the node is started."""
    return lambda params, progress: inference_handlers(node.inference)[method](params, progress)


__all__ = ["inference_handlers", "node_handlers", "restore_handler", "sync_handler"]
