"""Checks of what a server says of itself and its catalog: `health`, `changes`, `roster`."""

from __future__ import annotations

import json

from federation import limits, wire
from federation.conformance.checks import check
from federation.conformance.subject import Failed, NotTested, Subject
from federation.conformance.who import certificate
from federation.forms import json_bytes
from federation.membership import ACTION_ROSTER, decode_roster
from registry.changes import Position

_OTHER_INDEX = "00000000000000000000000000000001"
_MALFORMED = (
    b"",
    b"\xff\x00 no JSON",
    b'{"index_id": null, "since": -1}',
    b'{"index_id": 5, "since": 0}',
    b'{"index_id": null, "since": "0"}',
    b'{"index_id": null, "since": 0}'.ljust(limits.MAX_REQUEST_BYTES + 1),
)


@check("health", "exactly one JSON object of at most 4,096 bytes with every field, protocol 2", certificate)
def health(subject: Subject) -> str:
    """Also who answers on a plaintext line."""
    subject.health = wire.decode_health(subject.only(wire.ACTION_HEALTH))
    subject.node_id = subject.node_id or subject.health.node_id
    return f"{subject.health.name}, {subject.health.last} changes"


@check("health", "node_id is that of the certificate", health, secured=True)
def health_id(subject: Subject) -> str:
    """A node cannot call itself another."""
    said = _health_of(subject).node_id
    if said != subject.node_id:
        raise Failed(f"{said}, and the certificate says {subject.node_id}")
    return said


@check("changes", "for a client that knows nothing exactly one page since 0, of at most 1 MiB", health)
def changes_page(subject: Subject) -> str:
    """The first page."""
    page = subject.changes(Position())
    if page.since:
        raise Failed(f"changes since {page.since}")
    return f"{len(page.added)} cards, {len(page.gone)} gone, up to {page.upto} of {page.last}"


@check("changes", "page after page leads to the last change that health tells, under its index_id", changes_page)
def changes_lead_to_the_last(subject: Subject) -> str:
    """Also what the server has."""
    for number in range(1, limits.MAX_PAGES + 1):
        page = subject.changes(subject.known)
        if number > 1 and page.since != subject.known.upto:
            raise Failed(f"changes since {page.since} where {subject.known.upto} was asked for")
        subject.entries |= {entry.digest: entry for entry in page.added}
        for digest in page.gone:
            subject.entries.pop(digest, None)
        subject.tombstones += page.tombstones
        subject.known = page.position
        if not page.more:
            return _checked_end(_health_of(subject), page, number)
    raise NotTested(f"there are more than {limits.MAX_PAGES} pages")


def _checked_end(told: wire.Health, page: wire.ChangesPage, number: int) -> str:
    if page.index_id != told.index_id or page.upto < told.last:
        raise Failed(f"{page.upto} under {page.index_id}, and health says {told.last} under {told.index_id}")
    return f"{page.upto} after {number} pages"


@check("changes", "a page has at most 1,000 changes, and a digest is in added or in gone, once", changes_page)
def changes_once(subject: Subject) -> str:
    """Of the first page."""
    page = subject.changes(Position())
    digests = [*(entry.digest for entry in page.added), *page.gone]
    if len(digests) > limits.MAX_PAGE_CHANGES or len(set(digests)) < len(digests):
        raise Failed(f"{len(digests)} changes of {len(set(digests))} digests")
    return f"{len(digests)} changes"


@check("changes", "an entry of added is at most 64 KiB", changes_page)
def entry_sizes(subject: Subject) -> str:
    """Of the first page."""
    body = subject.only(wire.ACTION_CHANGES, wire.encode_changes_request(Position()))
    largest = max((len(json_bytes(entry)) for entry in json.loads(body)["added"]), default=0)
    if largest > limits.MAX_ENTRY_BYTES:
        raise Failed(f"{largest} bytes")
    return f"at most {largest} bytes"


@check("changes", "for a client that knows everything, an empty page since the last change", changes_lead_to_the_last)
def nothing_new(subject: Subject) -> str:
    """Nothing new costs one small answer."""
    page = subject.changes(subject.known)
    if page.since != subject.known.upto or page.upto != page.last or page.added or page.gone or page.tombstones:
        raise Failed(f"{len(page.added)} cards since {page.since}, up to {page.upto} of {page.last}")
    return f"nothing since {page.since}"


@check("changes", "for a client that lacks the last change, this one change and no other", changes_lead_to_the_last)
def last_change(subject: Subject) -> str:
    """Changes come in the order of their numbers."""
    last = _last(subject)
    page = subject.changes(Position(index_id=subject.known.index_id, upto=last - 1))
    changed = len(page.added) + len(page.gone)
    if page.since != last - 1 or page.upto != last or changed != 1:
        raise Failed(f"{changed} changes since {page.since}, up to {page.upto}, where {last} is the last")
    return f"change {last}"


@check("changes", "for a client that knows another index_id, everything since 0", changes_lead_to_the_last)
def other_index(subject: Subject) -> str:
    """What the client knows was of another catalog."""
    return _from_0(subject, Position(index_id=_OTHER_INDEX, upto=_last(subject)))


@check("changes", "for a client that knows more than there is, everything since 0", changes_lead_to_the_last)
def beyond_the_end(subject: Subject) -> str:
    """The catalog was restored from a copy."""
    return _from_0(subject, Position(index_id=subject.known.index_id, upto=_last(subject) + 1000))


@check("changes", "fields of the request that it does not know are ignored", changes_page)
def unknown_fields(subject: Subject) -> str:
    """A later version may add some."""
    body = b'{"index_id":null,"since":0,"x-conformance":{"any":["thing"]}}'
    page = wire.decode_changes(subject.only(wire.ACTION_CHANGES, body), Position())
    return f"{len(page.added)} cards"


@check("changes", "a body that is no request, or larger than 4,096 bytes, is refused", changes_page)
def changes_malformed(subject: Subject) -> str:
    """With an error, and no crash."""
    return subject.refused_all(wire.ACTION_CHANGES, _MALFORMED)


@check("changes", "a tombstone is signed by the publisher that it names", changes_lead_to_the_last)
def tombstones(subject: Subject) -> str:
    """Their form, each page's reading has checked."""
    if not subject.tombstones:
        raise NotTested("it tells of no removal; remove a card there that it published")
    for tombstone in subject.tombstones:
        tombstone.verify()
    return f"{len(subject.tombstones)} true ones"


@check("join and roster", "roster: exactly one JSON object of at most 64 KiB and 256 nodes", health, secured=True)
def roster(subject: Subject) -> str:
    """`join` would change the server."""
    return f"{len(decode_roster(subject.only(ACTION_ROSTER)))} nodes"


def _health_of(subject: Subject) -> wire.Health:
    if subject.health is None:
        raise NotTested("it gave no health")
    return subject.health


def _last(subject: Subject) -> int:
    if not subject.known.upto:
        raise NotTested("nothing has changed there yet; publish a card")
    return subject.known.upto


def _from_0(subject: Subject, known: Position) -> str:
    page = subject.changes(known)
    if page.since:
        raise Failed(f"changes since {page.since}")
    return f"{len(page.added)} cards since 0"


CHECKS = (
    health,
    health_id,
    changes_page,
    changes_lead_to_the_last,
    changes_once,
    entry_sizes,
    nothing_new,
    last_change,
    other_index,
    beyond_the_end,
    unknown_fields,
    changes_malformed,
    tombstones,
    roster,
)

__all__ = ["CHECKS", "changes_lead_to_the_last", "health"]
