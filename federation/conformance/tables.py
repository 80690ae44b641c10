"""Checks of what any Flight client sees: listings, infos, schemas, and cards as tables."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
from pyarrow import flight

from federation import limits, wire
from federation.conformance.cards import ABSENT, tensors
from federation.conformance.catalog import changes_lead_to_the_last, health
from federation.conformance.checks import check
from federation.conformance.subject import CALL_ERRORS, Failed, NotTested, Subject, brief
from federation.membership import ACTION_JOIN, ACTION_ROSTER
from registry.card import LoRACard
from registry.digest import digest_of
from registry.format import MAX_BATCH_BYTES, SCHEMA

_ACTIONS = {wire.ACTION_HEALTH, wire.ACTION_CHANGES, wire.ACTION_MANIFEST, wire.ACTION_TENSORS}
_TICKETS = (b"", b"\xff\x00", b"../../identity.key", b"a-name", b"blake3:" + b"0" * 63, b"x" * 2000)
_PATHS = ((), ("else", "a-name"), ("skills",), ("skills", "..", "..", "identity.key"), ("skills", "a", "1", "b", "c"))


@check("Calls", "list_actions names at least health, changes, manifest, tensors, join and roster", health)
def actions(subject: Subject) -> str:
    """On a plaintext line nobody joins."""
    named = {action.type for action in subject.channel.list_actions(subject.options())}
    expected = _ACTIONS | ({ACTION_JOIN, ACTION_ROSTER} if subject.certificate else set())
    if not expected <= named:
        raise Failed(f"{sorted(named)!s:.300}")
    return ", ".join(sorted(named))


@check("Calls", "an action that there is not is refused", health)
def unknown_action(subject: Subject) -> str:
    """With an error, and no crash."""
    subject.refused(lambda: subject.action("x-conformance"), "the action x-conformance")
    return "refused"


@check("Calls", "list_flights has one FlightInfo for each card of the catalog", changes_lead_to_the_last)
def flights(subject: Subject) -> str:
    """As many as `changes` told."""
    try:
        tickets = [_ticket(info) for info in subject.channel.list_flights(options=subject.options())]
    except flight.FlightUnauthorizedError:
        raise
    except CALL_ERRORS as error:
        if len(subject.entries) * limits.MAX_PAGE_BYTES <= limits.MAX_LISTING_BYTES:  # a manifest has at most 1 MiB
            raise
        raise NotTested(f"it fails, as it does over {limits.MAX_LISTING_BYTES} bytes: {brief(error)}") from error
    if sorted(tickets) != sorted(digest.encode() for digest in subject.entries):
        raise Failed(f"{len(tickets)} cards, where changes told of {len(subject.entries)}, or others")
    return f"{len(tickets)} cards"


@check("Calls", "list_flights with a card's name has the cards of that name", tensors)
def flights_by_name(subject: Subject) -> str:
    """Whatever their versions."""
    entry = subject.entries[next(iter(subject.cards))]
    tickets = [_ticket(info) for info in subject.channel.list_flights(entry.name.encode(), options=subject.options())]
    of_name = [other.digest.encode() for other in subject.entries.values() if other.name == entry.name]
    if sorted(tickets) != sorted(of_name):
        raise Failed(f"{len(tickets)} cards for {entry.name}, where changes told of {len(of_name)}, or others")
    return f"{len(tickets)} of {entry.name}"


@check(
    "Calls",
    "a FlightInfo has four parts of path, one endpoint without locations, and the totals",
    tensors,
)
def info(subject: Subject) -> str:
    """By digest."""
    for digest, card in subject.cards.items():
        found = _info(subject, digest)
        path = [part.decode(errors="replace") for part in found.descriptor.path or []]
        told = (path[:1], path[3:], len(found.endpoints), found.total_records, found.total_bytes)
        expected = (["skills"], [digest], 1, len(card.manifest.tensors), card.nbytes)
        if told != expected or found.endpoints[0].locations or _ticket(found) != digest.encode():
            raise Failed(f"{told} and ticket {_ticket(found)!r:.80}, expected {expected}")
    return f"of {len(subject.cards)} cards"


@check("Names", "a card is found by its label's parts with and without the digest, and by its digest", info)
def descriptors(subject: Subject) -> str:
    """The label of a card may mean another that has it too; its name and version are the same."""
    for digest in subject.cards:
        _, name, version, _ = (part.decode() for part in _info(subject, digest).descriptor.path)
        for path in ((name, version, digest), (name, version), (f"{name}@{version}",), (digest,)):
            found = [part.decode() for part in _info(subject, *path).descriptor.path]
            if found[:3] != ["skills", name, version] or (digest in path and found[3] != digest):
                raise Failed(f"{found} for {path}")
    return "by 4 paths"


@check("Calls", "get_schema and the FlightInfo have the card's schema, with its metadata", info)
def schema(subject: Subject) -> str:
    """And not any other's."""
    for digest, card in subject.cards.items():
        descriptor = flight.FlightDescriptor.for_path(wire.DESCRIPTOR_ROOT, digest)
        for found in (
            subject.channel.get_schema(descriptor, subject.options()).schema,
            _info(subject, digest).schema,
        ):
            _check_schema(found, card)
    return f"of {len(subject.cards)} cards"


