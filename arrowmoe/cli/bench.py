"""`arrowmoe bench …`: measure this machine."""

from __future__ import annotations

from typing import Annotated

import typer

import arrowmoe
from arrowmoe.cli.answering import DEFAULT_BASE
from arrowmoe.cli.app import app_of, group

app = group()


@app.callback()
def bench() -> None:
    """Measure this machine, so that the engine computes well on it."""


@app.command()
def tune(
    context: typer.Context,
    base: Annotated[str, typer.Option(help="Base model whose sizes are measured.")] = DEFAULT_BASE,
) -> None:
    """Measure how adapters are best computed here (under a minute), and keep it in the cache for engines to come."""
    invocation = app_of(context)
    with invocation.logging(), invocation.out.progress("measuring") as advance:
        found = arrowmoe.bench_commands.tune(invocation.settings, base, advance)

    def human() -> None:
        invocation.out.line(f"{found['device']}, {found['dtype']}: kept in {found['path']}")
        invocation.out.fields([(name, f"{seconds:.3g} s") for name, seconds in found["prices"].items()])
        regret, before = (f"{100 * found[key]:.1f} %" for key in ("regret", "regret_before"))
        invocation.out.line(f"the layouts chosen take {regret} longer than the fastest in the mean; before, {before}")

    invocation.out.result(found, human, quiet=[found["path"]])
