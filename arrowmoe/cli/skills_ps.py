"""`arrowmoe skills ps`: which adapters the running node's models hold, and where."""

from __future__ import annotations

from typing import Any

import typer

from arrowmoe import control
from arrowmoe.cli.app import app_of
from arrowmoe.cli.output import Output, short, size


def ps(context: typer.Context) -> None:
    """List the adapters of the running node's models: where each is, what it takes, and what uses it."""
    invocation = app_of(context)
    models = control.call(invocation.need_node(), "ps", timeout_s=30.0)
    cards = [card["digest"] for model in models for card in model["adapters"]]
    invocation.out.result(models, lambda: _show(invocation.out, models), quiet=cards)


def _show(out: Output, models: list[dict[str, Any]]) -> None:
    columns = ("card", "digest", "tier", "size>", "uses>", "last use", "in flight>", "stays")
    if not models:
        out.line("no base model is ready; `arrowmoe node status` says what is loading")
    for model in models:
        out.line(f"{model['base']}: {_taken(model['bytes'])}", style="bold")
        out.line(_around(model))
        out.table(columns, [_row(card) for card in model["adapters"]], "no adapters; they are loaded when first used")


def _taken(taken: dict[str, Any]) -> str:
    budget = "" if taken["budget"] is None else f" of {size(taken['budget'])}"
    host = f", host memory {size(taken['host'])}" if taken["host"] else ""
    return f"slots {size(taken['slots'])}{budget}, layouts {size(taken['layouts'])}{host}"


def _around(model: dict[str, Any]) -> str:
    """The memory that there is, and the loads so far."""
    process, device, loads = model["process"], model["device"], model["loads"]
    there = f"process {size(process['resident'])}, free {size(process['free'])} of the {process['limited_by']}'s"
    beside = f", device free {size(device['free'])} of {size(device['total'])}" if device else ""
    waited = f"{loads['stalls']} waited for ({loads['stalled_s']:.1f} s)"
    return f"{there} {size(process['limit'])}{beside}; loads: {loads['ahead']} ahead, {waited}"


def _row(card: dict[str, Any]) -> tuple[object, ...]:
    used_at = card["used_at"] or "never"
    return (
        card["name"],
        short(card["digest"]),
        card["tier"],
        size(card["nbytes"]),
        card["uses"],
        used_at,
        card["in_flight"],
        _stays(card),
    )


def _stays(card: dict[str, Any]) -> str:
    if card["leaving"]:
        return "until its batches are done"
    return "pinned" if card["pinned"] else f"priority {card['priority']}" if card["priority"] else ""
