"""The sync: hear what changed at this node's peers, fetch what is missing, verify it, and keep it.

What a peer has is kept (`registry.inventories`), so only what changed since is asked for; removals that a peer passes
on are heeded as they come. One failing card or peer never stops the others, and nothing that fails goes unreported. A
card that several peers hold is fetched once, in parts from all of them (`federation.transfer`). Nothing of a card is
visible here before all of it is verified.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Protocol, Self, TypeAlias

from federation import diff, limits, wire
from federation.board import Holder, Source, Wanted
from federation.client import LoRAFlightClient
from federation.condition import Condition
from federation.diff import SyncFilter
from federation.entrance import Entrance
from federation.errors import FederationError, PeerError
from federation.pace import Pace
from federation.peer import Peer
from federation.transfer import CardOutcome, TransferProgress, transfer
from federation.wire import InventoryEntry
from registry.card import LoRACard
from registry.changes import Position
from registry.digest import Digest
from registry.entries import CardEntry, Origin
from registry.errors import CardIntegrityError
from registry.inventories import Inventories, InventorySize
from registry.logs import get_logger
from registry.store import Registry
from registry.tombstones import Tombstone

_log = get_logger(__name__)


class PeerClient(Source, Protocol):
    """What a sync needs of a peer. All raise `FederationError`."""

    def health(self) -> wire.Health:
        """Who answers there."""

    def changes(self, known: Position) -> wire.ChangesPage:
        """What changed since what is `known`, or since 0."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


Connect: TypeAlias = Callable[[Peer, float], PeerClient]
"""Takes a peer and the seconds that a call may last which moves no tensors."""


def connect(peer: Peer, timeout_s: float) -> LoRAFlightClient:
    """A client of the peer at its address, whoever that is."""
    return LoRAFlightClient(peer.address, timeout_s=timeout_s)


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
    """What became of one peer.

    `error`: why it could not be asked. `missing`: what it offers that is wanted and was not here. `removed`: cards that
    are removed for good, as was heard from it first. `failed`: digests that it could not give or remove, and why.
    """

    peer: Peer
    error: str | None = None
    condition: Condition = Condition.ONLINE
    offered: int = 0
    missing: tuple[InventoryEntry, ...] = ()
    removed: tuple[Tombstone, ...] = ()
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
    wanted: SyncFilter = SyncFilter(),  # noqa: B008  # a frozen value
    dry_run: bool = False,
    on_progress: Callable[[SyncProgress], None] | None = None,
    timeout_s: float = limits.CALL_TIMEOUT_S,
    connect: Connect = connect,
    entrance: Entrance | None = None,
    pace: Pace | None = None,
    cancelled: threading.Event | None = None,
) -> SyncReport:
    """Copy the `wanted` cards that `peers` have and this registry lacks.

    Removals by a card's publisher that a peer passes on take place here too, whatever is wanted. `dry_run` fetches
    nothing; what was heard is kept even so. `entrance` decides what comes in, and what waits in quarantine; without one
    everything is let in. `pace` and `cancelled`: as `transfer` has them.
    """
    with ExitStack() as stack:
        links = [_Link(peer, stack.enter_context(connect(peer, timeout_s))) for peer in peers]
        with ThreadPoolExecutor(limits.MAX_PEERS_ASKED, "arrowmoe-sync") as pool:  # one that is silent delays no other
            _ = [*pool.map(lambda link: _hear(link, registry, wanted), links)]
        if not dry_run:
            _fetch(registry, links, wanted, on_progress, entrance, pace, cancelled)
    return SyncReport(peers=tuple(link.report() for link in links))


@dataclass(kw_only=False)
class _Link:
    """One peer during one sync."""

    peer: Peer
    client: PeerClient
    error: FederationError | None = None
    offered: int = 0
    missing: list[InventoryEntry] = field(default_factory=list)
    removed: list[Tombstone] = field(default_factory=list)
    fetched: list[CardEntry] = field(default_factory=list)
    failed: list[tuple[Digest, str]] = field(default_factory=list)
    bytes_moved: int = 0
    tensors_verified: int = 0
    seconds: float = 0.0

    @property
    def origin(self) -> Origin:
        """What the catalog will say of cards that came from there."""
        return Origin(peer_id=self.peer.node_id, address=self.peer.address)

    @property
    def condition(self) -> Condition:
        if self.error is not None:
            return Condition.after(self.error)
        lacking = {entry.digest for entry in self.missing} - {entry.digest for entry in self.fetched}
        return Condition.ONLINE if lacking else Condition.UP_TO_DATE

    def report(self) -> PeerReport:
        return PeerReport(
            peer=self.peer,
            error=None if self.error is None else str(self.error),
            condition=self.condition,
            offered=self.offered,
            missing=tuple(self.missing),
            removed=tuple(self.removed),
            fetched=tuple(self.fetched),
            failed=tuple(self.failed),
            bytes_moved=self.bytes_moved,
            tensors_verified=self.tensors_verified,
            seconds=self.seconds,
        )


def _hear(link: _Link, registry: Registry, wanted: SyncFilter) -> None:
    """Ask the peer who it is and, unless that says that nothing is new, what changed; then see what is missing."""
    started = time.monotonic()
    inventories = Inventories(registry.database)
    try:
        health = link.client.health()
        link.peer = _identified(link.peer, health, registry.identity.id)
        if inventories.position(health.node_id) != health.position:
            _read_changes(link, registry, inventories)
        link.offered = inventories.count(health.node_id)
        link.missing = _missing(registry, inventories.lacking(health.node_id), wanted)
    except FederationError as error:
        link.error = error
        _log.warning("peer_failed", peer=link.peer.address, error=str(error), kind=type(error).__name__)
    link.seconds += time.monotonic() - started


