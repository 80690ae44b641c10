"""`arrowmoe feedback`: say of an answer whether it was good, and what it should have been."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

import arrowmoe
from arrowmoe.cli.app import app_of, group

app = group()


@app.command()
def feedback(
    context: typer.Context,
    verdict: Annotated[Literal["good", "bad"], typer.Argument(metavar="good|bad", help="What the answer was.")],
    request: Annotated[
        str | None, typer.Argument(metavar="[REQUEST]", help="First digits of its id; the last request, unless given.")
    ] = None,
    correction: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What should have been answered; the night learns it.")
    ] = None,
) -> None:
    """Say whether an answer was good; what was bad is looked into at night."""
    invocation = app_of(context)
    with invocation.registry() as registry:
        commands = arrowmoe.evolution_commands
        told = commands.feedback(registry, invocation.settings, verdict, request, correction)

    def human() -> None:
        invocation.out.line(f"noted as {told['feedback']}: request {told['id'][:8]}")
        invocation.out.fields(
            [("prompt", told["prompt"]), ("answer", told["answer"]), ("should be", told["correction"])]
        )

    invocation.out.result(told, human, quiet=[told["id"]])
