"""`arrowmoe route`: which card fits a text, and why."""

from __future__ import annotations

from typing import Annotated

import typer

from arrowmoe.cli.answering import Alpha, Confidence, Expert, Mode, Override, answered, made_by, routing_of
from arrowmoe.cli.app import app_of, given, group

app = group()


@app.command()
def route(
    context: typer.Context,
    text: Annotated[str, typer.Argument(help="The text.")],
    base: Annotated[str | None, typer.Option(help="Only cards made for this base model.")] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show the candidates and what they were judged by.")
    ] = False,
    mode: Mode = None,
    alpha: Alpha = None,
    expert: Expert = None,
    confidence: Confidence = 0.9,
    override: Override = False,
) -> None:
    """Say which card fits a text."""
    invocation = app_of(context)
    how = routing_of(mode=mode, alpha=alpha, expert=expert, confidence=confidence, override=override)
    routed = answered(invocation, "route", {"text": text} | given(base=base) | how, bases=[], route=True)

    def human() -> None:
        invocation.out.line(made_by(routed) if routed["adapters"] else f"no card: {routed['why']}")
        if not explain:
            return
        invocation.out.line()
        rows = [
            (
                one["name"],
                f"{one['score']:.1f}",
                _figure(one["p_value"]),
                _figure(one["cosine"]),
                one["evidence"],
                f"at {one['source']}" if one["virtual"] else "here",
                one["nearest"],
            )
            for one in routed["candidates"]
        ]
        columns = ("card", "score>", "p>", "cosine>", "judged by", "where", "nearest of its prototypes")
        invocation.out.table(columns, rows, "no cards to choose from")

    invocation.out.result(routed, human, quiet=routed["adapters"])


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
