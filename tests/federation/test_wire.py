from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from federation import limits, wire
from federation.errors import PeerError
from registry.changes import Change, Changes, Kind, Position
from registry.digest import Digest, digest_of
from registry.entries import CardEntry
from registry.identity import Identity
from registry.tombstones import Tombstone
from tests.federation.liar import INDEX_ID, changes_of, entry_of, health
from tests.registry.cards import small_card

ENTRY = entry_of(small_card(), description="zählt", domains=("a",), examples=("one", "two"), publisher="x")
NOTHING = Position()
PAGE: dict[str, Any] = json.loads(changes_of([ENTRY]))


def entries(count: int, **changes: Any) -> list[wire.InventoryEntry]:
    return [replace(ENTRY, digest=digest_of(b"%d" % index), **changes) for index in range(count)]


def tombstone(name: str = "gone") -> Tombstone:
    """Signed by a new identity, of a card that nobody has."""
    noon = datetime(2026, 1, 1, 12, tzinfo=UTC)
    fields = dict.fromkeys(CardEntry.__dataclass_fields__)
    entry = CardEntry(**(fields | {"digest": digest_of(name.encode()), "name": name, "version": "1", "epoch": 3}))
    return Tombstone.of(entry, Identity.generate(), now=noon)


def pages_of(changes: Sequence[Change], offered: dict[Digest, wire.InventoryEntry]) -> list[wire.ChangesPage]:
    """What a reader gets who asks until there is no more."""
    pages: list[wire.ChangesPage] = []
    known = NOTHING
    while not pages or pages[-1].more:
        rest = tuple(change for change in changes if change.sequence > known.upto)[: limits.MAX_PAGE_CHANGES]
        page = Changes(index_id=INDEX_ID, since=known.upto, last=changes[-1].sequence if changes else 0, entries=rest)
        data = wire.encode_changes(page, offered)
        assert len(data) <= limits.MAX_PAGE_BYTES
        pages.append(wire.decode_changes(data, known))
        known = pages[-1].position
    return pages


def added(offered: Sequence[wire.InventoryEntry]) -> list[Change]:
    return [Change(sequence=n, digest=entry.digest, kind=Kind.ADDED) for n, entry in enumerate(offered, start=1)]


def test_health_comes_back() -> None:
    assert wire.decode_health(wire.encode_health(health())) == health()


@pytest.mark.parametrize("known", [NOTHING, Position(index_id=INDEX_ID, upto=7)])
def test_a_request_for_changes_comes_back(known: Position) -> None:
    assert wire.decode_changes_request(wire.encode_changes_request(known)) == known


@pytest.mark.parametrize("count", [0, 1, limits.MAX_PAGE_CHANGES, limits.MAX_PAGE_CHANGES + 1, 3000])
def test_an_inventory_comes_back_in_pages_within_the_limits(count: int) -> None:
    sent = entries(count)
    pages = pages_of(added(sent), {entry.digest: entry for entry in sent})
    assert len(pages) == max(1, -(-count // limits.MAX_PAGE_CHANGES))
    assert [entry for page in pages for entry in page.added] == sent
    assert (pages[-1].upto, pages[-1].last, pages[0].index_id) == (count, count, INDEX_ID)


def test_long_entries_make_more_pages_not_larger_ones() -> None:
    sent = entries(50, examples=("x" * 60_000,))
    pages = pages_of(added(sent), {entry.digest: entry for entry in sent})
    assert len(pages) > 1
    assert [entry for page in pages for entry in page.added] == sent


def test_a_page_full_of_tombstones_is_within_the_limits_too() -> None:
    proof = tombstone("n" * 96)
    changes = [
        Change(sequence=n, digest=digest_of(b"%d" % n), kind=Kind.REMOVED, tombstone=proof) for n in range(1, 3001)
    ]
    pages = pages_of(changes, {})
    assert sum(len(page.tombstones) for page in pages) == 3000
    assert sum(len(page.gone) for page in pages) == 3000


def test_an_entry_too_long_loses_prose_but_never_what_identifies_it() -> None:
    long = replace(
        ENTRY, examples=("x" * 70_000,), domains=("y" * 70_000,), base_name="z" * 70_000, description="é" * 16_384
    )
    (page,) = pages_of(added([long]), {long.digest: long})
    (sent,) = page.added
    assert (sent.digest, sent.name, sent.version, sent.nbytes) == (long.digest, long.name, long.version, long.nbytes)
    assert len(json.dumps(asdict(sent))) <= limits.MAX_ENTRY_BYTES


def test_each_kind_of_change_is_told_as_what_the_reader_needs() -> None:
    here, lost, hidden, proof = ENTRY, digest_of(b"lost"), digest_of(b"hidden"), tombstone()
    changes = [
        Change(sequence=2, digest=here.digest, kind=Kind.ADDED),
        Change(sequence=3, digest=lost, kind=Kind.ADDED),  # removed since this page was read
        Change(sequence=5, digest=hidden, kind=Kind.GONE),
        Change(sequence=6, digest=proof.digest, kind=Kind.REMOVED, tombstone=proof),
    ]
    (page,) = pages_of(changes, {here.digest: here})
    assert (page.added, page.gone, page.tombstones) == ((here,), (lost, hidden, proof.digest), (proof,))
    page.tombstones[0].verify()


def test_a_stranger_s_tombstone_does_not_make_a_card_gone_that_came_later() -> None:
    proof = replace(tombstone(), digest=ENTRY.digest)
    changes = [
        Change(sequence=1, digest=ENTRY.digest, kind=Kind.REMOVED, tombstone=proof),
        Change(sequence=2, digest=ENTRY.digest, kind=Kind.ADDED),
    ]
    data = wire.encode_changes(
        Changes(index_id=INDEX_ID, since=0, last=2, entries=tuple(changes)), {ENTRY.digest: ENTRY}
    )
    page = wire.decode_changes(data, NOTHING)
    assert (page.added, page.gone) == ((ENTRY,), ())


@pytest.mark.parametrize(
    "change",
    [
        {"digest": "blake3:" + "G" * 64},
        {"digest": "sha256:" + "0" * 64},
        {"name": "../../etc/passwd"},
        {"name": "a/b"},
        {"version": ""},
        {"rank": "4"},
        {"rank": True},
        {"rank": 0},
        {"nbytes": -1},
        {"nbytes": 1e3},
        {"domains": "abc"},
        {"examples": [1]},
        {"description": "x" * 20_000},
        {"fingerprint": None},
    ],
)
def test_a_field_of_the_wrong_form_is_refused(change: dict[str, Any]) -> None:
    page = PAGE | {"added": [asdict(ENTRY) | change]}
    with pytest.raises(PeerError, match="not of the expected form"):
        wire.decode_changes(json.dumps(page).encode(), NOTHING)


@pytest.mark.parametrize(
    "change",
    [
        {"index_id": None},
        {"index_id": "../" + "0" * 29},
        {"since": -1},
        {"upto": "1"},
        {"last": 1 << 41},
        {"gone": ["x"]},
        {"gone": [PAGE["added"][0]["digest"]] * (limits.MAX_PAGE_CHANGES + 1)},
        {"tombstones": [{"body": "{}"}]},
        {"tombstones": [{"body": "{}", "signature": "ed25519"}]},
        {"tombstones": [{"body": "{}", "signature": f"ed25519:{'0' * 64}:{'0' * 128}"}]},
        {"added": {}},
        {"added": None},
    ],
)
def test_a_page_with_a_wrong_part_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(PeerError, match="not of the expected form"):
        wire.decode_changes(json.dumps(PAGE | change).encode(), NOTHING)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b'{"added":{}}', b"\xff", b"[" * 9000])
