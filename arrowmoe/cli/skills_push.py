"""`arrowmoe skills push`: give a peer cards that it lacks."""

from __future__ import annotations

from typing import Annotated, Any

import typer

import arrowmoe
from arrowmoe.cli.app import app_of
from arrowmoe.cli.output import Output, short, size


def push(
    context: typer.Context,
    peer: Annotated[str, typer.Argument(metavar="PEER", help="HOST:PORT, or the name or id of a known node.")],
    refs: Annotated[list[str] | None, typer.Argument(metavar="[CARD...]", help="The cards to give.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Give all cards of this home.")] = False,
) -> None:
    """Give a peer the cards that it lacks, if its owner lets this node; exit code 1 if one failed."""
    if bool(refs) == everything:
        raise typer.BadParameter("name the cards to push, or say --all")
    invocation = app_of(context)
    with invocation.registry() as registry, invocation.out.progress("offering") as advance:
        done = arrowmoe.pushing.give(
            registry,
            invocation.settings,
            peer,
            refs or [],
            on_progress=lambda at: advance(at.card, at.bytes_done, at.bytes_total),
        )
    came = [card["digest"] for card in done["cards"] if card["error"] is None]
    invocation.out.result(done, lambda: _show(invocation.out, done), quiet=came)
    if not done["ok"]:
        raise typer.Exit(1)


def _show(out: Output, done: dict[str, Any]) -> None:
    rows = [(card["label"], short(card["digest"]), size(card["bytes_moved"]), _state(card)) for card in done["cards"]]
    out.table(("card", "digest", "moved>", "state"), rows, "no cards")
    if any(card["quarantined"] for card in done["cards"]):
        out.note("what is in quarantine there waits for that node's owner: `arrowmoe skills admit CARD`")


def _state(card: dict[str, Any]) -> str:
    if card["error"] is not None:
        return str(card["error"])
    if card["quarantined"] is not None:
        return f"in quarantine there: {card['quarantined']}"
    return "pushed" if card["bytes_moved"] else "was there"
