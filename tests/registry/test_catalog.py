"""The catalog: a contract for every database, label resolution, and the schema's migrations."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import ColumnElement, create_engine, text

from evolution.tables import SignalRow
from registry.card import LoRACard
from registry.catalog import Catalog
from registry.database import Database, alembic_config, sqlite_url
from registry.digest import Digest
from registry.entries import Origin
from registry.errors import AmbiguousCardError, HomeError, LabelTakenError, RegistryError, UnknownCardError
from registry.identity import Identity
from registry.labels import Label, newest, newest_first, next_version, version_key
from registry.listing import of_base, of_name, tagged
from registry.tables import HEAD_REVISION, Base
from tests.registry.cards import small_card

_NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


@pytest.fixture
def catalog(database: Database) -> Catalog:
    return Catalog(database)


# The contract -------------------------------------------------------------------------------------------------------


def test_an_entry_tells_what_the_manifest_says(catalog: Catalog) -> None:
    author = Identity.generate()
    card = small_card(
        "sums",
        version="1.2",
        description="Adds up «numbers»",
        domains=["mathematics"],
        examples=["2 + 2?"],
        created="2026-01-02T03:04:05+02:00",
    ).signed(author)
    entry = catalog.add(card, tags=["b", "a", "a"], origin=Origin(peer_id="p", address="host:1"))
    assert (entry.digest, entry.name, entry.version) == (card.digest, "sums", "1.2")
    assert (entry.base_name, entry.architecture) == ("tiny-llama", "LlamaForCausalLM")
    assert (entry.fingerprint, entry.rank, entry.nbytes) == (card.manifest.base.fingerprint, 4, card.nbytes)
    assert (entry.description, entry.domains, entry.examples) == ("Adds up «numbers»", ("mathematics",), ("2 + 2?",))
    assert entry.created == datetime(2026, 1, 2, 1, 4, 5, tzinfo=UTC)
    assert entry.created.tzinfo is not None
    assert timedelta(0) <= datetime.now(UTC) - entry.added_at < timedelta(minutes=1)
    assert (entry.tags, entry.labels, entry.publisher) == (("a", "b"), ("sums@1.2",), author.id)
    assert entry.origin == Origin(peer_id="p", address="host:1")
    assert catalog.list() == [entry] == [catalog.entry("sums")]


def test_adding_again_changes_nothing_but_tags(catalog: Catalog) -> None:
    card = small_card()
    first = catalog.add(card, tags=["a"])
    again = catalog.add(card, tags=["b"], origin=Origin(peer_id="p", address="h:1"), exclusive=True)
    assert again.tags == ("a", "b")
    assert (again.added_at, again.origin) == (first.added_at, None)
    assert catalog.digests() == {card.digest}


def test_an_exclusive_label_is_taken_once(catalog: Catalog) -> None:
    catalog.add(small_card(version="1.9", seed=1), exclusive=True)
    with pytest.raises(LabelTakenError, match=r"sample@1\.9") as caught:
        catalog.add(small_card(version="1.9", seed=2), exclusive=True)
    assert caught.value.hint == "publish it as version 1.10"
    assert len(catalog.list()) == 1


def test_two_nodes_may_use_one_label_and_agree_on_what_it_means(catalog: Catalog) -> None:
    old = small_card(seed=1, created="2026-01-01T00:00:00+00:00")
    new = small_card(seed=2, created="2026-01-01T00:00:01+00:00")
    for card in (new, old):
        catalog.add(card)
    assert catalog.resolve("sample") == catalog.resolve("sample@1") == new.digest
    assert [entry.digest for entry in catalog.list(of_name("sample"))] == [new.digest, old.digest]


def test_a_bare_name_means_the_highest_version(catalog: Catalog) -> None:
    cards = {version: small_card(version=version) for version in ("10", "9", "2", "10-rc1")}
    for card in cards.values():
        catalog.add(card)
    assert catalog.resolve("sample") == cards["10"].digest
    assert catalog.resolve("sample@2") == cards["2"].digest
    assert [entry.version for entry in catalog.list()] == ["10", "10-rc1", "9", "2"]
    assert catalog.next_version("sample") == "11"
    assert catalog.next_version("another") == "1"


def test_digests_and_their_starts_are_references(catalog: Catalog) -> None:
    card = small_card()
    catalog.add(card)
    start = card.digest.removeprefix("blake3:")[:8]
    for ref in (card.digest, start, f"blake3:{start}", start.upper(), card.digest.removeprefix("blake3:")):
        assert catalog.resolve(ref) == card.digest
    for ref in (start[:7], f"blake3:{start[:7]}", f"{start}%", "_" * 8, "blake3:" + "0" * 64):
        with pytest.raises(UnknownCardError):
            catalog.resolve(ref)


def test_a_start_of_two_digests_is_ambiguous(catalog: Catalog, database: Database) -> None:
    cards = [small_card(seed=seed) for seed in range(2)]
    for card in cards:
        catalog.add(card)
    twins = [f"blake3:{'ab' * 31}{end}" for end in ("00", "01")]
    with database.writing() as session:
        session.execute(text("DELETE FROM labels"))
        for card, twin in zip(cards, twins, strict=True):
            session.execute(
                text("UPDATE cards SET digest = :new WHERE digest = :old"), {"new": twin, "old": card.digest}
            )
    with pytest.raises(AmbiguousCardError, match="abababab") as caught:
        catalog.resolve("abababab")
    assert all(twin in str(caught.value) for twin in twins)
    assert catalog.resolve(twins[0][:-1] + "1") == twins[1]


def test_a_name_that_looks_like_a_digest_is_a_name(catalog: Catalog) -> None:
    card = small_card()
    named = small_card(card.digest.removeprefix("blake3:")[:8])
    catalog.add(card)
    catalog.add(named)
    assert catalog.resolve(named.name) == named.digest
    assert catalog.resolve(f"blake3:{named.name}") == card.digest


def test_an_unknown_reference_names_what_is_close(catalog: Catalog) -> None:
    catalog.add(small_card("arithmetic"))
    with pytest.raises(UnknownCardError) as caught:
        catalog.resolve("aritmetic")
    assert caught.value.hint == "did you mean arithmetic?"
    with pytest.raises(UnknownCardError) as caught:
        catalog.resolve("arithmetic@7")
    assert caught.value.hint == "did you mean arithmetic@1?"


def test_a_label_moves_and_a_digest_does_not(catalog: Catalog) -> None:
    one, two = small_card("one"), small_card("two")
    catalog.add(one)
    catalog.add(two)
    catalog.label("one", "best", "1")
    catalog.label("two", "best", "1")
    catalog.label("two", "one", "1")
    assert catalog.resolve("best") == catalog.resolve("one") == two.digest
    assert catalog.entry(one.digest).labels == ()
    assert catalog.entry("two").labels == ("best@1", "one@1", "two@1")
    assert [entry.digest for entry in catalog.list(of_name("best"))] == [two.digest]


def test_removing_takes_labels_and_tags_along(catalog: Catalog) -> None:
    card, other = small_card(version="2"), small_card(version="1")
    catalog.add(card, tags=["a"], origin=Origin(peer_id="p", address="h:1"))
    catalog.add(other)
    catalog.label("sample@2", "alias", "1")
    assert catalog.remove(card.digest).labels == ("alias@1", "sample@2")
    assert catalog.resolve("sample") == other.digest
    with pytest.raises(UnknownCardError):
        catalog.resolve("alias")
    with pytest.raises(UnknownCardError):
        catalog.remove(card.digest)
    assert catalog.list(tagged("a")) == []
    assert catalog.add(card).tags == ()


def test_filters_narrow_the_list(catalog: Catalog) -> None:
    llama = small_card("x", base_name="llama", base_architecture="Llama")
    bert = small_card("y", base_name="bert", base_architecture="Bert", modules=1)
    catalog.add(llama, tags=["fast"])
    catalog.add(bert)
    catalog.tag("y", ["fast", "new"])
    catalog.untag("y", ["fast", "never-there"])

    def names(*conditions: ColumnElement[bool]) -> list[str]:
        return [entry.name for entry in catalog.list(*conditions)]

    fingerprint = llama.manifest.base.fingerprint
    assert names(of_base("llama")) == names(of_base("Llama")) == names(of_base(fingerprint)) == ["x"]
    assert names(tagged("new")) == ["y"]
    assert names(tagged("fast")) == ["x"]
    assert names(tagged("fast"), of_base("bert")) == []
    assert names() == ["x", "y"]


def test_search_ranks_by_the_number_of_words(catalog: Catalog) -> None:
    catalog.add(small_card("dates", description="Turns any date into ISO form", examples=["March 3rd, 2021"]))
    catalog.add(small_card("tickets", description="Files support tickets under a form", domains=["Büro"]), tags=["iso"])
    catalog.add(small_card("poems", description="100% verse_1"))

    def names(words: str) -> list[str]:
        return [entry.name for entry in catalog.search(words)]

    assert names("date ISO form") == ["dates", "tickets"]
    assert names("BÜRO") == ["tickets"]
    assert names("march") == ["dates"]
    assert names("0% e_1") == ["poems"]
    assert names("%") == ["poems"]
    assert names("unheard-of") == names("  ") == []


def test_a_time_beyond_the_calendar_is_kept_at_its_edge(catalog: Catalog) -> None:
    entry = catalog.add(small_card(created="0001-01-01T00:00:00+05:00"))
    assert entry.created == datetime.min.replace(tzinfo=UTC)


def test_a_failed_transaction_leaves_no_trace(catalog: Catalog, database: Database) -> None:
    def interrupted() -> None:
        with database.writing() as session:
            session.execute(text("DELETE FROM labels"))
            raise KeyboardInterrupt

    catalog.add(small_card())
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert catalog.entry("sample").labels == ("sample@1",)


def test_readers_see_one_state_and_do_not_wait_for_the_writer(catalog: Catalog, database: Database) -> None:
    card = small_card()
    with database.writing() as session:
        session.execute(text("UPDATE cards SET name = 'x'"))
        assert catalog.list() == []
    catalog.add(card)
    assert catalog.digests() == {card.digest}


# Labels -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lower", "higher"),
    [
        ("2", "10"),
        ("1.9", "1.10"),
        ("1.0-rc1", "1.0"),
        ("1.0", "1.0.1"),
        ("1.0-a", "1.0-b"),
        ("rc2", "rc10"),
        ("v9", "v10"),
    ],
)
def test_versions_compare_naturally(lower: str, higher: str) -> None:
    assert version_key(lower) < version_key(higher)


_versions = st.from_regex(r"[A-Za-z0-9](?:[A-Za-z0-9.+_-]{0,8}[A-Za-z0-9])?", fullmatch=True)
_labels = st.builds(
    lambda version, seconds, digit: Label(
        name="n", version=version, digest=Digest("blake3:" + digit * 64), created=_NOON + timedelta(seconds=seconds)
    ),
    st.sampled_from(["1", "01", "1.0", "2", "10", "2-rc", "v2"]) | _versions,
    st.integers(0, 2),
    st.sampled_from("0123456789abcdef"),
)


@given(st.lists(_labels, min_size=1, max_size=12, unique_by=lambda label: label.digest), st.randoms())
def test_whatever_the_order_of_arrival_one_label_wins(labels: list[Label], random: Any) -> None:
    shuffled = random.sample(labels, len(labels))
    assert newest(shuffled) == newest(labels)
    assert newest_first(shuffled) == newest_first(labels)
    assert newest(labels) == newest_first(labels)[0]


@given(st.lists(_versions, max_size=8))
def test_the_next_version_is_free_and_above_all(versions: list[str]) -> None:
    following = next_version(versions)
    assert following not in versions
    assert all(version_key(version) < version_key(following) for version in versions)


# The schema ---------------------------------------------------------------------------------------------------------


def test_the_migrations_end_at_the_tables_that_the_code_knows(catalog_url: str, database: Database) -> None:
    assert ScriptDirectory.from_config(alembic_config()).get_heads() == [HEAD_REVISION]
    engine = create_engine(catalog_url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection)
        assert context.get_current_revision() == HEAD_REVISION
        assert SignalRow.metadata is Base.metadata, "the night's tables are in the same database"
        assert compare_metadata(context, Base.metadata) == []
    engine.dispose()


def test_a_catalog_of_a_newer_arrowmoe_is_refused_untouched(catalog_url: str, database: Database) -> None:
    with database.writing() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(HomeError, match="9999") as caught:
        Database(catalog_url)
    assert caught.value.hint == "upgrade arrowmoe, or use another home"
    with database.reading() as session:
        assert session.scalar(text("SELECT version_num FROM alembic_version")) == "9999"


def test_an_interrupted_migration_is_done_anew(new_catalog_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alembic.op.create_index", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        Database(new_catalog_url)
    monkeypatch.undo()
    again = Database(new_catalog_url)
    assert Catalog(again).list() == []
    again.close()


def test_an_up_to_date_catalog_opens_without_alembic(catalog_url: str, database: Database) -> None:
    opening = "import sys; from registry.database import Database; Database(sys.argv[1]).close();"
    code = f"{opening} print('alembic' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, catalog_url], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("url", "error"),
    [("no url", HomeError), ("mysql://host/name", HomeError), ("sqlite:////nowhere/at/all.sqlite", RegistryError)],
)
def test_a_url_that_cannot_be_used_is_refused(url: str, error: type[RegistryError]) -> None:
    with pytest.raises(error) as caught:
        Database(url)
    assert caught.value.hint


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "catalog.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(RegistryError, match="not a database"):
        Database(sqlite_url(tmp_path / "catalog.sqlite"))


def test_a_card_without_a_publisher_names_none(catalog: Catalog) -> None:
    card: LoRACard = small_card()
    assert catalog.add(card).publisher is None