def test_what_is_no_page_is_refused(data: bytes) -> None:
    with pytest.raises(PeerError, match="not of the expected form"):
        wire.decode_changes(data, NOTHING)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"since": 6, "upto": 9, "last": 9}, "since 5 or 0, got those since 6"),
        ({"since": 4, "upto": 9, "last": 9}, "since 5 or 0, got those since 4"),
        ({"since": 5, "upto": 9, "last": 9, "index_id": "0" * 32}, "since 5 or 0"),
        ({"since": 5, "upto": 5, "last": 9}, "lead from 5 to 9, got those up to 5"),
        ({"since": 5, "upto": 4, "last": 9}, "lead from 5 to 9"),
        ({"since": 5, "upto": 10, "last": 9}, "lead from 5 to 9"),
        ({"since": 0, "upto": 0, "last": 1}, "lead from 0 to 1"),
    ],
)
def test_a_page_that_leads_nowhere_is_refused(numbers: dict[str, Any], message: str) -> None:
    asked = Position(index_id=INDEX_ID, upto=5)
    with pytest.raises(PeerError, match=message):
        wire.decode_changes(json.dumps(PAGE | numbers).encode(), asked)


@pytest.mark.parametrize("index_id", [INDEX_ID, "0" * 32])
def test_a_page_may_always_begin_anew(index_id: str) -> None:
    page = wire.decode_changes(json.dumps(PAGE | {"index_id": index_id}).encode(), Position(index_id=INDEX_ID, upto=5))
    assert (page.since, page.position) == (0, Position(index_id=index_id, upto=1))


def test_unknown_fields_are_ignored_so_that_later_versions_may_add_some() -> None:
    page = PAGE | {"added": [asdict(ENTRY) | {"later": 1}], "next": 2}
    assert wire.decode_changes(json.dumps(page).encode(), NOTHING).added == (ENTRY,)


def test_another_protocol_version_is_refused_by_number() -> None:
    with pytest.raises(PeerError, match="version 2, got 1"):
        wire.decode_health(wire.encode_health(health(protocol=1)))


def test_an_answer_over_the_limit_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(PeerError, match="at most 4096 bytes"):
        wire.decode_health(wire.encode_health(health()) + b" " * limits.MAX_HEALTH_BYTES)
    with pytest.raises(PeerError, match="at most"):
        wire.decode_changes(b" " * (limits.MAX_PAGE_BYTES + 1), NOTHING)


@pytest.mark.parametrize("index_id", ["x", 5, "A" * 32])
def test_a_request_of_the_wrong_form_is_refused(index_id: object) -> None:
    for body in (json.dumps({"index_id": index_id, "since": 0}).encode(), b'{"index_id":null,"since":-1}', b"{}"):
        with pytest.raises(PeerError, match="a request for changes"):
            wire.decode_changes_request(body)


@given(st.binary(max_size=200))
def test_random_bytes_never_raise_anything_else(data: bytes) -> None:
    for decode in (wire.decode_health, lambda page: wire.decode_changes(page, NOTHING), wire.decode_changes_request):
        with suppress(PeerError):  # few are a message after all
            decode(data)


@given(st.text(), st.lists(st.text(), max_size=3))
def test_an_entry_is_kept_as_it_came(description: str, domains: list[str]) -> None:
    entry = replace(ENTRY, description=description, domains=tuple(domains))
    assert wire.decode_entry(wire.encode_entry(entry)) == entry