def _read_changes(link: _Link, registry: Registry, inventories: Inventories) -> None:
    """Read the peer's changes page by page. Each is kept as it comes, so that a cut costs one page."""
    node_id = link.peer.node_id
    known, size = inventories.position(node_id), inventories.size(node_id)
    for _ in range(limits.MAX_PAGES):
        page = link.client.changes(known)
        _heed(link, registry, page.tombstones)
        added = {entry.digest: wire.encode_entry(entry) for entry in page.added}
        size = _grown(size if page.since else InventorySize(), added.values())
        known = inventories.note(node_id, since=page.since, told=page.position, added=added, gone=page.gone)
        if known.index_id == page.index_id and known.upto >= page.last:
            return
    _log.warning("changes_unfinished", peer=str(link.peer), known=known.upto, hint="the next sync reads on")


def _heed(link: _Link, registry: Registry, tombstones: Iterable[Tombstone]) -> None:
    """Remove here what its publisher removed. Who passes a wrong tombstone on may be deceived as well."""
    for tombstone in tombstones:
        try:
            if registry.apply_tombstone(tombstone, origin=link.origin):
                link.removed.append(tombstone)
        except CardIntegrityError as error:
            link.failed.append((tombstone.digest, str(error)))
            _log.warning("tombstone_refused", card=tombstone.label, peer=str(link.peer), error=str(error))


def _grown(size: InventorySize, added: Collection[str]) -> InventorySize:
    """The size with the entries `added`. Raises `PeerError` if that is more than is kept of one node."""
    size = InventorySize(cards=size.cards + len(added), chars=size.chars + sum(map(len, added)))
    if size.cards > limits.MAX_INVENTORY_ENTRIES or size.chars > limits.MAX_INVENTORY_CHARS:
        raise PeerError(
            f"expected an inventory of at most {limits.MAX_INVENTORY_ENTRIES} cards and {limits.MAX_INVENTORY_CHARS} "
            f"characters, got {size.cards} and {size.chars}, so nothing more is read from this peer"
        )
    return size


def _missing(registry: Registry, lacking: Iterable[str], wanted: SyncFilter) -> list[InventoryEntry]:
    entries = [entry for entry in map(wire.decode_entry, lacking) if wanted.wants(entry)]
    refused = registry.refused((entry.digest, entry.publisher) for entry in entries) if entries else set()
    return sorted((entry for entry in entries if entry.digest not in refused), key=lambda entry: entry.label)


def _identified(peer: Peer, health: wire.Health, own_id: str) -> Peer:
    """The peer as it calls itself, which this release cannot prove."""
    if health.node_id == own_id:
        raise FederationError("that address is this node itself", hint="name another node with --peer")
    if peer.node_id and peer.node_id != health.node_id:
        raise PeerError(f"expected node {peer.node_id} at {peer.address}, got {health.node_id}")
    return replace(peer, node_id=health.node_id, name=health.name)


def _fetch(
    registry: Registry,
    links: Sequence[_Link],
    wanted: SyncFilter,
    on_progress: Callable[[SyncProgress], None] | None,
    entrance: Entrance | None,
    pace: Pace | None,
    cancelled: threading.Event | None,
) -> None:
    """Bring every missing card from all that hold it, and enter what became of it."""
    started = time.monotonic()
    of_holder = {Holder(source=link.client, origin=link.origin): link for link in links}
    offered: dict[Digest, list[Holder]] = {}
    for holder, link in of_holder.items():
        for entry in link.missing:
            offered.setdefault(entry.digest, []).append(holder)
    outcomes = transfer(
        registry,
        [
            Wanted(digest=entry.digest, label=entry.label, nbytes=entry.nbytes, holders=tuple(offered[entry.digest]))
            for entry in diff.missing((entry for link in links for entry in link.missing), ())
        ],
        check=lambda card, origin: _check(card, origin, wanted, entrance),
        keep=None if entrance is None else entrance.keep,
        on_progress=None if on_progress is None else lambda done: on_progress(_progress(of_holder[done.holder], done)),
        pace=pace,
        cancelled=cancelled,
    )
    for outcome in outcomes:
        _enter(of_holder, outcome)
    seconds = time.monotonic() - started
    for link in of_holder.values():
        link.seconds += seconds if link.missing else 0.0


def _check(card: LoRACard, origin: Origin, wanted: SyncFilter, entrance: Entrance | None) -> None:
    """Whether the card may come: a peer's entry may have promised another one, and the owner may not want it."""
    if not wanted.wants(diff.entry_of(card)):
        raise PeerError(f"expected the card as it was offered, got {card.name}@{card.version}, which is not wanted")
    if entrance is not None:
        entrance.check(card, origin)


def _enter(of_holder: Mapping[Holder, _Link], outcome: CardOutcome) -> None:
    """What became of a card, in the reports of those who gave it, or could not."""
    for holder, nbytes in outcome.moved.items():
        of_holder[holder].bytes_moved += nbytes
    for holder, why in outcome.failures:
        of_holder[holder].failed.append((outcome.wanted.digest, why))
    if outcome.entry is not None:
        giver = of_holder[outcome.giver]
        giver.fetched.append(outcome.entry)
        giver.tensors_verified += outcome.tensors_verified


def _progress(link: _Link, done: TransferProgress) -> SyncProgress:
    return SyncProgress(
        peer=link.peer,
        card=done.card,
        bytes_done=done.bytes_done,
        bytes_total=done.bytes_total,
        cards_done=done.cards_done,
        cards_total=done.cards_total,
    )


__all__ = ["Connect", "PeerClient", "PeerReport", "SyncProgress", "SyncReport", "connect", "sync"]
