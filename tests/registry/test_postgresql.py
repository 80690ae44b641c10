"""What a catalog on PostgreSQL promises beyond the contract: one snapshot, bounded waits, cut connections."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import text

from evolution.tables import NoteRow
from registry.catalog import Catalog
from registry.database import Database
from registry.errors import RegistryError
from registry.store import Registry
from tests.registry.cards import small_card
from tests.registry.databases import cut_off_others, new_database


@pytest.fixture
def url(tmp_path: Path, migrated_template: str) -> Iterator[str]:
    with new_database("postgresql", tmp_path, migrated_template) as url:
        yield url


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    database = Database(url)
    yield database
    database.close()


def test_a_reader_sees_one_snapshot_and_writes_nothing(database: Database) -> None:
    with database.reading() as session:
        count = text("SELECT count(*) FROM cards")
        assert session.scalar(count) == 0
        Catalog(database).add(small_card())
        assert session.scalar(count) == 0
    with pytest.raises(RegistryError, match="read-only"), database.reading() as session:
        session.execute(text("DELETE FROM cards"))
    assert len(Catalog(database).list()) == 1


def test_a_writer_waits_for_another_no_longer_than_it_should(
    url: str, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("registry.database._POSTGRESQL_SESSION", ("lock_timeout = '200ms'",))
    impatient = Database(url)
    with database.writing() as session:
        session.execute(text("SELECT 1"))  # a transaction begins with its first statement
        with pytest.raises(RegistryError, match="lock timeout"):
            Catalog(impatient).add(small_card())
    Catalog(impatient).add(small_card())
    impatient.close()


def test_a_writer_that_is_cut_off_leaves_nothing_and_the_next_goes_on(url: str, database: Database) -> None:
    def write() -> None:
        with database.writing() as session:
            session.add(NoteRow(key="half", value={}))
            session.flush()
            cut_off_others(url)
            session.scalar(text("SELECT 1"))

    with pytest.raises(RegistryError) as caught:
        write()
    assert caught.value.hint
    with database.reading() as session:
        assert session.get(NoteRow, "half") is None
    assert Catalog(database).add(small_card()).name == "sample"


def test_the_password_is_in_no_error(url: str) -> None:
    database = Database(url)
    password = str(database.url.password)
    with pytest.raises(RegistryError) as caught, database.writing() as session:
        session.execute(text("SELECT nonsense"))
    assert password not in str(caught.value)
    database.close()
    with pytest.raises(RegistryError) as caught:
        Database(database.url.set(password="wrong-" + password))
    assert password not in str(caught.value)


def test_text_that_postgresql_cannot_hold_is_kept_with_a_mark(database: Database) -> None:
    entry = Catalog(database).add(small_card(description="before\0after", examples=["a\0b"]))
    assert (entry.description, entry.examples) == ("before\ufffdafter", ("a\0b",))
    assert [found.digest for found in Catalog(database).search("before\0after")] == [entry.digest]


@pytest.mark.parametrize("year", [1, 9999])
def test_the_edges_of_the_calendar_come_back(database: Database, year: int) -> None:
    created = datetime(year, 1 if year == 1 else 12, 1 if year == 1 else 31, 12, tzinfo=UTC)
    assert Catalog(database).add(small_card(created=created.isoformat())).created == created


def test_a_node_keeps_its_catalog_there(url: str, tmp_path: Path) -> None:
    with Registry.open(tmp_path / "home", catalog_url=url) as registry:
        entry = registry.publish(small_card())
    assert not (tmp_path / "home" / "catalog.sqlite").exists()
    with Registry.open(tmp_path / "home", catalog_url=url) as registry:
        assert registry.get("sample", verify=True).digest == entry.digest
        assert all(report.ok for report in registry.verify())
