"""What a node keeps of others' catalogs, on every database."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.catalog import Catalog
from registry.changes import Position
from registry.database import Database, sqlite_url
from registry.digest import Digest, digest_of
from registry.inventories import Inventories, InventorySize
from tests.registry.cards import small_card

A, B = "a" * 32, "b" * 32
INDEX, OTHER = "1" * 32, "2" * 32


@pytest.fixture
def inventories(database: Database) -> Inventories:
    return Inventories(database)


def digest(name: str) -> Digest:
    return digest_of(name.encode())


def at(upto: int, index_id: str = INDEX) -> Position:
    return Position(index_id=index_id, upto=upto)


def note(
    inventories: Inventories, since: int, told: Position, added: str = "", gone: str = "", node: str = A
) -> Position:
    """Each letter is a card, whose entry is that letter."""
    entries = {digest(name): name for name in added}
    return inventories.note(node, since=since, told=told, added=entries, gone=[digest(name) for name in gone])


def kept(inventories: Inventories, node: str = A) -> set[str]:
    return set(inventories.lacking(node))


def test_nothing_is_known_of_a_node_that_said_nothing(inventories: Inventories) -> None:
    assert inventories.position(A) == Position()
    assert (inventories.count(A), inventories.size(A)) == (0, InventorySize(cards=0, chars=0))
    assert inventories.lacking(A) == []


def test_changes_add_to_what_is_known_of_that_node(inventories: Inventories) -> None:
    assert note(inventories, 0, at(2), "xy") == at(2)
    note(inventories, 0, at(1, OTHER), "z", node=B)
    assert note(inventories, 2, at(4), "w", gone="x") == at(4)
    assert (kept(inventories), kept(inventories, B)) == ({"y", "w"}, {"z"})
    assert (inventories.position(A), inventories.position(B)) == (at(4), at(1, OTHER))
    assert inventories.count(A) == 2


def test_an_entry_told_again_replaces_the_one_before(inventories: Inventories) -> None:
    inventories.note(A, since=0, told=at(1), added={digest("x"): "old"}, gone=[])
    inventories.note(A, since=1, told=at(2), added={digest("x"): "newer"}, gone=[])
    assert inventories.lacking(A) == ["newer"]
    assert inventories.size(A) == InventorySize(cards=1, chars=5)


def test_changes_since_the_beginning_take_the_place_of_everything(inventories: Inventories) -> None:
    note(inventories, 0, at(9), "xyz")
    assert note(inventories, 0, at(1, OTHER), "y") == at(1, OTHER)
    assert kept(inventories) == {"y"}


@pytest.mark.parametrize(("since", "told"), [(2, at(5)), (4, at(5)), (3, at(5, OTHER))])
def test_what_does_not_follow_on_is_not_kept(inventories: Inventories, since: int, told: Position) -> None:
    note(inventories, 0, at(3), "x")
    assert note(inventories, since, told, "y", gone="x") == at(3), "so the reader carries on from what is known"
    assert kept(inventories) == {"x"}


def test_lacking_is_what_is_neither_here_nor_hidden(inventories: Inventories, database: Database) -> None:
    catalog = Catalog(database)
    here, hidden, other = (small_card(name) for name in ("here", "hidden", "other"))
    for card in (here, hidden):
        catalog.add(card)
    catalog.remove(hidden.digest)
    entries = {card.digest: card.name for card in (here, hidden, other)}
    inventories.note(A, since=0, told=at(3), added=entries, gone=[])
    assert inventories.lacking(A) == ["other"]
    assert inventories.count(A) == 3
    catalog.unhide("hidden")
    assert set(inventories.lacking(A)) == {"hidden", "other"}


def test_who_has_a_card_and_who_is_forgotten(inventories: Inventories) -> None:
    for node in (B, A):
        note(inventories, 0, at(1), "x", node=node)
    assert inventories.holders(digest("x")) == [A, B]
    inventories.forget(A)
    assert inventories.holders(digest("x")) == [B]
    assert (inventories.position(A), inventories.position(B)) == (Position(), at(1))


def test_what_was_noted_survives_a_restart(tmp_path: Path) -> None:
    url = sqlite_url(tmp_path / "catalog.sqlite")
    first = Database(url)
    note(Inventories(first), 0, at(7), "x")
    first.close()
    again = Database(url)
    assert Inventories(again).position(A) == at(7)
    assert kept(Inventories(again)) == {"x"}
    again.close()


_actions = st.lists(st.tuples(st.booleans(), st.sampled_from("abcd")) | st.integers(1, 3), max_size=24)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inventories]:
    database = Database(sqlite_url(tmp_path_factory.mktemp("scratch") / "catalog.sqlite"))
    yield Inventories(database)
    database.close()


@given(actions=_actions)
def test_whoever_reads_on_at_any_moment_ends_with_what_is_there(
    scratch: Inventories, actions: list[tuple[bool, str] | int]
) -> None:
    scratch.forget(A)
    log: list[tuple[bool, str]] = []
    for action in [*actions, *[1] * 25]:  # in the end, all the rest in pages of one
        if isinstance(action, tuple):
            log.append(action)
            continue
        since = scratch.position(A).upto
        latest = {name: number for number, (_, name) in enumerate(log, start=1)}
        numbers = sorted(number for number in latest.values() if number > since)[:action]
        page = [log[number - 1] for number in numbers]
        added = "".join(name for there, name in page if there)
        gone = "".join(name for there, name in page if not there)
        told = at(numbers[-1] if numbers else len(log))
        assert note(scratch, since, told, added, gone) == told
    last = {name: there for there, name in log}
    assert kept(scratch) == {name for name, there in last.items() if there}
