"""Numbered changes, of a catalog on every database; what a reader of them knows is in test_inventories."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from alembic import command
from sqlalchemy import create_engine, text

from registry.catalog import Catalog
from registry.changes import Kind
from registry.database import Database, alembic_config, sqlite_url
from registry.digest import digest_of
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
    pages = [catalog.changes(limit=2)]
    while pages[-1].more:
        pages.append(catalog.changes(pages[-1].upto, limit=2))
    assert [[change.digest for change in page.entries] for page in pages] == [digests[:2], digests[2:4], digests[4:]]
    page = catalog.changes(pages[-1].upto)
    assert (page.entries, page.more, page.upto) == ((), False, 5)
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
