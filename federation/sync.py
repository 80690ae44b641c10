"""The sync: compare this node's cards with its peers', fetch what is missing, verify it, and keep it.

One failing card or peer never stops the others, and nothing that fails goes unreported. A card that several peers hold
is fetched once; if that fails, from the next of them. Nothing of a card is visible here before all of it is verified.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, MutableMapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from federation import diff, limits, wire
from federation.client import LoRAFlightClient
from federation.errors import FederationError, PeerError
from federation.peer import Peer
from federation.wire import InventoryEntry
from registry.digest import Digest
from registry.entries import CardEntry, Origin
from registry.errors import ArrowMoEError
from registry.logs import get_logger
from registry.store import Registry

_log = get_logger(__name__)

SyncMemory = MutableMapping[str, tuple[str, str]]
"""By node id, this node's and the peer's state when nothing was missing between them."""


@dataclass(frozen=True, kw_only=True)
class SyncProgress:
    """Where a sync is. `bytes_done` of all cards' tensor bytes; a card that failed for good counts as done."""

    peer: Peer
    card: str
    bytes_done: int
    bytes_total: int
    cards_done: int
    cards_total: int


@dataclass(frozen=True, kw_only=True)
class PeerReport:
    """What became of one peer. `error`: why it could not be asked; `failed`: digests it could not give, and why."""

    peer: Peer
    error: str | None = None
    offered: int = 0
    missing: tuple[InventoryEntry, ...] = ()
    fetched: tuple[CardEntry, ...] = ()
    failed: tuple[tuple[Digest, str], ...] = ()
    bytes_moved: int = 0
    tensors_verified: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class SyncReport:
    """What a sync found and moved, one report per peer, in the order they were given."""

    peers: tuple[PeerReport, ...]

    @property
    def fetched(self) -> tuple[CardEntry, ...]:
        """Every card that came."""
        return tuple(entry for peer in self.peers for entry in peer.fetched)

    @property
    def lacking(self) -> tuple[InventoryEntry, ...]:
        """What some peer offers and this node still has not, each card once."""
        here = {entry.digest for entry in self.fetched}
        return tuple(diff.missing((entry for peer in self.peers for entry in peer.missing), here))

    @property
    def bytes_moved(self) -> int:
        """Tensor bytes that arrived, of failed transfers too."""
        return sum(peer.bytes_moved for peer in self.peers)

    @property
    def ok(self) -> bool:
        """Whether every peer answered and everything wanted came, from whichever peer."""
        here = {entry.digest for entry in self.fetched}
        return all(peer.error is None and all(digest in here for digest, _ in peer.failed) for peer in self.peers)


def sync(
    registry: Registry,
    peers: Sequence[Peer],
    *,
    dry_run: bool = False,
    on_progress: Callable[[SyncProgress], None] | None = None,
    only: Collection[str] | None = None,
    memory: SyncMemory | None = None,
    timeout_s: float = limits.CALL_TIMEOUT_S,
) -> SyncReport:
    """Bring what `peers` have and `registry` lacks: discover → compare → fetch → verify → write → catalog.

    `peers` are discovered already. `only`: names, NAME@VERSION or digests. `dry_run` compares and moves nothing.
    `memory`, kept by the caller between syncs, spares the inventory of a peer where nothing changed on either side.
    """
    with ExitStack() as stack:
        links = [
            _Link(peer, stack.enter_context(LoRAFlightClient(peer.address, timeout_s=timeout_s))) for peer in peers
        ]
        have = registry.digests()
        for link in links:
            _compare(link, registry, have, only, memory)
        if not dry_run:
            _fetch_all(registry, links, on_progress)
        if memory is not None:
            _remember(memory, links, registry, only)
    return SyncReport(peers=tuple(link.report() for link in links))


@dataclass(kw_only=False)
class _Link:
    """One peer during one sync."""

    peer: Peer
    client: LoRAFlightClient
    error: str | None = None
    state: str = ""
    offered: int = 0
    missing: list[InventoryEntry] = field(default_factory=list)
    fetched: list[CardEntry] = field(default_factory=list)
    failed: list[tuple[Digest, str]] = field(default_factory=list)
    bytes_moved: int = 0
    tensors_verified: int = 0
    seconds: float = 0.0

    def report(self) -> PeerReport:
        return PeerReport(
            peer=self.peer,
            error=self.error,
            offered=self.offered,
            missing=tuple(self.missing),
            fetched=tuple(self.fetched),
            failed=tuple(self.failed),
            bytes_moved=self.bytes_moved,
            tensors_verified=self.tensors_verified,
            seconds=self.seconds,
        )


