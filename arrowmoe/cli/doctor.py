"""`arrowmoe doctor`: check this machine and this home."""

from __future__ import annotations

from dataclasses import asdict

import typer

from arrowmoe import doctor as checks
from arrowmoe.cli.app import app_of, group

app = group()


@app.command()
def doctor(context: typer.Context) -> None:
    """Check this machine and this home; exit code 1 if something cannot work."""
    invocation = app_of(context)
    with invocation.logging():
        found = checks.examine(invocation.settings)

    def human() -> None:
        for check in found:
            invocation.out.line(f"{check.status:4}  {check.name}: {check.detail}")
            if check.hint:
                invocation.out.line(f"      → {check.hint}")

    failed = [check for check in found if check.status == "fail"]
    invocation.out.result(
        [asdict(check) for check in found],
        human,
        quiet=[f"{check.status} {check.name}" for check in found if check.status != "ok"],
    )
    if failed:
        raise typer.Exit(1)
