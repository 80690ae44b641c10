"""`arrowmoe encode`: turn texts into vectors."""

from __future__ import annotations

from typing import Annotated

import typer

from arrowmoe.cli.answering import adapter_of, answered
from arrowmoe.cli.app import app_of, given, group

app = group()


@app.command()
def encode(
    context: typer.Context,
    texts: Annotated[list[str], typer.Argument(metavar="TEXT...", help="One or more texts.")],
    adapter: Annotated[
        list[str] | None, typer.Option(help="none (default), auto, a card, or NAME=WEIGHT; several are mixed.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Encoder to use.")] = None,
) -> None:
    """Turn texts into vectors, one a line."""
    invocation = app_of(context)
    chosen = adapter_of(adapter or ["none"])
    params = given(base=base) | {"texts": texts, "adapter": chosen}
    bases = [base or invocation.settings.embedder]
    vectors = answered(invocation, "encode", params, bases=bases, route=chosen == "auto")
    lines = [" ".join(f"{value:.6g}" for value in one["vector"]) for one in vectors]

    def human() -> None:
        for line in lines:
            invocation.out.line(line)

    invocation.out.result(vectors, human, quiet=lines)
    if many := sum(one["cut"] for one in vectors):
        invocation.out.warning(
            f"{many} of {len(vectors)} texts are longer than {vectors[0]['base']} reads: the rest of them is left out",
            "split long texts, and encode the pieces",
        )
