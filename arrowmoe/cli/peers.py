"""`arrowmoe peers`: which other nodes there are."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

import arrowmoe
from arrowmoe import control
from arrowmoe.cli.app import App, app_of, group

if TYPE_CHECKING:
    from registry.store import Registry

app = group()
NodeId = Annotated[str, typer.Argument(metavar="ID", help="A node id, in groups or not.")]


@app.callback()
def _peers() -> None:
    """See which other nodes there are."""


@app.command("ls")
def ls(context: typer.Context) -> None:
    """Ask every known peer of this node what it offers, and list those that wait or are blocked."""
    invocation = app_of(context)
    record = invocation.node()
    with invocation.registry() as registry:
        seen = (
            control.call(record, "peers")
            if record is not None
            else arrowmoe.peering.asked(registry, invocation.settings)
        )
        _show(invocation, arrowmoe.peering.with_standing(seen, registry))


@app.command()
def approve(
    context: typer.Context,
    node_id: NodeId,
    name: Annotated[str, typer.Option(help="What to call it.")] = "",
    address: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Where it serves.")] = None,
    introducer: Annotated[
        bool | None, typer.Option("--introducer/--no-introducer", help="Approve whom it approves as well.")
    ] = None,
) -> None:
    """Let a node read this home's cards, and ask it for its own; acts at once."""
    _decide(
        context,
        "approved",
        lambda registry: arrowmoe.peering.approve(registry, node_id, name=name, address=address, introducer=introducer),
    )


@app.command()
def block(context: typer.Context, node_id: NodeId) -> None:
    """Neither answer nor ask a node any more; acts at once."""
    _decide(context, "blocked", lambda registry: arrowmoe.peering.block(registry, node_id))


@app.command()
def rm(context: typer.Context, node_id: NodeId) -> None:
    """Forget a node: if it comes again, it waits for approval."""
    _decide(context, "forgotten", lambda registry: arrowmoe.peering.remove(registry, node_id))


@app.command()
def invite(
    context: typer.Context,
    hours: Annotated[float, typer.Option(min=0.01, max=24 * 30, help="How long the token is good.")] = 24.0,
) -> None:
    """Print a token that lets one node join the running node of this home. It is a secret until it is used."""
    invocation = app_of(context)
    record = invocation.need_node()
    with invocation.registry() as registry:
        made = arrowmoe.peering.invite(registry, invocation.settings, record, lasts_s=hours * 3600)

    def human() -> None:
        out = invocation.out
        out.line("on the other machine, once, run:")
        out.line(f"arrowmoe peers join {made['token']}")
        out.line(f"this node is {made['fingerprint']} at {', '.join(made['addresses'])}", style="dim")
        if made["loopback"]:
            out.note("this node serves this machine only; start it with --host 0.0.0.0 for others to reach it")

    invocation.out.result(made, human, quiet=[made["token"]])


@app.command()
def join(
    context: typer.Context,
    token: Annotated[str, typer.Argument(help="What `arrowmoe peers invite` printed there.")],
    introducer: Annotated[
        bool, typer.Option("--introducer/--no-introducer", help="Approve the nodes that it approves as well.")
    ] = True,
) -> None:
    """Join the node that made a token: both approve each other."""
    invocation = app_of(context)
    record = invocation.node()
    with invocation.registry() as registry:
        done = arrowmoe.peering.join(registry, invocation.settings, record, token, introducer=introducer)

    def human() -> None:
        invocation.out.line(f"joined {done['name'] or '?'} at {done['address']}")
        invocation.out.line(f"it is {done['fingerprint']}: the same must be shown there", style="dim")
        if not done["served"]:
            invocation.out.note("no node runs here; start one with `arrowmoe node start` for others to reach it")

    invocation.out.result(done, human, quiet=[done["node_id"]])


@app.command()
def discover(
    context: typer.Context,
    timeout_s: Annotated[float, typer.Option("--timeout", min=0.1, max=60.0, help="Seconds to look.")] = 2.0,
) -> None:
    """Look for nodes on the network, without announcing this one."""
    invocation = app_of(context)
    with invocation.logging(), invocation.out.progress("looking"):
        found = arrowmoe.browse(timeout_s, interfaces=invocation.settings.interfaces)
    rows = [arrowmoe.views.peer(peer) for peer in found]
    invocation.out.result(
        rows,
        lambda: invocation.out.table(
            ("name", "address", "id"),
            [(row["name"], row["address"], _grouped(row["node_id"])) for row in rows],
            "no node found",
        ),
        quiet=[row["address"] for row in rows],
    )


def _decide(context: typer.Context, what: str, decision: Callable[[Registry], dict[str, Any]]) -> None:
    invocation = app_of(context)
    with invocation.registry() as registry:
        done = decision(registry)
    who = " ".join(filter(None, (done["name"], done["fingerprint"])))
    invocation.out.result(done, lambda: invocation.out.line(f"{what}: {who}"), quiet=[done["node_id"]])


def _grouped(node_id: str) -> str:
    """In groups that people can compare."""
    return "-".join(node_id[start : start + 4] for start in range(0, len(node_id), 4))


def _show(invocation: App, seen: list[dict[str, Any]]) -> None:
    rows = [
        (
            peer["name"] or "?",
            peer["address"],
            _grouped(peer["node_id"]),
            peer["source"],
            peer["standing"],
            f"{peer['state']}: {peer['error']}" if peer["error"] else peer["state"],
            peer["cards"] if peer["alive"] else "",
            peer["lacking"] if peer["alive"] else "",
        )
        for peer in seen
    ]
    invocation.out.result(
        seen,
        lambda: invocation.out.table(
            ("name", "address", "id", "from", "standing", "state", "cards>", "not here>"),
            rows,
            "no peers; `arrowmoe peers discover` looks",
        ),
        quiet=[peer["address"] for peer in seen if peer["alive"]],
    )
