"""What nodes say to each other beside the cards themselves: names, JSON forms, and their limits. Pure; no I/O.

Decoding trusts nothing: size first, then form and types, all in one pass, and every failure is a `PeerError`.
Unknown fields are ignored, so that a later version may add some. `docs/protocol.md` is this file in words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Annotated

from pydantic import FailFast, Field, StringConstraints, TypeAdapter

from federation import limits
from federation.errors import PeerError, ProtocolError
from federation.forms import decoded, json_bytes
from registry.changes import Changes, Kind, Position
from registry.digest import Digest
from registry.errors import CardError
from registry.identity import Signature
from registry.manifest import CardName, CardVersion
from registry.tombstones import MAX_TOMBSTONE_BYTES, Tombstone

PROTOCOL_VERSION = 2
SERVICE_TYPE = "_arrowmoe._tcp.local."
ACTION_HEALTH = "health"
ACTION_CHANGES = "changes"
ACTION_MANIFEST = "manifest"
ACTION_TENSORS = "tensors"
DESCRIPTOR_ROOT = "skills"
"""First part of every descriptor's path: ``skills / NAME / VERSION / DIGEST``."""

MANIFEST_KEY = b"arrowmoe.manifest"
"""Key of the manifest in a card's schema metadata."""

SIGNATURE_KEY = b"arrowmoe.signature"
"""Key of the signature there."""

FORMAT_KEY = b"arrowmoe.format"
"""Key of the format's version there."""

NOT_FOUND = b"not-found"
"""Extra info of the Flight error for a card that a server does not have."""

NOT_APPROVED = b"not-approved"
"""Extra info of the Flight error for a caller that the server's owner has not approved, or has blocked."""

PUSH_REFUSED = b"push-refused"
"""Extra info of the Flight error for a caller from which the server takes no cards."""

_DigestText = Annotated[Digest, StringConstraints(pattern=r"^blake3:[0-9a-f]{64}$")]
_NodeName = Annotated[str, StringConstraints(min_length=1, max_length=limits.MAX_NAME_CHARS)]
_NodeId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
_IndexId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
# FailFast: pydantic keeps every error it finds, which made 500 MiB of a hostile page of 1 MiB.
_Texts = Annotated[tuple[str, ...], FailFast()]
_Count = Annotated[int, Field(ge=0, le=1 << 40)]


@dataclass(frozen=True, kw_only=True)
class Health:
    """A node's answer to "who are you". `last` is the number of its latest change under `index_id`, 0 for none."""

    node_id: _NodeId
    name: _NodeName
    protocol: int
    index_id: _IndexId
    last: _Count

    @property
    def position(self) -> Position:
        """What whoever knows everything of the node's catalog knows."""
        return Position(index_id=self.index_id, upto=self.last)


@dataclass(frozen=True, kw_only=True)
class CardRequest:
    """Asks for a card's manifest, or for `nbytes` (None: all) of its tensor bytes from byte `offset` on."""

    digest: _DigestText
    offset: _Count = 0
    nbytes: _Count | None = None


@dataclass(frozen=True, kw_only=True)
class InventoryEntry:
    """What a peer says of one card; enough to index it as a virtual candidate. Only `digest` can be verified."""

    digest: _DigestText
    name: CardName
    version: CardVersion
    base_name: str | None = None
    architecture: str | None = None
    fingerprint: _DigestText
    rank: Annotated[int, Field(ge=1, le=1 << 16)]
    nbytes: _Count
    description: Annotated[str, StringConstraints(max_length=16_384)] = ""
    domains: _Texts = ()
    examples: _Texts = ()
    publisher: str | None = None
    has_statistics: bool = False

    @property
    def label(self) -> str:
        """``NAME@VERSION``."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, kw_only=True)
class ChangesPage:
    """What changed in a peer's catalog from number `since` up to `upto`, of `last` in all.

    `added`: cards that it has; `gone`: cards that it has not; `tombstones`: not verified yet. A page since 0 stands
    for itself; another adds to what was known up to `since`.
    """

    index_id: str
    since: int
    upto: int
    last: int
    added: tuple[InventoryEntry, ...]
    gone: tuple[Digest, ...]
    tombstones: tuple[Tombstone, ...]

    @property
    def position(self) -> Position:
        """What is known after this page."""
        return Position(index_id=self.index_id, upto=self.upto)

    @property
    def more(self) -> bool:
        """Whether another page follows."""
        return self.upto < self.last


@dataclass(frozen=True, kw_only=True)
class _ChangesRequest:
    index_id: _IndexId | None
    since: _Count


@dataclass(frozen=True, kw_only=True)
class _Tombstone:
    body: Annotated[str, StringConstraints(max_length=MAX_TOMBSTONE_BYTES)]
    signature: Annotated[str, StringConstraints(max_length=256)]


_Changed = Field(max_length=limits.MAX_PAGE_CHANGES)


@dataclass(frozen=True, kw_only=True)
class _Page:
    index_id: _IndexId
    since: _Count
    upto: _Count
    last: _Count
    added: Annotated[tuple[InventoryEntry, ...], _Changed, FailFast()]
    gone: Annotated[tuple[_DigestText, ...], _Changed, FailFast()]
    tombstones: Annotated[tuple[_Tombstone, ...], _Changed, FailFast()]


_HEALTH = TypeAdapter(Health)
_CARD_REQUEST = TypeAdapter(CardRequest)
_CHANGES_REQUEST = TypeAdapter(_ChangesRequest)
_ENTRY = TypeAdapter(InventoryEntry)
_PAGE = TypeAdapter(_Page)


def encode_health(health: Health) -> bytes:
    """A health answer as JSON."""
    return json_bytes(asdict(health))


def decode_health(data: bytes) -> Health:
    """A peer's health answer. Raises `PeerError`, also for another protocol version."""
    health: Health = decoded(_HEALTH, data, "a health answer", limits.MAX_HEALTH_BYTES)
    if health.protocol != PROTOCOL_VERSION:
        raise ProtocolError(
            f"expected protocol version {PROTOCOL_VERSION}, got {health.protocol}, so nothing can be exchanged",
            hint="run the same release of arrowmoe on both nodes",
        )
    return health


