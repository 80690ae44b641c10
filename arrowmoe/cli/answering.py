"""Who answers `route`, `ask` and `encode`: the running node of this home if it has models, else this very process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

import arrowmoe
from arrowmoe import control
from arrowmoe.cli.app import App, given
from arrowmoe.home import NodeError, NodeRecord

DEFAULT_BASE = "builtin:smollm2"

Mode = Annotated[str | None, typer.Option(help="top1, top2, soft or threshold; the setting, unless given.")]
Alpha = Annotated[float | None, typer.Option(min=0.0, max=0.99, help="Share of its own prompts a card may refuse.")]
Expert = Annotated[str | None, typer.Option(metavar="CARD", help="The card that an agent would use.")]
Confidence = Annotated[float, typer.Option(min=0.01, max=0.99, help="How sure it is.")]
Override = Annotated[bool, typer.Option("--override", help="Use it, unless it refuses the prompt itself.")]


def answered(app: App, method: str, params: Mapping[str, Any], *, bases: Sequence[str], route: bool) -> Any:
    """The JSON answer to `method`. `bases` are loaded if no node answers, and the embedder if `route`."""
    record = app.node()
    if record is not None and has_models(record):
        return control.call(record, method, params)
    if record is not None:
        app.out.note("the running node has loaded no base model, so this command loads one itself")
    return _answered_here(app, method, params, bases=bases, route=route)


def adapter_of(values: Sequence[str]) -> Any:
    """What `--adapter` means: auto, none (the bare base model), a card, or a mixture NAME=WEIGHT … of several."""
    if not values or list(values) == ["auto"]:
        return "auto"
    if list(values) == ["none"]:
        return None
    if alone := [value for value in values if value in ("auto", "none")]:
        raise NodeError(f"expected --adapter {alone[0]} alone, got {list(values)}")
    pairs = [value.rpartition("=") if "=" in value else (value, "=", "1") for value in values]
    if len({name for name, _, _ in pairs}) < len(pairs):
        raise NodeError(f"expected each card once, got {list(values)}", hint="give it its whole weight: NAME=WEIGHT")
    try:
        return {name: float(weight) for name, _, weight in pairs}
    except ValueError as error:
        raise NodeError(f"expected --adapter NAME=WEIGHT with a number, got {list(values)}") from error


def routing_of(
    *, mode: str | None, alpha: float | None, expert: str | None, confidence: float, override: bool
) -> dict[str, Any]:
    """Parameters of a request that say how it is routed: changes of the settings, and an agent's opinion."""
    policy = {name: value for name, value in (("mode", mode), ("alpha", alpha)) if value is not None}
    use = "override" if override else "prior"
    opinion = {"card": expert, "confidence": confidence, "use": use} if expert else None
    if override and not expert:
        raise NodeError("expected --expert CARD with --override, got none")
    return given(policy=policy or None, opinion=opinion)


def made_by(answer: Mapping[str, Any]) -> str:
    """Which cards made an answer, with which weights, or that none did and why."""
    if not answer["adapters"]:
        return f"no card ({answer['why']}): the bare base model answered"
    cards = ", ".join(f"{name} {weight:.2f}" for name, weight in answer["adapters"].items())
    return f"{cards} ({answer['why']})"


def has_models(record: NodeRecord) -> bool:
    """Whether the running node has been given base models."""
    return bool(control.call(record, "status", timeout_s=30.0)["models"])


def _answered_here(app: App, method: str, params: Mapping[str, Any], *, bases: Sequence[str], route: bool) -> Any:
    with app.registry() as registry, app.out.progress("loading") as advance:
        signals = arrowmoe.signalling.signal_store(registry.database, app.settings.evolution)
        observer = arrowmoe.signalling.SignalRecorder(signals)
        inference = arrowmoe.inference.Inference(registry, app.settings, bases=bases, route=route, observer=observer)
        inference.load(on_model=lambda model: advance(f"loading {model}", 0, 0))
        advance("thinking", 0, 0)
        return arrowmoe.operations.inference_handlers(inference)[method](params, lambda done: None)


__all__ = [
    "DEFAULT_BASE",
    "Alpha",
    "Confidence",
    "Expert",
    "Mode",
    "Override",
    "adapter_of",
    "answered",
    "has_models",
    "made_by",
    "routing_of",
]
