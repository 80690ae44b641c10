"""What `arrowmoe peers` does with the peer book, whether a node runs on the home or not: both read the same rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import Any

from arrowmoe import views
from arrowmoe.following import pace_of
from arrowmoe.home import NodeRecord
from arrowmoe.settings import Settings
from arrowmoe.trust import policy_of
from federation.circle import Circle
from federation.condition import Condition
from federation.discovery import addresses_of
from federation.entrance import Entrance
from federation.membership import JoinToken
from federation.peer import Peer, format_address, is_loopback, parse_address, parse_id, shown_id
from federation.sync import SyncReport, sync
from registry.inventories import Inventories
from registry.peers import KnownPeer, PeerBook, PeerState
from registry.store import Registry

Json = dict[str, Any]
_UNSEEN = {
    PeerState.PENDING: Condition.PENDING,
    PeerState.APPROVED: Condition.UNREACHABLE,
    PeerState.BLOCKED: Condition.REFUSED,
}


def circle(registry: Registry, settings: Settings, record: NodeRecord | None = None) -> Circle:
    """The circle of a command that runs beside the node of `record`, or without one."""
    name = settings.name if record is None else record.name
    return Circle(registry, name=name, open=settings.open or is_loopback(settings.host))


def asked(registry: Registry, settings: Settings) -> list[Json]:
    """The peers of the settings and of the book, asked just now what they offer."""
    own = circle(registry, settings)
    company = own.company([Peer.at(address) for address in settings.peers], [])
    reports = sync(registry, company.asked, dry_run=True, connect=own.connect).peers
    return [views.peer_seen(report) for report in reports]


def sync_here(registry: Registry, settings: Settings, peers: Sequence[Peer]) -> Callable[..., SyncReport]:
    """A sync with `peers` by this process, which lets in what a node of these settings would."""
    own = circle(registry, settings)
    policy = policy_of(settings.trust, open=settings.open or is_loopback(settings.host))

    def run(_: object, **options: Any) -> SyncReport:
        return sync(
            registry,
            peers,
            connect=own.connect,
            entrance=Entrance(registry, policy, publishers=own.approved),
            pace=pace_of(settings.sync),
            **options,
        )

    return run


def with_standing(seen: Sequence[Json], registry: Registry) -> list[Json]:
    """What was seen of peers, with what the book says of them; and those of the book that nobody saw."""
    known = {peer.node_id: peer for peer in PeerBook(registry.database).peers()}
    rows = [row | {"standing": str(known[row["node_id"]].state) if row["node_id"] in known else ""} for row in seen]
    there = {row["node_id"] for row in seen}
    return rows + [_unseen(peer) for peer in known.values() if peer.node_id not in there]


def approve(registry: Registry, node_id: str, *, name: str, address: str | None, introducer: bool | None) -> Json:
    """Let a node read the cards here."""
    if address is not None:
        parse_address(address)
    book = PeerBook(registry.database)
    return _told(book.approve(parse_id(node_id), name=name, address=address, introducer=introducer))


def block(registry: Registry, node_id: str) -> Json:
    """Answer a node no more."""
    return _told(PeerBook(registry.database).block(parse_id(node_id)))


def remove(registry: Registry, node_id: str) -> Json:
    """Forget a node, and what it said that it has."""
    gone = PeerBook(registry.database).remove(parse_id(node_id))
    Inventories(registry.database).forget(gone.node_id)
    return _told(gone)


def invite(registry: Registry, settings: Settings, record: NodeRecord, *, lasts_s: float) -> Json:
    """A token for one node to join the running one; `loopback`: that it helps on this machine only."""
    host, port = parse_address(record.address)
    addresses = [format_address(address, port) for address in addresses_of(host, settings.interfaces)][:16]
    token = circle(registry, settings, record).invite(addresses, lasts=timedelta(seconds=lasts_s))
    return {
        "token": str(token),
        "node_id": token.node_id,
        "fingerprint": shown_id(token.node_id),
        "addresses": addresses,
        "expires": token.until.isoformat(),
        "loopback": is_loopback(host),
    }


def join(registry: Registry, settings: Settings, record: NodeRecord | None, token: str, *, introducer: bool) -> Json:
    """Join the node that made `token`."""
    port = None if record is None else parse_address(record.address)[1]
    host = circle(registry, settings, record).join(JoinToken.parse(token), port=port, introducer=introducer)
    return _told(host) | {"served": port is not None}


def _told(peer: KnownPeer) -> Json:
    row = asdict(peer)
    times = {name: row[name] and row[name].isoformat() for name in ("first_seen", "last_seen", "decided")}
    return row | times | {"state": str(peer.state), "fingerprint": shown_id(peer.node_id)}


def _unseen(peer: KnownPeer) -> Json:
    return {
        "node_id": peer.node_id,
        "name": peer.name,
        "address": peer.address or "",
        "source": "book",
        "state": str(_UNSEEN[peer.state]),
        "alive": False,
        "error": "",
        "cards": 0,
        "lacking": 0,
        "standing": str(peer.state),
    }


__all__ = ["approve", "asked", "block", "circle", "invite", "join", "remove", "sync_here", "with_standing"]
