"""`arrowmoe skills sync`: copy what peers have, all of it or what the options say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

import arrowmoe
from arrowmoe import control
from arrowmoe.cli.app import App, app_of, given
from arrowmoe.cli.output import short, size

if TYPE_CHECKING:
    from federation.peer import Peer
    from registry.store import Registry

BROWSE_S = 2.0

Many = list[str] | None


def sync(
    context: typer.Context,
    peer: Annotated[Many, typer.Option(metavar="HOST:PORT", help="A peer; may be repeated.")] = None,
    name: Annotated[Many, typer.Option(metavar="GLOB", help="Only this name or label; may be repeated.")] = None,
    base: Annotated[Many, typer.Option(metavar="MODEL", help="Only for this base model; may be repeated.")] = None,
    publisher: Annotated[Many, typer.Option(metavar="ID", help="Only this node's cards; may be repeated.")] = None,
    domain: Annotated[Many, typer.Option(metavar="GLOB", help="Only this subject; may be repeated.")] = None,
    max_size: Annotated[float | None, typer.Option(metavar="MIB", min=0.001, help="No card larger than this.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Compare, and fetch nothing.")] = False,
) -> None:
    """Copy the cards that peers have and this home lacks; exit code 1 if any peer or card failed."""
    invocation = app_of(context)
    wanted = given(
        names=name,
        bases=base,
        publishers=publisher,
        domains=domain,
        max_bytes=None if max_size is None else int(max_size * (1 << 20)),
    )
    record = invocation.node()
    with invocation.out.progress("comparing") as advance:

        def on_progress(done: Any) -> None:
            advance(f"{done['card']} from {done['peer']}", done["bytes_done"], done["bytes_total"])

        params = {"peers": peer or None, "wanted": wanted, "dry_run": dry_run}
        if record is not None:
            report = control.call(record, "sync", params, on_progress=on_progress)
        else:
            report = _sync_here(invocation, params, on_progress)
    _tell(invocation, report)
    if not report["ok"]:
        raise typer.Exit(1)


def found_here(invocation: App, registry: Registry) -> list[Peer]:
    """The nodes that a short look around finds, if the settings want one."""
    if not invocation.settings.discovery:
        return []
    found: list[Peer] = arrowmoe.browse(
        BROWSE_S, node_id=registry.identity.id, interfaces=invocation.settings.interfaces
    )
    return found


def _sync_here(invocation: App, params: dict[str, Any], on_progress: control.Progress) -> Any:
    """Without a node: the peers named, else those of the settings and of a short look around."""
    with invocation.registry() as registry:
        peers = _peers_here(invocation, registry, params["peers"] or [])
        run = arrowmoe.peering.sync_here(registry, invocation.settings, peers)
        return arrowmoe.operations.sync_handler(run)(params, on_progress)


def _peers_here(invocation: App, registry: Registry, addresses: list[str]) -> list[Peer]:
    """The peers named, else those of the settings and of a short look around."""
    peers = [arrowmoe.Peer.at(address) for address in addresses or invocation.settings.peers]
    if addresses:
        return peers
    known = {peer.address for peer in peers}
    return peers + [peer for peer in found_here(invocation, registry) if peer.address not in known]


def _tell(invocation: App, report: dict[str, Any]) -> None:
    """The report; bare values are the digests of what can be used, or could be had."""
    held = {card["digest"] for card in report["quarantined"]}
    key = "missing" if report["dry_run"] else "fetched"
    usable = [card["digest"] for peer in report["peers"] for card in peer[key] if card["digest"] not in held]
    invocation.out.result(report, lambda: _show_sync(invocation, report), quiet=usable)
    for card in report["quarantined"]:
        invocation.out.warning(
            f"{card['name']}@{card['version']} {short(card['digest'])} is in quarantine: {card['reason']}",
            f"`arrowmoe skills admit {short(card['digest'])}` lets it in, `arrowmoe skills rm` throws it away",
        )


def _show_sync(invocation: App, report: dict[str, Any]) -> None:
    out = invocation.out
    if not report["peers"]:
        out.line("no peers were found; name one with --peer HOST:PORT")
    for peer in report["peers"]:
        who = f"{peer['name'] or '?'} ({peer['address']})"
        if peer["error"]:
            out.line(f"{who}: {peer['error']}")
            continue
        out.line(f"{who}: offers {peer['offered']}, {len(peer['missing'])} of them wanted and not here")
        for card in peer["missing"] if report["dry_run"] else peer["fetched"]:
            out.line(f"  {card['name']}@{card['version']} {short(card['digest'])} {size(card['nbytes'])}")
        for card in peer["removed"]:
            out.line(f"  {card['label']} {short(card['digest'])} was removed by its publisher")
        for failure in peer["failed"]:
            out.line(f"  {short(failure['digest'])} failed: {failure['reason']}")
    if report["dry_run"]:
        out.line("dry run: nothing was moved")
        return
    verified = sum(peer["tensors_verified"] for peer in report["peers"])
    out.line(f"{report['fetched']} cards fetched, {size(report['bytes_moved'])} moved, {verified} tensors verified")


__all__ = ["found_here", "sync"]
