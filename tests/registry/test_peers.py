from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from registry.database import Database
from registry.errors import InvitationError, UnknownPeerError
from registry.peers import Introduced, Invitations, PeerBook, PeerState

ANNA, BERT, CARL, DORA = (letter * 32 for letter in "abcd")


class Clock:
    def __init__(self) -> None:
        self.now = datetime(2026, 11, 21, tzinfo=UTC)

    def __call__(self) -> datetime:
        self.now += timedelta(seconds=1)
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def book(database: Database, clock: Clock) -> PeerBook:
    return PeerBook(database, now=clock)


@pytest.fixture
def invitations(database: Database, clock: Clock) -> Invitations:
    return Invitations(database, now=clock)


def states(book: PeerBook) -> dict[str, PeerState]:
    return {peer.node_id: peer.state for peer in book.peers()}


def test_a_stranger_is_pending_until_the_owner_decides(book: PeerBook) -> None:
    assert book.find(ANNA) is None
    assert book.meet(ANNA, most_pending=9).state is PeerState.PENDING
    assert book.approve(ANNA, name="anna").state is PeerState.APPROVED
    assert book.meet(ANNA, most_pending=9).state is PeerState.APPROVED
    assert book.block(ANNA).state is PeerState.BLOCKED
    assert book.meet(ANNA, most_pending=9).state is PeerState.BLOCKED
    book.remove(ANNA)
    assert book.find(ANNA) is None
    with pytest.raises(UnknownPeerError):
        book.remove(ANNA)


def test_what_was_decided_is_read_by_another_book_at_once(database: Database, book: PeerBook) -> None:
    book.approve(ANNA, name="anna", address="10.0.0.1:7420")
    found = PeerBook(database).find(ANNA)
    assert found is not None
    assert (found.name, found.address, found.state) == ("anna", "10.0.0.1:7420", PeerState.APPROVED)
    assert found.decided is not None


def test_a_flood_of_strangers_displaces_only_strangers(book: PeerBook) -> None:
    book.approve(ANNA)
    book.block(BERT)
    for number in range(10):
        book.meet(f"{number:032x}", most_pending=3)
    assert states(book) == {
        ANNA: PeerState.APPROVED,
        BERT: PeerState.BLOCKED,
        **{f"{number:032x}": PeerState.PENDING for number in (7, 8, 9)},
    }


def test_an_introducer_s_friends_are_approved_and_fall_with_it(book: PeerBook) -> None:
    book.approve(ANNA, introducer=True)
    assert book.introduced(ANNA, friends(BERT, CARL), own_id=DORA) == (BERT, CARL)
    assert states(book)[BERT] is PeerState.APPROVED
    assert book.introduced(ANNA, friends(BERT, CARL), own_id=DORA) == ()
    assert book.introduced(ANNA, friends(CARL), own_id=DORA) == ()
    assert (states(book)[BERT], states(book)[CARL]) == (PeerState.PENDING, PeerState.APPROVED)
    book.block(ANNA)
    assert states(book)[CARL] is PeerState.PENDING


def test_whoever_forgets_an_introducer_forgets_its_word(book: PeerBook) -> None:
    book.approve(ANNA, introducer=True)
    book.introduced(ANNA, friends(BERT), own_id=DORA)
    book.remove(ANNA)
    assert states(book) == {BERT: PeerState.PENDING}


def test_an_introduction_changes_nothing_that_the_owner_decided(book: PeerBook) -> None:
    book.approve(ANNA, introducer=True)
    book.approve(BERT)
    book.block(CARL)
    assert book.introduced(ANNA, friends(BERT, CARL), own_id=DORA) == ()
    book.introduced(ANNA, [], own_id=DORA)
    assert states(book) == {ANNA: PeerState.APPROVED, BERT: PeerState.APPROVED, CARL: PeerState.BLOCKED}