def encode_card_request(request: CardRequest) -> bytes:
    """The body of the actions `manifest` and `tensors`."""
    return json_bytes(asdict(request))


def decode_card_request(data: bytes) -> CardRequest:
    """What a client asks of these actions. Raises `PeerError`."""
    request: CardRequest = decoded(_CARD_REQUEST, data, "a request for a card", limits.MAX_REQUEST_BYTES)
    return request


def encode_changes_request(known: Position) -> bytes:
    """The body of the action `changes`: what is known already."""
    return json_bytes({"index_id": known.index_id, "since": known.upto})


def decode_changes_request(data: bytes) -> Position:
    """What a client knows that asks for changes. Raises `PeerError`."""
    request: _ChangesRequest = decoded(_CHANGES_REQUEST, data, "a request for changes", limits.MAX_REQUEST_BYTES)
    return Position(index_id=request.index_id, upto=request.since)


def encode_changes(page: Changes, offered: Mapping[Digest, InventoryEntry]) -> bytes:
    """As many of the page's changes as one message may hold, as JSON; `offered` has the added cards that are here."""
    upto, size = page.since, 1024
    news: dict[Digest, bytes | None] = {}  # of a digest that changed twice, the later one counts
    tombstones: list[bytes] = []
    for change in page.entries:
        entry = offered.get(change.digest) if change.kind is Kind.ADDED else None
        card = None if entry is None else _fitted(entry)
        proof = [] if change.tombstone is None else [_tombstone(change.tombstone)]
        size += sum(map(len, (card or change.digest.encode(), *proof))) + 8
        if size > limits.MAX_PAGE_BYTES:
            break
        news[change.digest] = card
        tombstones += proof
        upto = change.sequence
    else:
        upto = page.upto
    head: dict[str, object] = {"index_id": page.index_id, "since": page.since, "upto": upto, "last": page.last}
    head["gone"] = [digest for digest, card in news.items() if card is None]
    added = b",".join(card for card in news.values() if card is not None)
    return b'%s,"added":[%s],"tombstones":[%s]}' % (json_bytes(head)[:-1], added, b",".join(tombstones))


def decode_changes(data: bytes, asked: Position) -> ChangesPage:
    """A peer's changes since what `asked` knows, or since 0. Raises `PeerError`."""
    page: _Page = decoded(_PAGE, data, "a page of changes", limits.MAX_PAGE_BYTES)
    if page.since and (page.index_id, page.since) != (asked.index_id, asked.upto):
        raise PeerError(f"expected changes since {asked.upto} or 0, got those since {page.since}")
    if not page.since <= page.upto <= page.last or page.since == page.upto < page.last:
        raise PeerError(f"expected changes that lead from {page.since} to {page.last}, got those up to {page.upto}")
    try:
        tombstones = tuple(Tombstone.parse(t.body.encode(), Signature.parse(t.signature)) for t in page.tombstones)
    except CardError as error:
        raise PeerError(f"a tombstone among the changes is not of the expected form: {error}") from error
    return ChangesPage(
        index_id=page.index_id,
        since=page.since,
        upto=page.upto,
        last=page.last,
        added=page.added,
        gone=page.gone,
        tombstones=tombstones,
    )


def encode_entry(entry: InventoryEntry) -> str:
    """An entry as it is kept here."""
    return json_bytes(asdict(entry)).decode()


def decode_entry(text: str) -> InventoryEntry:
    """An entry that was kept here. Raises `PeerError`."""
    entry: InventoryEntry = decoded(_ENTRY, text.encode(), "an entry of an inventory", limits.MAX_PAGE_BYTES)
    return entry


def _fitted(entry: InventoryEntry) -> bytes:
    """The entry as JSON, with less and less prose until it fits; examples go first."""
    data = json_bytes(asdict(entry))
    while len(data) > limits.MAX_ENTRY_BYTES:
        entry = _shortened(entry)
        data = json_bytes(asdict(entry))
    return data


def _shortened(entry: InventoryEntry) -> InventoryEntry:
    if entry.examples:
        return replace(entry, examples=entry.examples[: len(entry.examples) // 2])
    if entry.domains:
        return replace(entry, domains=entry.domains[: len(entry.domains) // 2])
    if entry.description:
        return replace(entry, description=entry.description[: len(entry.description) // 2])
    return replace(entry, base_name=None, architecture=None, publisher=None)


def _tombstone(tombstone: Tombstone) -> bytes:
    return json_bytes({"body": tombstone.body.decode(), "signature": str(tombstone.signature)})


__all__ = [
    "ACTION_CHANGES",
    "ACTION_HEALTH",
    "ACTION_MANIFEST",
    "ACTION_TENSORS",
    "DESCRIPTOR_ROOT",
    "FORMAT_KEY",
    "MANIFEST_KEY",
    "NOT_APPROVED",
    "NOT_FOUND",
    "PROTOCOL_VERSION",
    "PUSH_REFUSED",
    "SERVICE_TYPE",
    "SIGNATURE_KEY",
    "CardRequest",
    "ChangesPage",
    "Health",
    "InventoryEntry",
    "decode_card_request",
    "decode_changes",
    "decode_changes_request",
    "decode_entry",
    "decode_health",
    "encode_card_request",
    "encode_changes",
    "encode_changes_request",
    "encode_entry",
    "encode_health",
]
