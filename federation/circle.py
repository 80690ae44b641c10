"""The nodes that one node deals with: whom it asks, how it reaches them, and how they come to know each other."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Self

from federation import limits
from federation.client import LoRAFlightClient
from federation.credentials import Credentials
from federation.errors import FederationError
from federation.joining import follow, join
from federation.line import Line
from federation.lines import Lines
from federation.membership import JoinToken
from federation.peer import Peer, parse_address, shown_id
from federation.sightings import Sightings
from registry.logs import get_logger
from registry.peers import Invitations, KnownPeer, PeerBook, PeerState
from registry.store import Registry

_log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Company:
    """The nodes known now: those that are asked what they have, and those that wait for the owner's approval."""

    asked: tuple[Peer, ...]
    waiting: tuple[Peer, ...] = ()


class Circle:
    """What a registry's node is among others. `open`: unknown nodes are asked too, and answered.

    As a context it keeps connections open from one client to the next; otherwise each client has its own.
    """

    def __init__(self, registry: Registry, *, name: str, open: bool) -> None:
        self.credentials = Credentials.of(registry.identity)
        self.book = PeerBook(registry.database)
        self._invitations = Invitations(registry.database)
        self._sightings = Sightings()
        self._lines = Lines(self._line)
        self._name, self._open = name, open

    def __enter__(self) -> Self:
        self._lines.open()
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()

    def approved(self) -> set[str]:
        """The ids of the nodes approved now."""
        return {peer.node_id for peer in self.book.peers() if peer.state is PeerState.APPROVED}

    def connect(self, peer: Peer, timeout_s: float = limits.CALL_TIMEOUT_S) -> LoRAFlightClient:
        """A client of the peer, which must be the node that `peer` names, if it names one."""
        line = self._lines.to(peer)
        return LoRAFlightClient(peer.address, credentials=self.credentials, timeout_s=timeout_s, line=line)

    def company(self, static: Sequence[Peer], found: Sequence[Peer]) -> Company:
        """Whom to ask: those the owner named, `static`, and of the book and of those `found` whom the book approves."""
        return company(static, found, self.book.peers(), open=self._open)

    def blocked(self) -> set[str]:
        """The ids of the nodes blocked now, to which no connection is kept from here on."""
        ids = {peer.node_id for peer in self.book.peers() if peer.state is PeerState.BLOCKED}
        self._lines.drop(lambda peer: peer.node_id in ids)
        return ids

    def greet(self, waiting: Sequence[Peer], *, timeout_s: float = limits.PROBE_TIMEOUT_S) -> None:
        """Call on some of the nodes that wait here for approval, so that their owners see this node wait as well."""
        for peer in random.sample(waiting, min(len(waiting), limits.MAX_PEERS_ASKED)):  # anybody can announce many
            try:
                with self.connect(peer, timeout_s) as client:
                    client.health()
            except FederationError as error:
                _log.debug("greeting_failed", peer=str(peer), error=str(error))

    def noted(self, answered: Iterable[Peer]) -> None:
        """Note in the book where known nodes answered, and as whom."""
        for peer in answered:
            self.book.seen(peer.node_id, name=peer.name, address=peer.address)

    def follow(self, *, timeout_s: float = limits.PROBE_TIMEOUT_S) -> tuple[str, ...]:
        """Ask every introducer whom it approves now, and do likewise; returns the newly approved."""
        news: list[str] = []
        for introducer in self.book.peers():
            peer = _at(introducer)
            if peer is None or not introducer.introducer or introducer.state is not PeerState.APPROVED:
                continue
            try:
                with self.connect(peer, timeout_s) as client:
                    news += follow(client, self.book, introducer.node_id, own_id=self.credentials.node_id)
            except FederationError as error:
                _log.warning("introducer_failed", peer=str(peer), error=str(error))
        return tuple(news)

    def invite(self, addresses: Sequence[str], *, lasts: timedelta) -> JoinToken:
        """A token that lets one node join this one at one of `addresses`."""
        secret, expires = self._invitations.make(lasts)
        return JoinToken(
            node_id=self.credentials.node_id,
            name=self._name,
            addresses=tuple(addresses),
            secret=secret,
            expires=int(expires.timestamp()),
        )

    def join(self, token: JoinToken, *, port: int | None, introducer: bool = True) -> KnownPeer:
        """Join the node that made `token`; `port`: where this one serves. Raises as `joining.join` does."""
        own_id = self.credentials.node_id
        return join(token, self.book, self.connect, own_id=own_id, name=self._name, port=port, introducer=introducer)

    def _line(self, peer: Peer) -> Line:
        return Line(
            peer.address,
            credentials=self.credentials,
            node_id=peer.node_id,
            sightings=self._sightings,
            timeout_s=limits.CONNECT_S,
        )


def company(static: Sequence[Peer], found: Sequence[Peer], known: Sequence[KnownPeer], *, open: bool) -> Company:
    """Sort who is known. A node may be there at two addresses: announcements prove nothing, and a book gets old."""
    states = {peer.node_id: peer.state for peer in known}
    asked = {(peer.address, peer.node_id): peer for peer in static if _answered(peer, states, open=True)}
    named = {peer.address for peer in static}
    waiting: dict[tuple[str, str], Peer] = {}
    book = [at for peer in known if peer.state is PeerState.APPROVED and (at := _at(peer)) is not None]
    for peer in (*book, *found):
        if peer.address in named or states.get(peer.node_id) is PeerState.BLOCKED:
            continue
        (asked if _answered(peer, states, open=open) else waiting)[(peer.address, peer.node_id)] = peer
    return Company(asked=tuple(asked.values()), waiting=tuple(waiting.values()))


def pending_text(node_id: str) -> str:
    """What to say of a node that waits."""
    return f"pending: `arrowmoe peers approve {shown_id(node_id)}` lets it in"


def _answered(peer: Peer, states: dict[str, PeerState], *, open: bool) -> bool:
    state = states.get(peer.node_id, PeerState.PENDING)
    return state is PeerState.APPROVED or (open and state is PeerState.PENDING)


def _at(known: KnownPeer) -> Peer | None:
    """Where a node of the book may be; None if nowhere."""
    if known.address is None:
        return None
    host, port = parse_address(known.address)
    return Peer(host=host, port=port, node_id=known.node_id, name=known.name, source="book")


__all__ = ["Circle", "Company", "company", "pending_text"]
