"""A registry among its peers: it serves its cards, finds other nodes, knows what they offer, and copies what it lacks.

Both a node and an engine (`ArrowEngine.start_federation`) hold one. Lifetimes are one `ExitStack`'s.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Self

from federation.admission import Policy
from federation.circle import Circle, Company, pending_text
from federation.discovery import Discovery
from federation.entrance import Entrance
from federation.errors import DiscoveryError, FederationError
from federation.peer import Peer, is_loopback
from federation.server import LoRAFlightServer
from federation.sync import PeerReport, SyncProgress, SyncReport, sync
from federation.wire import InventoryEntry
from registry.card import LoRACard
from registry.digest import Digest
from registry.entries import Origin
from registry.logs import get_logger
from registry.manifest import RoutingSpec
from registry.store import Registry
from registry.tensor import Tensor

PROBE_TIMEOUT_S = 3.0
log = get_logger(__name__)

Statistics = tuple[RoutingSpec, tuple[Tensor, ...]]
"""A card's statistics for the router: what they are, and the tensors of role `STATS`."""


@dataclass(frozen=True, kw_only=True)
class Offer:
    """A card that `peer` offers and this registry lacks: a virtual candidate."""

    entry: InventoryEntry
    peer: Peer

    @property
    def source(self) -> str:
        """The peer's address."""
        return self.peer.address


