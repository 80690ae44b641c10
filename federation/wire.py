"""What nodes say to each other beside the cards themselves: names, JSON forms, and their limits. Pure; no I/O.

Decoding trusts nothing: size first, then form and types, all in one pass, and every failure is a `PeerError`.
Unknown fields are ignored, so that a later version may add some. `docs/protocol.md` is this file in words.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

from pydantic import FailFast, Field, StringConstraints, TypeAdapter, ValidationError

from federation import limits
from federation.errors import PeerError
from registry.digest import Digest, digest_of
from registry.manifest import CardName, CardVersion

PROTOCOL_VERSION = 1
SERVICE_TYPE = "_arrowmoe._tcp.local."
ACTION_HEALTH = "health"
ACTION_INVENTORY = "inventory"
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

_DigestText = Annotated[Digest, StringConstraints(pattern=r"^blake3:[0-9a-f]{64}$")]
_NodeName = Annotated[str, StringConstraints(min_length=1, max_length=limits.MAX_NAME_CHARS)]
_NodeId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
# FailFast: pydantic keeps every error it finds, which made 500 MiB of a hostile page of 1 MiB.
_Texts = Annotated[tuple[str, ...], FailFast()]
_Count = Annotated[int, Field(ge=0, le=1 << 40)]


@dataclass(frozen=True, kw_only=True)
class Health:
    """A node's answer to "who are you". `state` changes if and only if the set of its cards does."""

    node_id: _NodeId
    name: _NodeName
    protocol: int
    cards: _Count
    state: str


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
class _Page:
    cards: Annotated[tuple[InventoryEntry, ...], Field(max_length=limits.MAX_PAGE_ENTRIES), FailFast()]


_HEALTH = TypeAdapter(Health)
_REQUEST = TypeAdapter(CardRequest)
_PAGE = TypeAdapter(_Page)


def state_of(digests: Iterable[Digest]) -> str:
    """The token of a set of cards: equal sets, and only they, have equal tokens."""
    return digest_of("\n".join(sorted(digests)).encode())


def encode_health(health: Health) -> bytes:
    """A health answer as JSON."""
    return _json(asdict(health))


def decode_health(data: bytes) -> Health:
    """A peer's health answer. Raises `PeerError`, also for another protocol version."""
    health: Health = _decode(_HEALTH, data, "a health answer", limits.MAX_HEALTH_BYTES)
    if health.protocol != PROTOCOL_VERSION:
        raise PeerError(
            f"expected protocol version {PROTOCOL_VERSION}, got {health.protocol}, so nothing can be exchanged",
            hint="run the same release of arrowmoe on both nodes",
        )
    return health


def encode_card_request(request: CardRequest) -> bytes:
    """The body of the actions `manifest` and `tensors`."""
    return _json(asdict(request))


def decode_card_request(data: bytes) -> CardRequest:
    """What a client asks of these actions. Raises `PeerError`."""
    request: CardRequest = _decode(_REQUEST, data, "a request for a card", limits.MAX_REQUEST_BYTES)
    return request


def encode_inventory(entries: Iterable[InventoryEntry]) -> Iterator[bytes]:
    """Pages of JSON, each within the limits; at least one, even if there are no entries."""
    page: list[bytes] = []
    size = 0
    for entry in entries:
        data = _fitted(entry)
        if len(page) == limits.MAX_PAGE_ENTRIES or size + len(data) > limits.MAX_PAGE_BYTES - 1024:
            yield _page(page)
            page, size = [], 0
        page.append(data)
        size += len(data) + 1
    yield _page(page)


def decode_inventory(pages: Iterable[bytes]) -> list[InventoryEntry]:
    """A peer's whole inventory, each digest once. Raises `PeerError` as soon as it is more than the limits allow."""
    entries: dict[Digest, InventoryEntry] = {}
    size = count = 0
    for data in pages:
        size += len(data)
        if size > limits.MAX_INVENTORY_BYTES:
            raise PeerError(f"expected an inventory of at most {limits.MAX_INVENTORY_BYTES} bytes, got more")
        page: _Page = _decode(_PAGE, data, "a page of an inventory", limits.MAX_PAGE_BYTES)
        count += max(1, len(page.cards))  # so that endless empty pages end too
        if count > limits.MAX_INVENTORY_ENTRIES:
            raise PeerError(f"expected an inventory of at most {limits.MAX_INVENTORY_ENTRIES} cards, got more")
        entries |= {entry.digest: entry for entry in page.cards}
    return list(entries.values())


def _fitted(entry: InventoryEntry) -> bytes:
    """The entry as JSON, with less and less prose until it fits; examples go first."""
    data = _json(asdict(entry))
    while len(data) > limits.MAX_ENTRY_BYTES:
        entry = _shortened(entry)
        data = _json(asdict(entry))
    return data


def _shortened(entry: InventoryEntry) -> InventoryEntry:
    if entry.examples:
        return replace(entry, examples=entry.examples[: len(entry.examples) // 2])
    if entry.domains:
        return replace(entry, domains=entry.domains[: len(entry.domains) // 2])
    if entry.description:
        return replace(entry, description=entry.description[: len(entry.description) // 2])
    return replace(entry, base_name=None, architecture=None, publisher=None)


def _page(cards: list[bytes]) -> bytes:
    return b'{"cards":[' + b",".join(cards) + b"]}"


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def _decode(form: TypeAdapter[Any], data: bytes, what: str, limit: int) -> Any:
    if len(data) > limit:
        raise PeerError(f"expected {what} of at most {limit} bytes, got {len(data)}")
    try:
        return form.validate_json(data, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise PeerError(f"{what} is not of the expected form at {place[:200]}: {first['msg'][:200]}") from error


__all__ = [
    "ACTION_HEALTH",
    "ACTION_INVENTORY",
    "ACTION_MANIFEST",
    "ACTION_TENSORS",
    "DESCRIPTOR_ROOT",
    "MANIFEST_KEY",
    "NOT_FOUND",
    "PROTOCOL_VERSION",
    "SERVICE_TYPE",
    "CardRequest",
    "Health",
    "InventoryEntry",
    "decode_card_request",
    "decode_health",
    "decode_inventory",
    "encode_card_request",
    "encode_health",
    "encode_inventory",
    "state_of",
]