def _compare(
    link: _Link, registry: Registry, have: set[Digest], only: Collection[str] | None, memory: SyncMemory | None
) -> None:
    """Probe the peer, then ask for its inventory unless the states say that nothing there is new."""
    started = time.monotonic()
    try:
        health = link.client.health()
        link.peer = _identified(link.peer, health, registry.identity.id)
        link.offered, link.state = health.cards, health.state
        known = (memory or {}).get(health.node_id)
        if health.state != wire.state_of(have) and known != (_own_state(registry, have), health.state):
            inventory = link.client.list_remote_skills()
            link.offered = len(inventory)
            refused = registry.refused((entry.digest, entry.publisher) for entry in inventory)
            link.missing = [entry for entry in diff.missing(inventory, have | refused) if diff.selected(entry, only)]
    except FederationError as error:
        link.error = str(error)
        _log.warning("peer_failed", peer=link.peer.address, error=str(error), kind=type(error).__name__)
    link.seconds += time.monotonic() - started


def _identified(peer: Peer, health: wire.Health, own_id: str) -> Peer:
    """The peer as it calls itself, which this release cannot prove."""
    if health.node_id == own_id:
        raise FederationError("that address is this node itself", hint="name another node with --peer")
    if peer.node_id and peer.node_id != health.node_id:
        raise PeerError(f"expected node {peer.node_id} at {peer.address}, got {health.node_id}")
    return replace(peer, node_id=health.node_id, name=health.name)


def _fetch_all(registry: Registry, links: Sequence[_Link], on_progress: Callable[[SyncProgress], None] | None) -> None:
    wanted = diff.missing((entry for link in links for entry in link.missing), ())
    holders: dict[Digest, list[_Link]] = {}
    for link in links:
        for entry in link.missing:
            holders.setdefault(entry.digest, []).append(link)
    meter = _Meter(wanted, on_progress)
    for entry in wanted:
        for link in holders[entry.digest]:
            if _fetch(registry, link, entry, meter):
                break
        meter.card_ended(entry)


def _fetch(registry: Registry, link: _Link, entry: InventoryEntry, meter: _Meter) -> bool:
    """Fetch, verify and keep one card from one peer; whether that worked."""
    started = time.monotonic()
    count = meter.of(link, entry)
    try:
        card = link.client.fetch_skill(entry.digest, count)
        link.tensors_verified += len(card.tensors)
        origin = Origin(peer_id=link.peer.node_id, address=link.peer.address)
        link.fetched.append(registry.admit(card, origin=origin))
    except (ArrowMoEError, OSError) as error:
        link.failed.append((entry.digest, str(error)))
        _log.warning("card_failed", card=entry.label, digest=entry.digest, peer=str(link.peer), error=str(error))
        return False
    finally:
        link.seconds += time.monotonic() - started
    _log.info("card_fetched", card=entry.label, digest=entry.digest, peer=str(link.peer), bytes=card.nbytes)
    return True


class _Meter:
    """Counts what arrives, for the report and for whoever watches."""

    def __init__(self, wanted: Sequence[InventoryEntry], on_progress: Callable[[SyncProgress], None] | None) -> None:
        self._on_progress = on_progress
        self._bytes_total = sum(entry.nbytes for entry in wanted)
        self._cards_total, self._cards_done = len(wanted), 0
        self._bytes_before = self._bytes_of_card = 0
        self._last: tuple[_Link, InventoryEntry] | None = None

    def of(self, link: _Link, entry: InventoryEntry) -> Callable[[int], None]:
        """The callback for one attempt to fetch `entry` from `link`."""
        self._bytes_of_card = 0
        self._last = (link, entry)
        self._tell()

        def count(arrived: int) -> None:
            link.bytes_moved += arrived
            self._bytes_of_card += arrived
            self._tell()

        return count

    def card_ended(self, entry: InventoryEntry) -> None:
        """No more of this card will be tried."""
        self._cards_done += 1
        self._bytes_before += entry.nbytes
        self._bytes_of_card = 0
        self._tell()

    def _tell(self) -> None:
        if self._on_progress is None or self._last is None:
            return
        link, entry = self._last
        self._on_progress(
            SyncProgress(
                peer=link.peer,
                card=entry.label,
                bytes_done=self._bytes_before + self._bytes_of_card,
                bytes_total=self._bytes_total,
                cards_done=self._cards_done,
                cards_total=self._cards_total,
            )
        )


def _remember(memory: SyncMemory, links: Sequence[_Link], registry: Registry, only: Collection[str] | None) -> None:
    """Note the peers of which nothing is missing now; with `only`, nobody knows."""
    have = registry.digests()
    own_state = _own_state(registry, have)
    for link in links:
        if link.error is None and only is None and not diff.missing(link.missing, have):
            memory[link.peer.node_id] = (own_state, link.state)


def _own_state(registry: Registry, have: set[Digest]) -> str:
    """Changes with what is wanted here: a card that came back out of hiding is wanted again."""
    return wire.state_of(have | {card.digest for card in registry.hidden()})


__all__ = ["PeerReport", "SyncMemory", "SyncProgress", "SyncReport", "sync"]
