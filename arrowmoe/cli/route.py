"""`arrowmoe route`: which card fits a text, and why."""

from __future__ import annotations

from typing import Annotated

import typer

from arrowmoe.cli.answering import answered, made_by
from arrowmoe.cli.app import app_of, given, group

app = group()


@app.command()
def route(
    context: typer.Context,
    text: Annotated[str, typer.Argument(help="The text.")],
    base: Annotated[str | None, typer.Option(help="Only cards made for this base model.")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Show the candidates and their scores.")] = False,
) -> None:
    """Say which card fits a text."""
    invocation = app_of(context)
    routed = answered(invocation, "route", {"text": text} | given(base=base), bases=[], route=True)

    def human() -> None:
        invocation.out.line(made_by(routed) if routed["adapters"] else f"no card: {routed['why']}")
        if not explain:
            return
        invocation.out.line()
        rows = [
            (one["name"], f"{one['score']:.3f}", f"at {one['source']}" if one["virtual"] else "here", one["nearest"])
            for one in routed["candidates"]
        ]
        invocation.out.table(("card", "score>", "where", "nearest text of the card"), rows, "no cards to choose from")

    invocation.out.result(routed, human, quiet=routed["adapters"])
