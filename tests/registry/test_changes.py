"""Numbered changes: of a catalog on every database, and what a reader of them knows."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from alembic import command
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import create_engine, text

from registry.catalog import Catalog
from registry.changes import Change, Changes, Inventory, Kind, merged
from registry.database import Database, alembic_config, sqlite_url
from registry.digest import Digest, digest_of
from registry.identity import Identity
from registry.tombstones import Tombstone
from tests.registry.cards import small_card

_NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


@pytest.fixture
def database(new_catalog_url: str) -> Iterator[Database]:
    database = Database(new_catalog_url)
    yield database
    database.close()


@pytest.fixture
def catalog(database: Database) -> Catalog:
    return Catalog(database)


# The catalog --------------------------------------------------------------------------------------------------------


def test_each_change_gets_the_next_number_and_only_the_latest_of_a_card_is_kept(catalog: Catalog) -> None:
    author = Identity.generate()
    one, two = small_card("one").signed(author), small_card("two")
    assert (catalog.changes().last, catalog.changes().entries) == (0, ())
    first, _ = catalog.add(one), catalog.add(two)
    catalog.add(one, tags=["again"])
    catalog.label("two", "another", "1")
    assert [(c.sequence, c.digest, c.kind) for c in catalog.changes().entries] == [
        (1, one.digest, Kind.ADDED),
        (2, two.digest, Kind.ADDED),
    ]
    catalog.remove(two.digest)
    tombstone = Tombstone.of(first, author, now=_NOON)
    assert catalog.bury(tombstone)
    assert not catalog.bury(tombstone)
    catalog.add(two)
    page = catalog.changes()
    assert [(c.sequence, c.digest, c.kind) for c in page.entries] == [
        (4, one.digest, Kind.REMOVED),
        (5, two.digest, Kind.ADDED),
    ]
    assert page.tombstones == (tombstone,)
    assert (page.last, page.more) == (5, False)


def test_pages_follow_on_and_nothing_new_is_an_empty_one(catalog: Catalog) -> None:
    digests = [catalog.add(small_card(f"card-{number}")).digest for number in range(5)]
    known = Inventory()
    sizes = []
    while True:
        page = catalog.changes(known.upto, limit=2)
        known = merged(known, page)
        sizes.append(len(page.entries))
        if not page.more:
            break
    assert (sizes, known.digests) == ([2, 2, 1], frozenset(digests))
    page = catalog.changes(known.upto)
    assert (page.entries, page.more, merged(known, page)) == ((), False, known)
    for since, limit in ((-1, 1), (0, 0)):
        with pytest.raises(ValueError, match="expected since"):
            catalog.changes(since, limit)


def test_a_change_that_fails_has_no_number(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("registry.catalog._add_tags", interrupted)
    with pytest.raises(KeyboardInterrupt):
        catalog.add(small_card())
    monkeypatch.undo()
    assert (catalog.digests(), catalog.changes().last) == (set(), 0)


def test_the_index_id_is_the_database_s(catalog: Catalog, database: Database, tmp_path: Path) -> None:
    index_id = catalog.changes().index_id
    again = Database(database.url)
    assert Catalog(again).changes().index_id == index_id
    again.close()
    anew = Database(sqlite_url(tmp_path / "anew.sqlite"))
    assert Catalog(anew).changes().index_id != index_id
    anew.close()


def test_cards_of_an_older_catalog_count_as_added_in_their_order(tmp_path: Path) -> None:
    url = sqlite_url(tmp_path / "old.sqlite")
    engine = create_engine(url)
    with engine.begin() as connection:
        config = alembic_config()
        config.attributes["connection"] = connection
        command.upgrade(config, "0002")
        for name, hour in (("b", 1), ("a", 2)):
            connection.execute(
                text(
                    "INSERT INTO cards (digest, name, version, fingerprint, rank, nbytes, description, domains,"
                    " examples, search_text, created, added_at)"
                    " VALUES (:digest, :name, '1', 'f', 1, 1, '', '[]', '[]', '', :at, :at)"
                ),
                {"digest": digest_of(name.encode()), "name": name, "at": f"2026-01-01 0{hour}:00:00.000000"},
            )
    engine.dispose()
    database = Database(url)
    page = Catalog(database).changes()
    assert [change.digest for change in page.entries] == [digest_of(b"b"), digest_of(b"a")]
    assert [entry.epoch for entry in Catalog(database).list()] == [0, 0]
    database.close()


# What a reader knows ------------------------------------------------------------------------------------------------

_names = st.sampled_from("abcd")
_actions = st.lists(st.tuples(st.sampled_from(["add", "hide"]), _names) | st.integers(1, 3), max_size=24)


def _digest(name: str) -> Digest:
    return digest_of(name.encode())


class Source:
    """A catalog's changes in the plainest form: every number that was ever given, in a list."""

    def __init__(self, index_id: str = "x") -> None:
        self.index_id = index_id
        self.log: list[tuple[Kind, str]] = []
        self.here: set[str] = set()

    def do(self, action: str, name: str) -> None:
        if (action == "add") != (name in self.here):
            self.log.append((Kind.ADDED if action == "add" else Kind.GONE, name))
            self.here ^= {name}

    def page(self, since: int, limit: int) -> Changes:
        latest = {name: number for number, (_, name) in enumerate(self.log, start=1)}
        numbers = sorted(number for number in latest.values() if number > since)[:limit]
        entries = [
            Change(sequence=number, digest=_digest(self.log[number - 1][1]), kind=self.log[number - 1][0])
            for number in numbers
        ]
        return Changes(index_id=self.index_id, since=since, last=len(self.log), entries=tuple(entries))


@given(_actions)
def test_whoever_reads_on_at_any_moment_ends_with_what_is_there(actions: list[tuple[str, str] | int]) -> None:
    source, known, old = Source(), Inventory(), []
    for action in actions:
        if isinstance(action, int):
            old.append(source.page(known.upto, action))
            known = merged(known, old[-1])
        else:
            source.do(*action)
    while (page := source.page(known.upto, 1)).more or page.entries:
        known = merged(known, page)
    assert known.digests == {_digest(name) for name in source.here}
    for page in old:
        if page.last == known.upto:
            assert merged(known, page) == known, "what is known adds nothing"


@pytest.mark.parametrize("last", [1, 9])
def test_another_index_or_one_that_went_back_is_read_anew(last: int) -> None:
    known = Inventory(index_id="x", upto=5, digests=frozenset({_digest("a")}))
    other = "x" if last < known.upto else "y"
    change = Change(sequence=1, digest=_digest("b"), kind=Kind.ADDED)
    assert merged(known, Changes(index_id=other, since=5, last=last, entries=())) == Inventory(index_id=other)
    told = merged(known, Changes(index_id=other, since=0, last=1, entries=(change,)))
    assert told == Inventory(index_id=other, upto=1, digests=frozenset({_digest("b")}))


def test_a_page_that_leaves_a_hole_is_refused() -> None:
    with pytest.raises(ValueError, match="expected changes since 2"):
        merged(Inventory(index_id="x", upto=2), Changes(index_id="x", since=3, last=4, entries=()))
