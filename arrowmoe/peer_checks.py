"""Why this node sees no peer: the interfaces, each peer's port, its protocol, its approval, and the clock."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime, timedelta
from typing import Any, Literal

from arrowmoe import control
from arrowmoe.checks import Check
from arrowmoe.home import running_node
from arrowmoe.settings import Settings
from federation import limits
from federation.client import LoRAFlightClient
from federation.credentials import Credentials
from federation.discovery import browse, interfaces_here
from federation.errors import FederationError, PeerUnreachableError
from federation.interfaces import choose
from federation.peer import Peer
from registry.entries import CardEntry
from registry.errors import ArrowMoEError
from registry.identity import KEY_FILE, Identity

BROWSE_S = 1.0
CLOCK_SLACK = timedelta(minutes=5)
Port = Literal["open", "closed", "silent", "nowhere"]

_PORTS: Mapping[Port, tuple[str, str]] = {
    "closed": ("its machine is there, and nothing listens on that port", "start the node there, or mend the port"),
    "silent": ("no answer: the machine is off, or a firewall drops what comes", "open the node's TCP port there"),
    "nowhere": ("no such host, or no route to it", "check the address and this machine's network"),
    "open": ("something listens there and does not answer as a node", "check the port: it may be another program's"),
}


def examine(settings: Settings, *, multicast: bool) -> Iterator[Check]:
    """The interfaces that are looked at, and every peer that is named or found."""
    yield _interfaces(settings)
    try:
        checks = _peers(settings, look=settings.discovery and multicast)
    except ArrowMoEError as error:  # the node went away meanwhile, or nobody can be looked for
        checks = [Check(name="peers", status="warn", detail=str(error), hint=error.hint)]
    yield from checks or [_nobody(settings, multicast=multicast)]


def clock(entries: Iterable[CardEntry], now: datetime) -> Check:
    """Whether this machine's clock went back since it entered its newest card."""
    latest = max((entry.added_at for entry in entries), default=now)
    if latest - now > CLOCK_SLACK:
        detail = f"here it is {now.isoformat(timespec='seconds')}, and a card came at {latest.isoformat()}"
        return Check(name="clock", status="warn", detail=detail, hint="set the clock; cards are judged by it")
    return Check(name="clock", status="ok", detail=now.isoformat(timespec="seconds"))


def diagnosis(peer: Peer, error: FederationError, port: Port) -> Check:
    """Why a peer is of no use: what it said, or, if it said nothing, what its port does."""
    name = f"peer {peer.address}"
    if not isinstance(error, PeerUnreachableError):
        return Check(name=name, status="warn", detail=str(error), hint=error.hint)
    detail, hint = _PORTS[port]
    return Check(name=name, status="warn", detail=detail, hint=hint)


def knock(peer: Peer, timeout_s: float = limits.PROBE_TIMEOUT_S) -> Port:
    """What the peer's port does."""
    try:
        socket.create_connection((peer.host, peer.port), timeout=timeout_s).close()
    except ConnectionRefusedError:
        return "closed"
    except TimeoutError:
        return "silent"
    except OSError:
        return "nowhere"
    return "open"


def _interfaces(settings: Settings) -> Check:
    try:
        choice = choose(interfaces_here(), settings.interfaces)
    except FederationError as error:
        return Check(name="interfaces", status="fail", detail=str(error), hint=error.hint)
    skipped = ", ".join(f"{name} ({reason})" for name, reason in choice.skipped.items())
    if not choice.addresses:
        hint = "name one with the setting `interfaces`, or peers with --peer HOST:PORT"
        return Check(name="interfaces", status="warn", detail=f"none leads to a network: {skipped}", hint=hint)
    looked = ", ".join(choice.addresses)
    return Check(name="interfaces", status="ok", detail=f"{looked}; not {skipped}" if skipped else looked)


def _peers(settings: Settings, *, look: bool) -> list[Check]:
    record = running_node(settings.home)
    if record is not None:
        return [_told(row) for row in control.call(record, "peers")]
    has_key = (settings.home / KEY_FILE).exists()
    credentials = Credentials.of(Identity.open(settings.home)) if has_key else None
    return [_asked(peer, credentials) for peer in _known(settings, look=look)]


def _known(settings: Settings, *, look: bool) -> list[Peer]:
    """The peers of the settings and of a short look around."""
    found = browse(BROWSE_S, interfaces=settings.interfaces) if look else []
    named = [Peer.at(address) for address in settings.peers]
    return list({peer.address: peer for peer in (*found, *named)}.values())


def _asked(peer: Peer, credentials: Credentials | None) -> Check:
    """What the peer says to this node; without `credentials` it is no node yet, and nobody answers it."""
    if credentials is None:
        port = knock(peer)
        if port != "open":
            return diagnosis(peer, PeerUnreachableError(port), port)
        return Check(name=f"peer {peer.address}", status="ok", detail="its port is open")
    timeout_s = limits.PROBE_TIMEOUT_S
    client = LoRAFlightClient(peer.address, credentials=credentials, node_id=peer.node_id, timeout_s=timeout_s)
    try:
        with client:
            return Check(name=f"peer {peer.address}", status="ok", detail=client.health().name)
    except FederationError as error:
        return diagnosis(peer, error, knock(peer))


def _told(row: Mapping[str, Any]) -> Check:
    """What the running node found, whose identity the peer knows."""
    name = f"peer {row['address']}"
    if row["alive"]:
        return Check(name=name, status="ok", detail=row["name"])
    port = knock(Peer.at(row["address"]))
    if port == "open":
        return Check(name=name, status="warn", detail=row["error"])
    return diagnosis(Peer.at(row["address"]), PeerUnreachableError(row["error"]), port)


def _nobody(settings: Settings, *, multicast: bool) -> Check:
    if not settings.discovery:
        return Check(name="peers", status="ok", detail="none is named, and none is looked for")
    why = "none announced itself" if multicast else "none can be found without multicast"
    hint = "start a node there, on the same network; or name it with --peer HOST:PORT"
    return Check(name="peers", status="warn", detail=f"none is named, and {why}", hint=hint)


__all__ = ["Port", "clock", "diagnosis", "examine", "knock"]
