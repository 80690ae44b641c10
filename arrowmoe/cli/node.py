"""`arrowmoe node`: start, stop and look at the node of this home."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

import arrowmoe
from arrowmoe import control, logs
from arrowmoe.cli.app import App, app_of, given, group
from arrowmoe.home import NodeError, NodeRecord, is_held, make_home

app = group()
STOP_TIMEOUT_S = 30.0


@app.callback()
def _node() -> None:
    """Start, stop and look at the node of this home."""


@app.command()
def start(
    context: typer.Context,
    name: Annotated[str | None, typer.Option(help="Name that peers see.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to serve on.")] = None,
    flight_port: Annotated[int | None, typer.Option(help="Port to serve on; 0 takes a free one.")] = None,
    peer: Annotated[list[str] | None, typer.Option(metavar="HOST:PORT", help="A peer; may be repeated.")] = None,
    base: Annotated[list[str] | None, typer.Option(metavar="MODEL", help="A base model; may be repeated.")] = None,
    no_discovery: Annotated[bool, typer.Option("--no-discovery", help="No mDNS, only --peer.")] = False,
    auto_sync: Annotated[bool, typer.Option("--auto-sync", help="Fetch what peers offer when it is seen.")] = False,
    open: Annotated[bool, typer.Option("--open", help="Answer every node that is not blocked.")] = False,
) -> None:
    """Run a node until it is stopped: serve this home's cards, watch peers, and answer if it has a base model."""
    invocation = app_of(context)
    flags = given(name=name, host=host, flight_port=flight_port, peers=peer, bases=base, open=open or None)
    sync = {"auto": True} if auto_sync else None
    settings = invocation.load(**flags, sync=sync, discovery=False if no_discovery else None).settings
    make_home(settings.home)
    level = "error" if invocation.out.mode == "quiet" else None
    with logs.logging_to(settings.log, home=settings.home, console_level=level):
        arrowmoe.serve(settings, lambda node: _say_ready(invocation, node.record, settings.home))


@app.command()
def status(context: typer.Context) -> None:
    """Say what the node of this home is doing; exit code 1 if there is none."""
    invocation = app_of(context)
    record = invocation.node()
    if record is None:
        nothing = {"running": False, "home": str(invocation.settings.home)}
        invocation.out.result(nothing, lambda: invocation.out.line(f"no node runs on {nothing['home']}"))
        raise typer.Exit(1)
    found = control.call(record, "status", timeout_s=30.0)
    invocation.out.result(found, lambda: _show_status(invocation, found), quiet=[found["address"]])


@app.command()
def stop(context: typer.Context) -> None:
    """End the node of this home, and wait until it has let go."""
    invocation = app_of(context)
    record, home = invocation.need_node(), invocation.settings.home
    control.call(record, "stop", timeout_s=30.0)
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while is_held(home):
        if time.monotonic() > deadline:
            raise NodeError(
                f"the node (process {record.pid}) was asked to stop and still runs after {STOP_TIMEOUT_S:g} s",
                hint=f"its log is {logs.log_path(home)}",
            )
        time.sleep(0.05)
    done = {"stopped": True, "pid": record.pid}
    invocation.out.result(done, lambda: invocation.out.line(f"node {record.name} (process {record.pid}) has stopped"))


@app.command("id")
def identity(context: typer.Context) -> None:
    """Print this home's node id: the fingerprint of its public key."""
    invocation = app_of(context)
    with invocation.registry() as registry:
        node_id = registry.identity.id
        found = {"node_id": node_id, "public_key": registry.identity.public_key.hex()}
    invocation.out.result(found, lambda: invocation.out.line(node_id), quiet=[node_id])


def _say_ready(invocation: App, record: NodeRecord, home: Path) -> None:
    said = {name: value for name, value in asdict(record).items() if name != "token"} | {"home": str(home)}

    def human() -> None:
        invocation.out.line(f"node {record.name} serves {home} at {record.address}")
        invocation.out.line(f"id {record.node_id}; end it with Ctrl-C or `arrowmoe node stop`", style="dim")

    invocation.out.result(said, human, quiet=[record.address])


def _show_status(invocation: App, found: dict[str, Any]) -> None:
    invocation.out.fields(
        [
            ("node", f"{found['name']} ({found['node_id']})"),
            ("address", found["address"]),
            ("home", found["home"]),
            ("process", f"{found['pid']}, since {found['started']}"),
            ("cards", found["cards"]),
            ("offered", f"{found['offers']} cards that are not here"),
            ("discovery", found["discovery"]),
            *((model["role"], _model_line(model)) for model in found["models"]),
        ]
    )


def _model_line(model: dict[str, Any]) -> str:
    adapters = f", holds {', '.join(model['adapters'])}" if model["adapters"] else ""
    return f"{model['name'] or model['model']}: {model['error'] or model['state']}{adapters}"
