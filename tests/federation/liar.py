"""A hostile Flight server: each attribute is a lie that it tells; None means the honest answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pyarrow import flight

from federation import wire
from registry.card import LoRACard
from registry.changes import Change, Changes, Kind

NODE_ID = "0123456789abcdef" * 2
INDEX_ID = "f0e1d2c3b4a59687" * 2


class Liar(flight.FlightServerBase):
    """Serves `card` and lies about it as told."""

    def __init__(self, card: LoRACard) -> None:
        self.card = card
        self.header: Callable[[], Iterator[Any]] = lambda: header(self.card)
        self.asked: list[bytes] = []
        self.tensor_bytes: Callable[[], Iterator[Any]] = lambda: part_of(self.card, self.asked[-1])
        self.results: dict[str, Callable[[], Iterator[bytes]]] = {
            wire.ACTION_HEALTH: lambda: iter([wire.encode_health(health())]),
            wire.ACTION_CHANGES: lambda: iter([changes_of([entry_of(card)])]),
            wire.ACTION_MANIFEST: lambda: self.header(),
            wire.ACTION_TENSORS: lambda: self.tensor_bytes(),
        }
        super().__init__("grpc+tcp://127.0.0.1:0")

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def do_action(self, context: Any, action: flight.Action) -> Iterator[bytes]:
        self.asked.append(action.body.to_pybytes())
        return self.results[action.type]()


def header(card: LoRACard) -> Iterator[bytes]:
    """A card's manifest, and its signature if it has one."""
    yield card.manifest_bytes
    if card.signature is not None:
        yield str(card.signature).encode()


def tensor_bytes(card: LoRACard) -> Iterator[bytes]:
    """A card's tensor bytes, one message for each tensor."""
    for tensor in card.tensors:
        yield bytes(tensor.data)


def part_of(card: LoRACard, body: bytes) -> Iterator[bytes]:
    """What the request in `body` asks for of a card's tensor bytes, at most one message for each tensor."""
    request = wire.decode_card_request(body)
    end = card.nbytes if request.nbytes is None else request.offset + request.nbytes
    position = 0
    for data in tensor_bytes(card):
        part = data[max(0, request.offset - position) : max(0, end - position)]
        position += len(data)
        if part:
            yield part


def health(**changes: Any) -> wire.Health:
    fields = {"node_id": NODE_ID, "name": "liar", "protocol": wire.PROTOCOL_VERSION, "index_id": INDEX_ID, "last": 1}
    return wire.Health(**(fields | changes))


def changes_of(entries: Iterable[wire.InventoryEntry], *, since: int = 0, last: int = 0) -> bytes:
    """A page of changes that says a node has `entries` and, unless `last` says otherwise, no more than them."""
    offered = {entry.digest: entry for entry in entries}
    changes = [
        Change(sequence=since + number, digest=digest, kind=Kind.ADDED)
        for number, digest in enumerate(offered, start=1)
    ]
    last = max(last, since + len(changes))
    return wire.encode_changes(Changes(index_id=INDEX_ID, since=since, last=last, entries=tuple(changes)), offered)


def entry_of(card: LoRACard, **changes: Any) -> wire.InventoryEntry:
    manifest = card.manifest
    fields = {
        "digest": card.digest,
        "name": card.name,
        "version": card.version,
        "base_name": manifest.base.name,
        "architecture": manifest.base.architecture,
        "fingerprint": manifest.base.fingerprint,
        "rank": manifest.adapter.rank,
        "nbytes": card.nbytes,
        "has_statistics": manifest.routing is not None,
    }
    return wire.InventoryEntry(**(fields | changes))