class Swarm:
    """The federation of one registry, between `start` and `close`.

    `peers` are addresses HOST:PORT that are always asked; `discovery` finds more by mDNS on `interfaces`. Off
    loopback only approved peers are asked and answered, unless `open` says that everyone may read every card. `policy`
    says which of their cards come in; without one a card of an unknown publisher waits where unknown nodes do.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        name: str,
        host: str = "127.0.0.1",
        port: int = 0,
        open: bool = False,
        peers: Sequence[str] = (),
        discovery: bool = True,
        interfaces: Sequence[str] = (),
        policy: Policy | None = None,
    ) -> None:
        self.discovery_state = "starting" if discovery else "off"
        self.offers: Mapping[Digest, Offer] = {}
        self._registry = registry
        self._static = tuple(Peer.at(address) for address in peers)
        is_open = open or is_loopback(host)
        self.circle = Circle(registry, name=name, open=is_open)
        self._entrance = Entrance(
            registry,
            policy or Policy(unknown_publishers="accept" if is_open else "quarantine"),
            publishers=self.circle.approved,
        )
        self._reviewed: frozenset[str] = frozenset()
        self._server = LoRAFlightServer(
            registry,
            node_id=registry.identity.id,
            name=name,
            host=host,
            port=port,
            open=open,
            credentials=self.circle.credentials,
        )
        self._announced = (name, host) if discovery else None
        self._interfaces = interfaces
        self._discovery: Discovery | None = None
        self._statistics: dict[Digest, Statistics | None] = {}
        self._looking = threading.Lock()
        self._stack = ExitStack()

    def start(self) -> Self:
        """Serve; `announce` makes it known."""
        self._stack.enter_context(self._server)
        return self

    def announce(self) -> None:
        """Announce this node and begin to find others, which takes a second or two; nothing if discovery is off.

        Where mDNS is impossible, `discovery_state` says so, and static peers still work.
        """
        if self._announced is None:
            return
        name, host = self._announced
        # The port is known once the server is started.
        discovery = Discovery(
            node_id=self._registry.identity.id,
            name=name,
            port=self._server.port,
            host=host,
            interfaces=self._interfaces,
        )
        try:
            self._discovery = self._stack.enter_context(discovery)
        except DiscoveryError as error:
            self.discovery_state = f"failed: {error}"
            log.warning("discovery_failed", error=str(error), hint=error.hint)
        else:
            self.discovery_state = "on"

    def close(self) -> None:
        """Say goodbye and stop serving."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def address(self) -> str:
        """Where this registry is served, as HOST:PORT."""
        return self._server.address

    @property
    def port(self) -> int:
        """The port of `address`."""
        return self._server.port

    def known_peers(self) -> list[Peer]:
        """Whom to ask."""
        return list(self.company().asked)

    def company(self) -> Company:
        """Static peers, discovered ones and those of the peer book: whom to ask, and who waits for approval."""
        return self.circle.company(self._static, self._discovery.peers() if self._discovery is not None else [])

    def sync(
        self,
        peers: Sequence[str] | None = None,
        *,
        dry_run: bool = False,
        on_progress: Callable[[SyncProgress], None] | None = None,
    ) -> SyncReport:
        """Copy what `peers` (addresses; None: all known) offer and is not here."""
        chosen = self.company().asked if peers is None else [Peer.at(address) for address in peers]
        self._review()
        return sync(
            self._registry,
            chosen,
            dry_run=dry_run,
            on_progress=on_progress,
            connect=self.circle.connect,
            entrance=self._entrance,
        )

    def look(self) -> SyncReport:
        """Ask every known peer what it offers, and remember it in `offers`; introducers, whom they approved."""
        with self._looking:
            self.circle.follow()
            self._review()
            company = self.company()
            report = sync(
                self._registry, company.asked, dry_run=True, timeout_s=PROBE_TIMEOUT_S, connect=self.circle.connect
            )
            self.circle.noted(peer.peer for peer in report.peers if peer.error is None)
            self.circle.greet(company.waiting)
            self.offers = {
                entry.digest: Offer(entry=entry, peer=peer.peer) for peer in report.peers for entry in peer.missing
            }
            known = self._statistics.copy()
            self._statistics = {digest: known[digest] for digest in self.offers if known.get(digest) is not None}
        waiting = (PeerReport(peer=peer, error=pending_text(peer.node_id)) for peer in company.waiting)
        return replace(report, peers=(*report.peers, *waiting))

    def _review(self) -> None:
        """Judge the cards in quarantine anew if other publishers are known than before."""
        approved = frozenset(self.circle.approved())
        if approved != self._reviewed:
            self._entrance.review()
            self._reviewed = approved

    def statistics(self, digest: Digest) -> Statistics | None:
        """The statistics of an offered card, fetched without its weights and remembered while it is offered.

        None if nobody offers it or it has none, and until the next `look` if its peer fails, which is logged.
        """
        offer = self.offers.get(digest)
        if offer is None or not offer.entry.has_statistics:
            return None
        known = self._statistics
        if digest not in known:
            known[digest] = self._statistics_of(offer)
        return known[digest]

    def fetch(self, digest: str) -> LoRACard:
        """Bring the card of an offer: fetched, verified, admitted; as it stands if it came here meanwhile."""
        if digest in self._registry.digests():
            return self._registry.get(digest)
        offer = self.offers.get(Digest(digest))
        if offer is None:
            raise FederationError(f"no peer offers card {digest} any more", hint="ask again: it is not routed to now")
        with self.circle.connect(offer.peer) as client:
            peer_id = client.proven().node_id
            card = client.fetch_skill(Digest(digest))
        entry = self._entrance.admit(card, origin=Origin(peer_id=peer_id, address=offer.source))
        if entry.quarantined is not None:
            raise FederationError(
                f"card {card.name} from {offer.source} is in quarantine: {entry.quarantined}",
                hint=f"`arrowmoe skills admit {card.name}` lets it in",
            )
        log.info("virtual_candidate_fetched", card=card.name, digest=digest, peer=offer.source)
        return card

    def _statistics_of(self, offer: Offer) -> Statistics | None:
        try:
            with self.circle.connect(offer.peer, PROBE_TIMEOUT_S) as client:
                manifest, tensors = client.fetch_statistics(offer.entry.digest)
        except FederationError as error:
            log.warning("statistics_not_fetched", digest=offer.entry.digest, peer=offer.source, error=str(error))
            return None
        if manifest.routing is None:
            log.warning("statistics_not_there", digest=offer.entry.digest, peer=offer.source)
            return None
        return manifest.routing, tensors


__all__ = ["Offer", "Statistics", "Swarm"]
