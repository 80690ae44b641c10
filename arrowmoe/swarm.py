"""A registry among its peers: it serves its cards, finds other nodes, knows what they offer, and copies what it lacks.

Both a node and an engine (`ArrowEngine.start_federation`) hold one. Lifetimes are one `ExitStack`'s.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Self

from federation import limits
from federation.admission import Policy
from federation.backoff import Backoff
from federation.board import Holder, Wanted
from federation.circle import Circle, Company, pending_text
from federation.condition import Condition
from federation.diff import SyncFilter
from federation.discovery import Discovery
from federation.entrance import Entrance
from federation.errors import DiscoveryError, FederationError
from federation.pace import Pace
from federation.peer import Peer, is_loopback
from federation.server import LoRAFlightServer
from federation.sync import PeerReport, SyncProgress, SyncReport, sync
from federation.transfer import CardOutcome, transfer
from federation.uploads import Uploads, accepting
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
    """A card that `peers` offer and this registry lacks: a virtual candidate."""

    entry: InventoryEntry
    peers: tuple[Peer, ...]

    @property
    def source(self) -> str:
        """The first peer's address."""
        return self.peers[0].address


class Swarm:
    """The federation of one registry, between `start` and `close`.

    `peers` are addresses HOST:PORT that are always asked; `discovery` finds more by mDNS on `interfaces`. Off
    loopback only approved peers are asked and answered, unless `open` says that everyone may read every card. `policy`
    says which of their cards come in; without one a card of an unknown publisher waits where unknown nodes do.
    `pace` bounds all that is fetched together. `push_from`: nodes that may push cards here (`uploads.accepting`).
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
        pace: Pace | None = None,
        push_from: Sequence[str] = (),
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
            uploads=Uploads(registry, self._entrance, accepts=accepting(push_from, self.circle.book)),
        )
        self._announced = (name, host) if discovery else None
        self._interfaces = interfaces
        self._pace = pace
        self._backoff = Backoff(first_s=limits.FIRST_BACKOFF_S, most_s=limits.MAX_BACKOFF_S)
        self._discovery: Discovery | None = None
        self._statistics: dict[Digest, Statistics | None] = {}
        self._looking = threading.Lock()
        self._syncing: Counter[str] = Counter()
        self._stack = ExitStack()

    def start(self) -> Self:
        """Serve; `announce` makes it known."""
        self._stack.enter_context(self.circle)
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
        peers: Sequence[str | Peer] | None = None,
        *,
        wanted: SyncFilter = SyncFilter(),  # noqa: B008  # a frozen value
        dry_run: bool = False,
        on_progress: Callable[[SyncProgress], None] | None = None,
        cancelled: threading.Event | None = None,
    ) -> SyncReport:
        """Copy what of the `wanted` cards `peers` (or addresses; None: all known) offer and is not here."""
        chosen = self.company().asked if peers is None else [*map(_peer_of, peers)]
        self._review()
        self._syncing.update(() if dry_run else map(_key, chosen))
        try:
            return sync(
                self._registry,
                chosen,
                wanted=wanted,
                dry_run=dry_run,
                on_progress=on_progress,
                connect=self.circle.connect,
                entrance=self._entrance,
                pace=self._pace,
                cancelled=cancelled,
            )
        finally:
            self._syncing.subtract(() if dry_run else map(_key, chosen))

    def look(self, *, everyone: bool = True) -> SyncReport:
        """Ask every known peer what it offers, and remember it in `offers`; introducers, whom they approved.

        Unless `everyone` is to be asked, those that did not answer are left alone for longer and longer.
        """
        with self._looking:
            self._server.cut(self.circle.blocked())
            self.circle.follow()
            self._review()
            company = self.company()
            asked = company.asked if everyone else self._due(company.asked)
            report = sync(self._registry, asked, dry_run=True, timeout_s=PROBE_TIMEOUT_S, connect=self.circle.connect)
            self._note_failures(asked, report)
            self.circle.noted(peer.peer for peer in report.peers if peer.error is None)
            self.circle.greet(company.waiting)
            self.offers = _offers(report)
            known = self._statistics.copy()
            self._statistics = {digest: known[digest] for digest in self.offers if known.get(digest) is not None}
        waiting = (
            PeerReport(peer=peer, error=pending_text(peer.node_id), condition=Condition.PENDING)
            for peer in company.waiting
        )
        return replace(report, peers=(*map(self._told, asked, report.peers), *waiting))

    def _told(self, asked: Peer, seen: PeerReport) -> PeerReport:
        """A peer that lacks nothing but time is syncing."""
        is_syncing = seen.condition is Condition.ONLINE and self._syncing[_key(asked)] > 0
        return replace(seen, condition=Condition.SYNCING) if is_syncing else seen

    def _due(self, peers: Sequence[Peer]) -> list[Peer]:
        """Those that are not left alone for now."""
        self._backoff.keep_only(frozenset(map(_key, peers)))
        waiting = self._backoff.waiting(time.monotonic())
        return [peer for peer in peers if _key(peer) not in waiting]

    def _note_failures(self, asked: Sequence[Peer], report: SyncReport) -> None:
        for peer, seen in zip(asked, report.peers, strict=True):
            if seen.error is None:
                self._backoff.worked(_key(peer))
            else:
                wait_s = self._backoff.failed(_key(peer), time.monotonic())
                log.warning("peer_backed_off", peer=str(peer), wait_s=round(wait_s, 1), error=seen.error)

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
        """Bring the card of an offer from all who have it; as it stands if it came here meanwhile.

        What of it came before a failure is kept for the next time. Raises `FederationError`.
        """
        if digest in self._registry.digests():
            return self._registry.get(digest)
        offer = self.offers.get(Digest(digest))
        if offer is None:
            raise FederationError(f"no peer offers card {digest} any more", hint="ask again: it is not routed to now")
        outcome = self._transferred(offer)
        if outcome.entry is None:
            reasons = "; ".join(f"{holder.origin.address}: {why}" for holder, why in outcome.failures)
            raise FederationError(f"card {offer.entry.label} did not come: {reasons}", hint="the next attempt goes on")
        if outcome.entry.quarantined is not None:
            raise FederationError(
                f"card {offer.entry.label} from {offer.source} is in quarantine: {outcome.entry.quarantined}",
                hint=f"`arrowmoe skills admit {digest}` lets it in",
            )
        log.info("virtual_candidate_fetched", card=offer.entry.label, digest=digest, peer=str(outcome.giver.origin))
        return self._registry.get(digest)

    def _transferred(self, offer: Offer) -> CardOutcome:
        """What became of the card of `offer`, in parts from all its peers."""
        entry = offer.entry
        with ExitStack() as stack:
            holders = [
                Holder(
                    source=stack.enter_context(self.circle.connect(peer)),
                    origin=Origin(peer_id=peer.node_id, address=peer.address),
                )
                for peer in offer.peers
            ]
            wanted = Wanted(digest=entry.digest, label=entry.label, nbytes=entry.nbytes, holders=tuple(holders))
            [outcome] = transfer(
                self._registry,
                [wanted],
                check=self._entrance.check,
                keep=self._entrance.keep,
                pace=self._pace,
            )
        return outcome

    def _statistics_of(self, offer: Offer) -> Statistics | None:
        try:
            with self.circle.connect(offer.peers[0], PROBE_TIMEOUT_S) as client:
                manifest, tensors = client.fetch_statistics(offer.entry.digest)
        except FederationError as error:
            log.warning("statistics_not_fetched", digest=offer.entry.digest, peer=offer.source, error=str(error))
            return None
        if manifest.routing is None:
            log.warning("statistics_not_there", digest=offer.entry.digest, peer=offer.source)
            return None
        return manifest.routing, tensors


def _offers(report: SyncReport) -> Mapping[Digest, Offer]:
    """Each card that is missing, with all who offer it."""
    peers: dict[Digest, list[Peer]] = {}
    for peer in report.peers:
        for entry in peer.missing:
            peers.setdefault(entry.digest, []).append(peer.peer)
    return {entry.digest: Offer(entry=entry, peers=tuple(peers[entry.digest])) for entry in report.lacking}


def _peer_of(peer: str | Peer) -> Peer:
    return Peer.at(peer) if isinstance(peer, str) else peer


def _key(peer: Peer) -> str:
    return f"{peer.address} {peer.node_id}"


__all__ = ["Offer", "Statistics", "Swarm"]
