"""`arrowmoe peers`: which other nodes there are."""

from __future__ import annotations

from typing import Annotated, Any

import typer

import arrowmoe
from arrowmoe import control
from arrowmoe.cli.app import App, app_of, group

app = group()


@app.callback()
def _peers() -> None:
    """See which other nodes there are."""


@app.command("ls")
def ls(context: typer.Context) -> None:
    """Ask every known peer of this node what it offers."""
    invocation = app_of(context)
    record = invocation.node()
    seen = control.call(record, "peers") if record is not None else _asked_here(invocation)
    _show(invocation, seen)


@app.command()
def discover(
    context: typer.Context,
    timeout_s: Annotated[float, typer.Option("--timeout", min=0.1, max=60.0, help="Seconds to look.")] = 2.0,
) -> None:
    """Look for nodes on the network, without announcing this one."""
    invocation = app_of(context)
    with invocation.logging(), invocation.out.progress("looking"):
        found = arrowmoe.browse(timeout_s)
    rows = [arrowmoe.views.peer(peer) for peer in found]
    invocation.out.result(
        rows,
        lambda: invocation.out.table(
            ("name", "address", "id"), [(row["name"], row["address"], row["node_id"]) for row in rows], "no node found"
        ),
        quiet=[row["address"] for row in rows],
    )


def _asked_here(invocation: App) -> list[dict[str, Any]]:
    """Without a node, the static peers are asked by this command."""
    peers = [arrowmoe.Peer.at(address) for address in invocation.settings.peers]
    with invocation.registry() as registry:
        return [arrowmoe.views.peer_seen(report) for report in arrowmoe.sync(registry, peers, dry_run=True).peers]


def _show(invocation: App, seen: list[dict[str, Any]]) -> None:
    rows = [
        (
            peer["name"] or "?",
            peer["address"],
            peer["source"],
            "alive" if peer["alive"] else peer["error"],
            peer["cards"] if peer["alive"] else "",
            peer["lacking"] if peer["alive"] else "",
        )
        for peer in seen
    ]
    invocation.out.result(
        seen,
        lambda: invocation.out.table(
            ("name", "address", "from", "state", "cards>", "not here>"),
            rows,
            "no peers; `arrowmoe peers discover` looks",
        ),
        quiet=[peer["address"] for peer in seen if peer["alive"]],
    )
