"""`arrowmoe conformance HOST:PORT`: check another implementation's server against the protocol."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from arrowmoe.cli.app import App, app_of, group
from federation.conformance.run import Report, examine
from federation.peer import shown_id

app = group()


@app.command()
def conformance(
    context: typer.Context,
    address: Annotated[str, typer.Argument(metavar="HOST:PORT", help="Where the server listens.")],
    plaintext: Annotated[
        bool, typer.Option("--plaintext", help="It speaks no TLS; what the protocol says of that is not tested.")
    ] = False,
) -> None:
    """Check a server against docs/protocol.md, statement by statement; exit code 1 if one does not hold."""
    invocation = app_of(context)
    with invocation.registry() as registry, invocation.out.progress("asking"):
        identity = registry.identity
        report = examine(address, None if plaintext else identity)
    data = asdict(report) | {"ok": report.ok}
    invocation.out.result(data, lambda: _show(invocation, report), quiet=[found.name for found in report.failed])
    if report.refusal is not None:
        invocation.out.error(
            f"the server does not answer this node: {report.refusal}",
            f"approve node {shown_id(identity.id)} on the server, with a card or two there, and run this again",
        )
    if not report.ok:
        raise typer.Exit(1)


def _show(invocation: App, report: Report) -> None:
    out = invocation.out
    for found in report.findings:
        out.line(f"{found.outcome:10}  {found.name} ({found.section}): {found.expected}")
        if found.outcome != "passed":
            out.line(f"            → {'got ' * (found.outcome == 'failed')}{found.got}")
    counts = [
        f"{sum(found.outcome == outcome for found in report.findings)} {outcome}"
        for outcome in ("passed", "failed", "not tested")
    ]
    out.line(", ".join(counts))
