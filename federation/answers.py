"""What a node answers to each action, whoever carries it; `federation.server` puts them on Flight."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import pyarrow as pa
from pyarrow import flight

from federation import limits, wire
from federation.card_files import described, one_line, opened, small, tensor_bytes
from registry.changes import Changes, Kind, Position
from registry.digest import Digest
from registry.entries import CardEntry
from registry.errors import UnknownCardError
from registry.logs import get_logger
from registry.store import Registry

_log = get_logger(__name__)

Result: TypeAlias = "bytes | pa.Buffer"


@dataclass(frozen=True, kw_only=True)
class Action:
    """One thing that can be asked. `answer` takes the request's body; `streams`: its results may be many."""

    description: str
    answer: Callable[[bytes], Iterator[Result]]
    streams: bool = False


class Answers:
    """The actions of one registry's node."""

    def __init__(self, registry: Registry, *, node_id: str, name: str) -> None:
        self._registry, self._node_id, self._name = registry, node_id, name
        self._with_statistics: dict[Digest, bool] = {}
        self.actions: Mapping[str, Action] = {
            wire.ACTION_HEALTH: Action(
                description="who this node is and the number of its latest change, as one JSON object",
                answer=self._health,
            ),
            wire.ACTION_CHANGES: Action(
                description="what changed since a number: cards that are here, gone or removed, as a page of JSON",
                answer=self._changes,
                streams=True,
            ),
            wire.ACTION_MANIFEST: Action(
                description="a card's manifest, and its signature if it has one; a small card's tensors too, if wanted",
                answer=self._manifest,
            ),
            wire.ACTION_TENSORS: Action(
                description="a card's tensor bytes in the manifest's order, or a part of them",
                answer=self._tensors,
                streams=True,
            ),
        }

    def _health(self, body: bytes) -> Iterator[Result]:
        page = self._registry.changes(limit=1)
        health = wire.Health(
            node_id=self._node_id,
            name=self._name,
            protocol=wire.PROTOCOL_VERSION,
            index_id=page.index_id,
            last=page.last,
        )
        return iter([wire.encode_health(health)])

    def _changes(self, body: bytes) -> Iterator[Result]:
        page = self._changes_since(wire.decode_changes_request(body))
        added = (change.digest for change in page.entries if change.kind is Kind.ADDED)
        entries = self._registry.entries(added)  # some may be gone since: the next page says so
        offered = {entry.digest: _offer(entry, self._has_statistics(entry.digest)) for entry in entries}
        return iter([wire.encode_changes(page, offered)])

    def _changes_since(self, known: Position) -> Changes:
        """What came after `known`; everything, if `known` is not of this catalog as it is now."""
        page = self._registry.changes(known.upto, limits.MAX_PAGE_CHANGES)
        if known.upto and (page.index_id != known.index_id or page.last < known.upto):
            return self._registry.changes(0, limits.MAX_PAGE_CHANGES)
        return page

    def _manifest(self, body: bytes) -> Iterator[Result]:
        request = wire.decode_card_request(body)
        reader = opened(self._registry, request.digest)
        tensors = small(reader, min(request.nbytes or 0, limits.SMALL_CARD_BYTES))
        parts = described(reader)
        return iter([*parts, *([b""] if tensors and len(parts) == 1 else []), *tensors])

    def _tensors(self, body: bytes) -> Iterator[Result]:
        request = wire.decode_card_request(body)
        nbytes = sys.maxsize if request.nbytes is None else request.nbytes
        return tensor_bytes(opened(self._registry, request.digest), request.offset, nbytes)

    def _has_statistics(self, digest: Digest) -> bool:
        """Whether the card has statistics for routers: remembered, for no column says it and no card ever changes."""
        if digest not in self._with_statistics:
            try:
                manifest, *_ = described(opened(self._registry, digest))
                self._with_statistics[digest] = json.loads(manifest).get("routing") is not None
            except (flight.FlightServerError, UnknownCardError, ValueError) as error:  # damaged, or removed meanwhile
                _log.warning("card_statistics_unknown", digest=digest, error=one_line(error))
                return False
        return self._with_statistics[digest]


def _offer(entry: CardEntry, has_statistics: bool) -> wire.InventoryEntry:
    return wire.InventoryEntry(
        digest=entry.digest,
        name=entry.name,
        version=entry.version,
        base_name=entry.base_name,
        architecture=entry.architecture,
        fingerprint=entry.fingerprint,
        rank=entry.rank,
        nbytes=entry.nbytes,
        description=entry.description,
        domains=entry.domains,
        examples=entry.examples,
        publisher=entry.publisher,
        has_statistics=has_statistics,
    )


__all__ = ["Action", "Answers", "Result"]