@check("A card", "do_get has one row for each tensor, in the manifest's order, with its bytes", tensors)
def table(subject: Subject) -> str:
    """Every row is looked at."""
    for digest, card in subject.cards.items():
        rows = [row for batch in _batches(subject, digest.encode()) for row in batch.to_pylist()]
        came = [(row["name"], row["role"], row["dtype"], tuple(row["shape"]), digest_of(row["data"])) for row in rows]
        is_so = [(spec.name, spec.role, spec.dtype, spec.shape, spec.digest) for spec in card.manifest.tensors]
        if came != is_so:
            wrong = next((got for got, other in zip(came, is_so, strict=False) if got != other), f"{len(came)} rows")
            raise Failed(f"{wrong!s:.200} in {digest}")
    return f"of {len(subject.cards)} cards"


@check("A card", "batches of at least one row and at most 4 MiB, unless one tensor alone is larger; no nulls", tensors)
def batches(subject: Subject) -> str:
    """Of the same cards."""
    largest = 0
    for digest in subject.cards:
        for batch in _batches(subject, digest.encode()):
            nbytes = sum(map(len, batch.column("data").to_pylist()))
            largest = max(largest, nbytes)
            if batch.num_rows < 1 or (batch.num_rows > 1 and nbytes > MAX_BATCH_BYTES):
                raise Failed(f"{batch.num_rows} rows of {nbytes} bytes in one batch of {digest}")
            if any(column.null_count for column in batch.columns):
                raise Failed(f"nulls in {digest}")
    return f"at most {largest} bytes"


@check("A card", "do_get's schema is the card's, with format, manifest and signature as metadata", tensors)
def stream_schema(subject: Subject) -> str:
    """Before any batch."""
    for digest, card in subject.cards.items():
        reader = subject.channel.do_get(flight.Ticket(digest), subject.options())
        _check_schema(reader.schema, card)
        reader.cancel()
    return f"of {len(subject.cards)} cards"


@check("Calls", "get_flight_info and do_get: a card that is not there is UNKNOWN with not-found", health)
def absent(subject: Subject) -> str:
    """Any error will not do."""
    subject.not_found(lambda: _info(subject, ABSENT), ABSENT)
    return subject.not_found(lambda: [*_batches(subject, ABSENT.encode())], ABSENT)


@check("Calls", "tickets and descriptors that are none are refused", health)
def malformed(subject: Subject) -> str:
    """With an error, and no crash."""
    for ticket in _TICKETS:
        subject.refused(lambda ticket=ticket: [*_batches(subject, ticket)], ticket)  # type: ignore[misc]
    for path in _PATHS:
        descriptor = flight.FlightDescriptor.for_path(*path)
        subject.refused(lambda it=descriptor: subject.channel.get_flight_info(it, subject.options()), path)  # type: ignore[misc]
    return f"{len(_TICKETS) + len(_PATHS)} refused"


@check("Calls", "do_put and do_exchange are PERMISSION_DENIED", health)
def uploads(subject: Subject) -> str:
    """Begun and ended without a batch."""
    descriptor = flight.FlightDescriptor.for_path("x-conformance")
    for call, given in ((subject.channel.do_put, (descriptor, SCHEMA)), (subject.channel.do_exchange, (descriptor,))):
        try:
            writer, _ = call(*given, subject.options())
            writer.close()
        except flight.FlightUnauthorizedError as error:
            subject.errors.append(str(error))
            if error.extra_info == wire.NOT_APPROVED:
                raise
            continue
        raise Failed("one that is not refused")
    return "refused"


@check("Calls", "an error's text has no stack trace", health)
def errors(subject: Subject) -> str:
    """Of all errors until here."""
    for text in subject.errors:
        if any(sign in text for sign in ("Traceback (most recent", "goroutine ", "stack backtrace", "\n\tat ")):
            raise Failed(f"one in {brief(RuntimeError(text))}")
    return f"{len(subject.errors)} errors"


@check("health", "after all this, it is answered as before", health)
def still_there(subject: Subject) -> str:
    """The same process: another would have another certificate."""
    told = wire.decode_health(subject.only(wire.ACTION_HEALTH))
    if subject.health is None or (told.node_id, told.index_id) != (subject.health.node_id, subject.health.index_id):
        raise Failed(f"node {told.node_id} with index {told.index_id}")
    return "the same node"


def _ticket(found: flight.FlightInfo) -> bytes:
    if not found.endpoints:
        raise Failed("a FlightInfo without an endpoint")
    return bytes(found.endpoints[0].ticket.ticket)


def _info(subject: Subject, *path: str) -> flight.FlightInfo:
    descriptor = flight.FlightDescriptor.for_path(wire.DESCRIPTOR_ROOT, *path)
    return subject.channel.get_flight_info(descriptor, subject.options())


def _batches(subject: Subject, ticket: bytes) -> Iterator[pa.RecordBatch]:
    """A card's batches, each validated, for Arrow aborts the process over offsets that are wrong."""
    for chunk in subject.channel.do_get(flight.Ticket(ticket), subject.options()):
        chunk.data.validate(full=True)
        yield chunk.data


def _check_schema(found: pa.Schema, card: LoRACard) -> None:
    metadata = found.metadata or {}
    signed = None if card.signature is None else str(card.signature).encode()
    if not found.remove_metadata().equals(SCHEMA):
        raise Failed(f"columns {found.names} of other types, or others, of {card.digest}")
    if (metadata.get(wire.MANIFEST_KEY), metadata.get(wire.SIGNATURE_KEY)) != (card.manifest_bytes, signed):
        raise Failed(f"another manifest or signature in the metadata {sorted(metadata)!s:.100} of {card.digest}")


CHECKS = (
    actions,
    unknown_action,
    flights,
    flights_by_name,
    info,
    descriptors,
    schema,
    stream_schema,
    table,
    batches,
    absent,
    malformed,
    uploads,
    errors,
    still_there,
)

__all__ = ["CHECKS"]
