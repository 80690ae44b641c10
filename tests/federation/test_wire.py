from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from federation import limits, wire
from federation.errors import PeerError
from registry.digest import Digest, digest_of
from tests.federation.liar import entry_of, health
from tests.registry.cards import small_card

ENTRY = entry_of(small_card(), description="zählt", domains=("a",), examples=("one", "two"), publisher="x")


def entries(count: int, **changes: Any) -> list[wire.InventoryEntry]:
    return [replace(ENTRY, digest=digest_of(b"%d" % index), **changes) for index in range(count)]


def test_health_comes_back() -> None:
    assert wire.decode_health(wire.encode_health(health())) == health()


@pytest.mark.parametrize("count", [0, 1, limits.MAX_PAGE_ENTRIES, limits.MAX_PAGE_ENTRIES + 1, 1000])
def test_inventory_comes_back_in_pages_within_the_limits(count: int) -> None:
    pages = list(wire.encode_inventory(entries(count)))
    assert len(pages) == max(1, -(-count // limits.MAX_PAGE_ENTRIES))
    assert wire.decode_inventory(pages) == entries(count)


def test_long_entries_make_more_pages_not_larger_ones() -> None:
    pages = list(wire.encode_inventory(entries(50, examples=("x" * 60_000,))))
    assert len(pages) > 1
    assert max(map(len, pages)) <= limits.MAX_PAGE_BYTES
    assert len(wire.decode_inventory(pages)) == 50


def test_an_entry_too_long_loses_prose_but_never_what_identifies_it() -> None:
    long = replace(
        ENTRY, examples=("x" * 70_000,), domains=("y" * 70_000,), base_name="z" * 70_000, description="é" * 16_384
    )
    (sent,) = wire.decode_inventory(wire.encode_inventory([long]))
    assert (sent.digest, sent.name, sent.version, sent.nbytes) == (long.digest, long.name, long.version, long.nbytes)
    assert len(json.dumps(asdict(sent))) <= limits.MAX_ENTRY_BYTES


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
    page = json.dumps({"cards": [asdict(ENTRY) | change]}).encode()
    with pytest.raises(PeerError, match="not of the expected form"):
        wire.decode_inventory([page])


@pytest.mark.parametrize("page", [b"", b"{", b"[]", b"null", b'{"cards":{}}', b'{"cards":[[]]}', b"\xff", b"[" * 9000])
def test_a_page_of_the_wrong_form_is_refused(page: bytes) -> None:
    with pytest.raises(PeerError, match="not of the expected form"):
        wire.decode_inventory([page])


def test_unknown_fields_are_ignored_so_that_later_versions_may_add_some() -> None:
    page = json.dumps({"cards": [asdict(ENTRY) | {"later": 1}], "next": 2}).encode()
    assert wire.decode_inventory([page]) == [ENTRY]


def test_another_protocol_version_is_refused_by_number() -> None:
    with pytest.raises(PeerError, match="version 1, got 2"):
        wire.decode_health(wire.encode_health(health(protocol=2)))


def test_an_answer_over_the_limit_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(PeerError, match="at most 4096 bytes"):
        wire.decode_health(wire.encode_health(health()) + b" " * limits.MAX_HEALTH_BYTES)
    with pytest.raises(PeerError, match="at most"):
        wire.decode_inventory([b" " * (limits.MAX_PAGE_BYTES + 1)])


@pytest.mark.parametrize(
    "page", [b'{"cards":[]}', next(wire.encode_inventory(entries(256))), b" " * 900_000 + b'{"cards":[]}']
)
def test_an_endless_inventory_ends(page: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_INVENTORY_ENTRIES", 2000)
    drawn = 0

    def pages() -> Iterator[bytes]:
        nonlocal drawn
        while True:
            drawn += 1
            yield page

    with pytest.raises(PeerError, match="at most"):
        wire.decode_inventory(pages())
    assert drawn <= 2001


def test_an_inventory_ends_at_its_bytes_however_few_its_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_INVENTORY_BYTES", 3_000_000)
    with pytest.raises(PeerError, match="at most 3000000 bytes"):
        wire.decode_inventory([b" " * 900_000 + b'{"cards":[]}'] * 4)


@given(st.sets(st.binary(max_size=4)), st.sets(st.binary(max_size=4)))
def test_the_state_is_that_of_the_set(one: set[bytes], other: set[bytes]) -> None:
    first, second = [digest_of(data) for data in one], [digest_of(data) for data in other]
    assert wire.state_of(first) == wire.state_of(reversed(first))
    assert (wire.state_of(first) == wire.state_of(second)) == (one == other)


@given(st.binary(max_size=200))
def test_random_bytes_never_raise_anything_else(data: bytes) -> None:
    for decode in (wire.decode_health, lambda page: wire.decode_inventory([page])):
        with pytest.raises(PeerError):
            decode(data)


def test_a_digest_is_listed_once() -> None:
    assert wire.decode_inventory([*wire.encode_inventory([ENTRY]), *wire.encode_inventory([ENTRY])]) == [ENTRY]
    assert isinstance(ENTRY.digest, str)
    assert Digest(ENTRY.digest) == ENTRY.digest