def test_who_is_no_introducer_introduces_nobody(book: PeerBook) -> None:
    book.approve(ANNA)
    assert book.introduced(ANNA, friends(BERT), own_id=DORA) == ()
    assert book.introduced(CARL, friends(BERT), own_id=DORA) == ()
    book.approve(ANNA, introducer=True)
    book.block(ANNA)
    assert book.introduced(ANNA, friends(BERT), own_id=DORA) == ()
    assert BERT not in states(book)


def test_this_node_and_the_introducer_are_not_introduced(book: PeerBook) -> None:
    book.approve(ANNA, introducer=True)
    assert book.introduced(ANNA, friends(ANNA, DORA), own_id=DORA) == ()
    assert states(book) == {ANNA: PeerState.APPROVED}


def test_introductions_are_not_passed_on(book: PeerBook) -> None:
    book.approve(ANNA, name="anna", introducer=True)
    book.introduced(ANNA, friends(BERT), own_id=DORA)
    book.meet(CARL, most_pending=9)
    assert [peer.node_id for peer in book.roster()] == [ANNA]
    book.approve(BERT)
    assert [peer.node_id for peer in book.roster()] == [ANNA, BERT]


def test_an_approved_introduction_outlives_its_introducer(book: PeerBook) -> None:
    book.approve(ANNA, introducer=True)
    book.introduced(ANNA, friends(BERT), own_id=DORA)
    book.approve(BERT)
    book.remove(ANNA)
    assert states(book) == {BERT: PeerState.APPROVED}


def test_where_a_node_was_seen_is_noted_if_it_is_known(book: PeerBook) -> None:
    book.seen(ANNA, name="anna", address="10.0.0.1:1")
    assert book.peers() == []
    book.approve(ANNA)
    book.seen(ANNA, name="anna", address="10.0.0.1:1")
    found = book.find(ANNA)
    assert found is not None
    assert (found.name, found.address) == ("anna", "10.0.0.1:1")
    assert found.last_seen is not None


def test_a_token_lets_one_node_join(invitations: Invitations, book: PeerBook) -> None:
    secret, _ = invitations.make(timedelta(hours=1))
    invitations.redeem(secret, Introduced(node_id=ANNA, name="anna", address="10.0.0.1:1"))
    assert states(book) == {ANNA: PeerState.APPROVED}
    invitations.redeem(secret, Introduced(node_id=ANNA, name="anna"))  # its answer may have been lost
    with pytest.raises(InvitationError, match="another node"):
        invitations.redeem(secret, Introduced(node_id=BERT))
    assert BERT not in states(book)


def test_a_wrong_or_late_secret_lets_nobody_join(invitations: Invitations, book: PeerBook, clock: Clock) -> None:
    secret, expires = invitations.make(timedelta(minutes=5))
    with pytest.raises(InvitationError):
        invitations.redeem("0" * 32, Introduced(node_id=ANNA))
    clock.now = expires
    with pytest.raises(InvitationError, match="expired"):
        invitations.redeem(secret, Introduced(node_id=ANNA))
    assert book.peers() == []


def test_a_blocked_node_does_not_come_back_by_a_token(invitations: Invitations, book: PeerBook) -> None:
    secret, _ = invitations.make(timedelta(hours=1))
    book.block(ANNA)
    with pytest.raises(InvitationError, match="blocked"):
        invitations.redeem(secret, Introduced(node_id=ANNA))
    assert states(book) == {ANNA: PeerState.BLOCKED}


def test_a_removed_node_does_not_come_back_by_its_old_token(invitations: Invitations, book: PeerBook) -> None:
    secret, _ = invitations.make(timedelta(hours=1))
    invitations.redeem(secret, Introduced(node_id=ANNA))
    book.remove(ANNA)
    with pytest.raises(InvitationError):
        invitations.redeem(secret, Introduced(node_id=ANNA))
    assert book.peers() == []


def friends(*node_ids: str) -> list[Introduced]:
    return [Introduced(node_id=node_id, name=node_id[0], address="10.0.0.9:1") for node_id in node_ids]
