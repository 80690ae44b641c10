"""Defects of servers and the checks that see them: changes of our own server's parts, of none that the checks use."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import flight

from federation import answers, gate, handshake, membership, server, wire
from federation.errors import PeerError
from registry.changes import Position
from registry.identity import Identity, fingerprint_of
from registry.store import Registry

Patch = Callable[[pytest.MonkeyPatch, Registry], None]


LAST = 6


def replaced(target: Any, name: str, new: Callable[..., Any]) -> Patch:
    """`new` in the place of `target.name`; its first argument is the old one."""

    def patch(monkeypatch: pytest.MonkeyPatch, registry: Registry) -> None:
        old = getattr(target, name)
        monkeypatch.setattr(target, name, lambda *given, **named: new(old, *given, **named))

    return patch


def health_with(**fields: Any) -> Patch:
    def changed(old: Any, self: Any, body: bytes) -> Iterator[bytes]:
        (answer,) = old(self, body)
        said = json.loads(answer) | fields
        yield json.dumps({name: value for name, value in said.items() if value is not ...}).encode()

    return replaced(answers.Answers, "_health", changed)


def page_with(change: Callable[[dict[str, Any]], object]) -> Patch:
    def changed(old: Any, *given: Any) -> bytes:
        page = json.loads(old(*given))
        change(page)
        return json.dumps(page).encode()

    return replaced(wire, "encode_changes", changed)


def offer_with(**fields: Any) -> Patch:
    return replaced(answers, "_offer", lambda old, *given: dataclasses.replace(old(*given), **fields))


def since(rule: Callable[[Position], Position | None]) -> Patch:
    """What the node takes a client to know, where `rule` says so; else as it is."""

    def changed(old: Any, self: Any, known: Position) -> Any:
        taken = rule(known)
        return old(self, known) if taken is None else self._registry.changes(taken.upto, 1000)

    return replaced(answers.Answers, "_changes_since", changed)


def lenient(old: Any, data: bytes) -> Any:
    try:
        return old(data)
    except PeerError:
        return Position()


def any_card(monkeypatch: pytest.MonkeyPatch, registry: Registry) -> None:
    card = wire.CardRequest(digest=registry.entry("poet@1").digest)

    def changed(old: Any, data: bytes) -> Any:
        try:
            return old(data)
        except PeerError:
            return card

    replaced(wire, "decode_card_request", changed)(monkeypatch, registry)


def another_error(old: Any, self: Any, *given: Any) -> Any:
    try:
        return old(self, *given)
    except flight.FlightServerError as error:
        raise flight.FlightServerError(str(error)) from None


def letting_uploads_in(monkeypatch: pytest.MonkeyPatch, registry: Registry) -> None:
    replaced(gate.Gate, "start_call", lambda *_: None)(monkeypatch, registry)
    for call in ("do_put", "do_exchange"):
        monkeypatch.setattr(server._Handlers, call, lambda *_: None, raising=False)


def unfound(old: Any, self: Any, body: bytes) -> Any:
    try:
        return old(self, body)
    except server.UnknownCardError as error:
        raise flight.FlightServerError(str(error)) from None


def reversed_tensors(old: Any, reader: Any, offset: int, nbytes: int) -> Iterator[bytes]:
    whole = [part.to_pybytes() for part in old(reader, 0, 1 << 40)]
    yield b"".join(whole)[::-1][offset : offset + nbytes]


def flipped(old: Any, reader: Any, offset: int, nbytes: int) -> Iterator[bytes]:
    parts = [bytes(part) for part in old(reader, offset, nbytes)]
    yield bytes([parts[0][0] ^ 1]) + parts[0][1:]
    yield from parts[1:]


def in_one_message(old: Any, reader: Any, offset: int, nbytes: int) -> Iterator[bytes]:
    whole = b"".join(map(bytes, old(reader, offset, nbytes)))
    return iter([whole] if whole else [])


def with_empty_messages(old: Any, reader: Any, offset: int, nbytes: int) -> Iterator[bytes]:
    for part in old(reader, offset, nbytes):
        yield from (b"", bytes(part))


def wrapping(old: Any, reader: Any, offset: int, nbytes: int) -> Iterator[Any]:
    size = sum(len(part) for part in old(reader, 0, 1 << 40))
    return old(reader, offset % size, nbytes)  # type: ignore[no-any-return]


def one_batch(old: Any, reader: Any) -> Iterator[pa.RecordBatch]:
    table = pa.Table.from_batches([*old(reader)]).combine_chunks()
    return iter(table.to_batches())


def bare_stream(old: Any, self: Any, context: Any, ticket: Any) -> Any:
    with self._answering(context, "do_get"):
        reader = server.opened(self._registry, ticket.ticket.decode(errors="replace"))
        schema = reader.schema.remove_metadata()
        table = pa.Table.from_batches([batch.replace_schema_metadata(None) for batch in server.batches(reader)], schema)
        return flight.RecordBatchStream(table)


def info_with(rows: int = 0, nbytes: int = 0, locations: tuple[str, ...] = ()) -> Patch:
    def changed(old: Any, *given: Any) -> flight.FlightInfo:
        info = old(*given)
        endpoint = flight.FlightEndpoint(info.endpoints[0].ticket, [*locations])
        total = info.total_records + rows, info.total_bytes + nbytes
        return flight.FlightInfo(info.schema, info.descriptor, [endpoint], *total)

    return replaced(server, "_info", changed)


def refusing_labels(old: Any, descriptor: Any) -> Any:
    parts = descriptor.path or []
    if len(parts) == 2 and b"@" in parts[1]:
        raise flight.FlightServerError("labels are not known here", wire.NOT_FOUND)
    return old(descriptor)


def answering_anything(old: Any, self: Any, context: Any, action: Any) -> Any:
    return iter([]) if action.type == "x-conformance" else old(self, context, action)


def answering_no_ticket(monkeypatch: pytest.MonkeyPatch, registry: Registry) -> None:
    some = flight.Ticket(registry.entry("poet@1").digest)

    def changed(old: Any, self: Any, context: Any, ticket: Any) -> Any:
        return old(self, context, ticket if ticket.ticket else some)

    replaced(server._Handlers, "do_get", changed)(monkeypatch, registry)


def crashing(old: Any, data: bytes) -> Any:
    if not data:
        raise flight.FlightServerError('Traceback (most recent call last):\n  File "server.py", line 1\nKeyError')
    return old(data)


def knowing_all_fields(old: Any, data: bytes) -> Any:
    if b"x-conformance" in data:
        raise PeerError("unknown field")
    return old(data)


def new_index_after_a_bad_action() -> Patch:
    def patch(monkeypatch: pytest.MonkeyPatch, registry: Registry) -> None:
        seen: list[str] = []

        def noting(old: Any, self: Any, context: Any, action: Any) -> Any:
            seen.append(action.type)
            return old(self, context, action)

        def forgetting(old: Any, self: Any, body: bytes) -> Iterator[bytes]:
            (answer,) = old(self, body)
            said = json.loads(answer)
            yield json.dumps(said | ({"index_id": "0" * 32} if "x-conformance" in seen else {})).encode()

        replaced(server._Handlers, "do_action", noting)(monkeypatch, registry)
        replaced(answers.Answers, "_health", forgetting)(monkeypatch, registry)

    return patch


def swapped_signature(old: Any, reader: Any) -> list[bytes]:
    manifest, _ = old(reader)
    return [manifest, str(Identity.generate().sign(manifest)).encode()]


def other_manifest(old: Any, reader: Any) -> list[bytes]:
    manifest, *signed = old(reader)
    return [manifest + b" ", *signed]


def false_tombstone(old: Any, tombstone: Any) -> bytes:
    return old(dataclasses.replace(tombstone, signature=Identity.generate().sign(tombstone.body)))  # type: ignore[no-any-return]


def added_twice(page: dict[str, Any]) -> None:
    if not page["since"]:
        page["added"].append(page["added"][0])


def without(field: str) -> Callable[[dict[str, Any]], object]:
    return lambda page: page.pop(field)


def misnamed(page: dict[str, Any]) -> None:
    for entry in page["added"]:
        entry["name"] = "../" + entry["name"]


PLAIN: dict[str, tuple[str, Patch]] = {
    "health without a field": ("health", health_with(last=...)),
    "health of another type": ("health", health_with(last="6")),
    "health of another version": ("health", health_with(protocol=3)),
    "large health": ("health", health_with(more="x" * 5000)),
    "health twice": (
        "health",
        replaced(answers.Answers, "_health", lambda old, *given: itertools.chain(old(*given), old(*given))),
    ),
    "a page without a field": ("changes-page", page_with(without("gone"))),
    "a page since something else": ("changes-page", page_with(lambda page: page.update(since=1))),
    "a large page": ("changes-page", page_with(lambda page: page.update(more="x" * (1 << 20)))),
    "a page with a name that is a path": ("changes-page", page_with(misnamed)),
    "a page that leads nowhere": ("changes-page", page_with(lambda page: page.update(upto=0))),
    "an index that is not health's": ("changes-lead-to-the-last", health_with(index_id="0" * 32)),
    "a card twice": ("changes-once", page_with(added_twice)),
    "everything again": ("nothing-new", since(lambda known: Position() if known.upto == LAST else None)),
    "two changes for one": (
        "last-change",
        since(lambda known: dataclasses.replace(known, upto=LAST - 2) if known.upto == LAST - 1 else None),
    ),
    "an index that is not looked at": ("other-index", since(lambda known: known if known.upto <= LAST else None)),
    "an end that is not looked at": ("beyond-the-end", since(lambda known: known if known.upto > LAST else None)),
    "unknown fields refused": ("unknown-fields", replaced(wire, "decode_changes_request", knowing_all_fields)),
    "malformed changes answered": ("changes-malformed", replaced(wire, "decode_changes_request", lenient)),
    "a false tombstone": ("tombstones", replaced(wire, "_tombstone", false_tombstone)),
    "another manifest": ("manifest", replaced(answers, "described", other_manifest)),
    "another's signature": ("signature", replaced(answers, "described", swapped_signature)),
    "no signature": ("signature", replaced(answers, "described", lambda old, reader: old(reader)[:1])),
    "an entry of another rank": ("entries", offer_with(rank=77)),
    "an entry of another size": ("entries", offer_with(nbytes=1)),
    "manifest: another error": (
        "manifest-absent",
        replaced(answers.Answers, "_manifest", unfound),
    ),
    "tensors: another error": ("tensors-absent", replaced(answers.Answers, "_tensors", unfound)),
    "a flipped bit": ("tensors", replaced(answers, "tensor_bytes", flipped)),
    "tensors in another order": ("tensors", replaced(answers, "tensor_bytes", reversed_tensors)),
    "large messages": ("tensors-messages", replaced(answers, "tensor_bytes", in_one_message)),
    "empty messages": ("tensors-messages", replaced(answers, "tensor_bytes", with_empty_messages)),
    "more than was asked for": (
        "tensors-ranges",
        replaced(answers, "tensor_bytes", lambda old, reader, offset, nbytes: old(reader, offset, 1 << 40)),
    ),
    "from the beginning behind the end": ("tensors-end", replaced(answers, "tensor_bytes", wrapping)),
    "an action that is not named": (
        "actions",
        replaced(server._Handlers, "list_actions", lambda old, *given: old(*given)[1:]),
    ),
    "any action": ("unknown-action", replaced(server._Handlers, "do_action", answering_anything)),
    "a listing that lacks a card": (
        "flights",
        replaced(
            server._Handlers,
            "list_flights",
            lambda old, self, context, criteria: iter([*old(self, context, criteria)][not criteria :]),
        ),
    ),
    "a listing of all for a name": (
        "flights-by-name",
        replaced(server._Handlers, "list_flights", lambda old, self, context, criteria: old(self, context, b"")),
    ),
    "more rows than there are": ("info", info_with(rows=1)),
    "other bytes than there are": ("info", info_with(nbytes=1)),
    "a location": ("info", info_with(locations=("grpc://127.0.0.1:1",))),
    "labels not known": ("descriptors", replaced(server, "_ref_of", refusing_labels)),
    "a schema without metadata": (
        "schema",
        replaced(
            server._Handlers,
            "get_schema",
            lambda old, *given: flight.SchemaResult(old(*given).schema.remove_metadata()),
        ),
    ),
    "a stream without metadata": ("stream-schema", replaced(server._Handlers, "do_get", bare_stream)),
    "batches in another order": ("table", replaced(server, "batches", lambda old, reader: reversed([*old(reader)]))),
    "one large batch": ("batches", replaced(server, "batches", one_batch)),
    "no card: another error": ("absent", replaced(server._Handlers, "get_flight_info", another_error)),
    "no ticket: any card": ("malformed", answering_no_ticket),
    "tensors of another card behind a manifest": (
        "manifest-with-tensors",
        replaced(answers, "small", lambda old, reader, most: [b"x"] if most else []),
    ),
    "uploads": ("uploads", letting_uploads_in),
    "a stack trace": ("errors", replaced(wire, "decode_changes_request", crashing)),
    "another index after an error": ("still-there", new_index_after_a_bad_action()),
}


def believing(length: Callable[[int], bool], forged: bool = False) -> Patch:
    """Proofs of these lengths are believed unread; with `forged` those of the right length as well."""

    def changed(old: Any, self: Any, token: bytes) -> str:
        return fingerprint_of(token[:32]) if length(len(token)) or (forged and len(token) == 96) else old(self, token)

    return replaced(handshake.Callers, "is_valid", changed)


def handshaking(old: Any, self: Any, outgoing: Any, incoming: Any) -> None:
    outgoing.write(b"welcome")


def unexplained(old: Any, self: Any, caller: str, call: str) -> bool:
    try:
        return old(self, caller, call)  # type: ignore[no-any-return]
    except server.NotApprovedError as error:
        raise flight.FlightUnauthorizedError(str(error)) from None


SECURED: dict[str, tuple[str, Patch]] = {
    "no proof asked for": ("no-proof", believing(lambda length: length == 0)),
    "proofs not checked": ("false-proof", believing(lambda length: False, forged=True)),
    "proofs cut short": ("cut-proof", believing(lambda length: length == 95)),
    "a handshake": ("handshake", replaced(handshake.Callers, "authenticate", handshaking)),
    "another node's id": ("health-id", health_with(node_id="0" * 32)),
    "a roster that is none": (
        "roster",
        replaced(membership.Membership, "_roster", lambda *given: iter([b'{"peers": [{"node_id": "x"}]}'])),
    ),
}
