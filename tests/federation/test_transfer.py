from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

import pytest

from federation import limits
from federation import transfer as transfer_module
from federation.board import Holder
from federation.client import LoRAFlightClient
from federation.errors import FederationError
from federation.pace import Pace
from federation.server import LoRAFlightServer
from federation.transfer import CardOutcome, TransferProgress, transfer
from registry.arrivals import Arrival
from registry.card import LoRACard
from registry.digest import Digest
from registry.drafts import BLOCK_BYTES
from registry.entries import Origin
from registry.errors import CardIntegrityError
from registry.store import Registry
from tests.federation.sources import FakeSource, holder_of, holding, wanted
from tests.registry.cards import module_shapes, small_card

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "RETRY_DELAY_S", 0.0)


@pytest.fixture(scope="module")
def large() -> LoRACard:
    """Eight tensors of 4 MiB."""
    return small_card("large", modules=module_shapes(4, 1 << 18, 1 << 18))


@pytest.fixture(scope="module")
def vast() -> LoRACard:
    """Two tensors of 24 MiB."""
    return small_card("vast", modules=module_shapes(1, 24 << 16, 24 << 16))


def only(outcomes: tuple[CardOutcome, ...]) -> CardOutcome:
    (outcome,) = outcomes
    return outcome


def moved(outcome: CardOutcome) -> int:
    return sum(outcome.moved.values())


def drafts(registry: Registry) -> list[str]:
    return [path.name for path in registry.home.glob("drafts/*")]


def check(registry: Registry, *cards: LoRACard) -> None:
    """Exactly these cards are here, and whole."""
    assert registry.digests() == {card.digest for card in cards}
    assert all(report.ok for report in registry.verify())
    assert drafts(registry) == []


def test_cards_come_and_are_kept(ours: Registry, large: LoRACard) -> None:
    cards = [large, *(small_card("small", seed=seed) for seed in range(20))]
    holder = holder_of(holding(*cards))
    outcomes = transfer(ours, [wanted(card, holder) for card in cards])
    assert [outcome.wanted.digest for outcome in outcomes] == [card.digest for card in cards]
    for outcome, card in zip(outcomes, cards, strict=True):
        assert outcome.entry is not None
        assert outcome.entry.digest == card.digest
        assert outcome.entry.origin == holder.origin
        assert outcome.failures == ()
        assert outcome.moved == {holder: card.nbytes}
        assert outcome.tensors_verified == len(card.tensors)
        assert outcome.bytes_here == 0
    check(ours, *cards)


def test_nothing_is_asked_for_nothing(ours: Registry) -> None:
    assert transfer(ours, []) == ()


def test_peers_share_a_card(ours: Registry, large: LoRACard) -> None:
    sources = [holding(large, on_piece=lambda: time.sleep(0.002)) for _ in range(2)]
    holders = [holder_of(source, number) for number, source in enumerate(sources, 1)]
    outcome = only(transfer(ours, [wanted(large, *holders)]))
    assert moved(outcome) == large.nbytes
    assert all(outcome.moved[holder] > 0 for holder in holders)
    assert all(nbytes <= limits.MAX_PART_BYTES for source in sources for _, nbytes in source.asked)
    check(ours, large)


def test_the_rest_comes_from_another_peer(ours: Registry, large: LoRACard) -> None:
    broken, whole = holding(large, cut_after=5 * MIB), holding(large)
    holders = [holder_of(broken, 1), holder_of(whole, 2)]
    outcome = only(transfer(ours, [wanted(large, *holders)]))
    assert outcome.entry is not None
    assert moved(outcome) == large.nbytes  # no byte twice
    check(ours, large)


@pytest.mark.parametrize("border", range(1, 33))
def test_a_cut_at_any_border_wastes_nothing(ours: Registry, large: LoRACard, border: int) -> None:
    source = holding(large, cut_after=border * MIB, cuts_left=1)
    outcome = only(transfer(ours, [wanted(large, holder_of(source))]))
    assert outcome.entry is not None
    assert source.given == large.nbytes
    check(ours, large)


def test_what_a_broken_transfer_left_is_taken_up(ours: Registry, large: LoRACard) -> None:
    source = holding(large, cut_after=5 * MIB + 1000, piece_bytes=300_000)
    outcome = only(transfer(ours, [wanted(large, holder_of(source))]))
    assert outcome.entry is None
    assert [why for _, why in outcome.failures] == ["the line broke"]
    assert ours.list() == []
    assert len(drafts(ours)) == 1
    other = holding(large)
    outcome = only(transfer(ours, [wanted(large, holder_of(other, 2))]))
    assert other.given >= large.nbytes - source.given
    assert other.given + source.given <= large.nbytes + limits.STREAMS_PER_PEER * BLOCK_BYTES
    assert outcome.bytes_here == large.nbytes - other.given
    check(ours, large)


def test_a_peer_whose_line_fails_is_given_up(ours: Registry, large: LoRACard) -> None:
    cards = [small_card("small", seed=seed) for seed in range(50)]
    dead = holding(*cards, is_down=True)
    holder = holder_of(dead)
    outcomes = transfer(ours, [wanted(card, holder) for card in cards])
    assert all(outcome.entry is None and len(outcome.failures) == 1 for outcome in outcomes)
    assert len(dead.described) < limits.MAX_LINE_FAILURES + limits.STREAMS_PER_PEER
    check(ours)


def test_a_peer_that_gives_a_little_and_breaks_is_given_up_too(ours: Registry, large: LoRACard) -> None:
    creeping = holding(large, piece_bytes=1000, cut_after=0)
    creeping.on_cut = lambda: setattr(creeping, "cut_after", creeping.given + 5000)
    outcome = only(transfer(ours, [wanted(large, holder_of(creeping))]))
    assert outcome.entry is None
    assert len(creeping.asked) < limits.MAX_LINE_FAILURES + limits.STREAMS_PER_PEER


def flip(at: int) -> Callable[[int, bytes], bytes]:
    """Inverts a bit of the tensor byte `at`."""

    def damage(offset: int, data: bytes) -> bytes:
        if not offset <= at < offset + len(data):
            return data
        damaged = bytearray(data)
        damaged[at - offset] ^= 0x10
        return bytes(damaged)

    return damage


def test_a_liar_is_named_and_the_card_comes_from_another(ours: Registry, large: LoRACard) -> None:
    liar, honest = holder_of(holding(large, damage=flip(100)), 1), holder_of(holding(large), 2)
    honest.source.on_piece = lambda: time.sleep(0.005)  # type: ignore[attr-defined]
    outcome = only(transfer(ours, [wanted(large, liar, honest)]))
    assert outcome.entry is not None
    assert {holder for holder, _ in outcome.failures} <= {liar}
    assert moved(outcome) <= large.nbytes + 4 * MIB  # only the tensor came twice
    check(ours, large)


def test_one_liar_of_two_that_share_a_tensor_is_found(ours: Registry, vast: LoRACard) -> None:
    def damage(offset: int, data: bytes) -> bytes:
        return bytes(len(data))

    liar, honest = holder_of(holding(vast, damage=damage), 1), holder_of(holding(vast), 2)
    outcome = only(transfer(ours, [wanted(vast, liar, honest)]))
    assert outcome.entry is not None
    assert {holder for holder, _ in outcome.failures} == {liar}
    assert "damaged or forged" in outcome.failures[0][1]
    check(ours, vast)


def test_only_liars_give_no_card(ours: Registry, vast: LoRACard) -> None:
    liars = [holder_of(holding(vast, damage=flip(at)), number) for number, at in enumerate([10, 30 * MIB], 1)]
    outcome = only(transfer(ours, [wanted(vast, *liars)]))
    if outcome.entry is None:
        assert {holder for holder, _ in outcome.failures} == {*liars}
        assert ours.list() == []
    else:  # each gave the tensor that the other damages
        check(ours, vast)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda offset, data: data + b"x", "expected 1 to 448 more tensor bytes, got 449"),
        (lambda offset, data: b"", "got 0"),
        (lambda offset, data: data[:-1], "is not whole"),
    ],
)
def test_more_or_less_than_asked_is_refused(ours: Registry, damage: Callable[[int, bytes], bytes], why: str) -> None:
    card = small_card("small")
    outcome = only(transfer(ours, [wanted(card, holder_of(holding(card, damage=damage)))]))
    assert outcome.entry is None
    ((_, reason),) = outcome.failures
    assert re.search(why, reason)
    assert ours.list() == []


def test_a_peer_that_leaves_its_stream_open_is_not_waited_for(ours: Registry) -> None:
    card, asked = small_card("small"), threading.Event()
    source = holding(card)
    give = source.read

    def read(digest: Digest, offset: int, nbytes: int) -> Generator[memoryview, None, None]:
        yield from give(digest, offset, nbytes)
        asked.set()

    source.read = read  # type: ignore[method-assign]
    transfer(ours, [wanted(card, holder_of(source))])
    check(ours, card)
    assert not asked.is_set()


def test_a_peer_without_the_card_is_passed_over(ours: Registry) -> None:
    card = small_card("small")
    without, having = holder_of(FakeSource(), 1), holder_of(holding(card), 2)
    outcome = only(transfer(ours, [wanted(card, without, having)]))
    assert outcome.entry is not None
    assert [holder for holder, _ in outcome.failures] == [without]
    check(ours, card)


def test_tensors_that_are_here_do_not_come_again(ours: Registry, large: LoRACard) -> None:
    first = ours.publish(large)
    anew = ours.get(first.digest).describe(version="2", description="told better")
    source = holding(anew)
    outcome = only(transfer(ours, [wanted(anew, holder_of(source))]))
    assert outcome.entry is not None
    assert outcome.bytes_here == anew.nbytes
    assert source.given == 0
    assert ours.get(anew.digest, verify=True) == anew


def test_a_refused_card_leaves_nothing(ours: Registry) -> None:
    card = small_card("small")
    entry = ours.publish(card)
    signed = ours.get(entry.digest)
    signed = LoRACard(
        manifest_bytes=signed.manifest_bytes,
        manifest=signed.manifest,
        tensors=card.tensors,
        signature=signed.signature,
    )
    ours.remove(entry.digest)
    outcome = only(transfer(ours, [wanted(signed, holder_of(holding(signed)))]))
    assert outcome.entry is None
    assert "removed" in outcome.failures[0][1]
    check(ours)


def test_tensors_of_a_card_at_fault_are_asked_for_once(ours: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it is known to have failed, other threads may take what goes back to the board."""

    def refuse(tensors: object) -> None:
        raise CardIntegrityError("it holds NaN")

    failed = transfer_module._Run._failed

    def failed_late(*args: Any) -> None:
        time.sleep(0.2)
        failed(*args)

    monkeypatch.setattr("registry.drafts.check_finite", refuse)
    monkeypatch.setattr(transfer_module._Run, "_failed", failed_late)
    card = small_card("bad", modules=3)
    source = holding(card, piece_bytes=card.tensors[0].nbytes)
    outcome = only(transfer(ours, [wanted(card, holder_of(source))]))
    assert "it holds NaN" in outcome.failures[0][1]
    assert [asked for asked, _ in source.asked].count(0) == 1
    check(ours)


def test_a_keeper_may_refuse(ours: Registry) -> None:
    card = small_card("small")

    def keep(arrivals: Sequence[Arrival]) -> list[FederationError]:
        return [FederationError("not of this licence") for _ in arrivals]

    outcome = only(transfer(ours, [wanted(card, holder_of(holding(card)))], keep=keep))
    assert outcome.entry is None
    assert outcome.failures[0][1] == "not of this licence"
    assert ours.list() == []


def test_a_card_that_may_not_come_is_refused_before_its_bytes(ours: Registry) -> None:
    card = small_card("small")
    source = holding(card)

    def check(card: LoRACard, origin: Origin) -> None:
        assert card.tensors == ()
        raise FederationError("not what was offered")

    outcome = only(transfer(ours, [wanted(card, holder_of(source))], check=check))
    assert outcome.failures[0][1] == "not what was offered"
    assert source.asked == []


def test_progress_ends_at_all(ours: Registry, large: LoRACard) -> None:
    cards = [large, small_card("small"), small_card("lost")]
    holder = holder_of(holding(*cards[:2]))
    seen: list[TransferProgress] = []
    transfer(ours, [wanted(card, holder) for card in cards], on_progress=seen.append)
    assert (seen[-1].cards_done, seen[-1].cards_total) == (3, 3)
    assert seen[-1].bytes_done == seen[-1].bytes_total == sum(card.nbytes for card in cards)
    done = [progress.bytes_done for progress in seen]
    assert done == sorted(done)
    assert len({progress.card_bytes_done for progress in seen if progress.card == "large@1"}) > 30
    assert all(progress.card_bytes_done <= progress.card_bytes_total for progress in seen)


def test_what_a_watcher_raises_ends_the_transfer(ours: Registry, large: LoRACard) -> None:
    def watch(progress: TransferProgress) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        transfer(ours, [wanted(large, holder_of(holding(large)))], on_progress=watch)
    assert ours.list() == []


def test_a_cancelled_transfer_ends_soon_and_keeps_what_came(ours: Registry, large: LoRACard) -> None:
    cancelled = threading.Event()
    source = holding(large)
    source.on_piece = lambda: cancelled.set() if source.given >= 3 * MIB else None
    outcome = only(transfer(ours, [wanted(large, holder_of(source))], cancelled=cancelled))
    assert outcome.entry is None
    assert source.given < large.nbytes
    assert ours.list() == []
    outcome = only(transfer(ours, [wanted(large, holder_of(holding(large)))]))
    assert outcome.bytes_here >= 3 * MIB - limits.STREAMS_PER_PEER * BLOCK_BYTES
    check(ours, large)


def test_a_transfer_keeps_to_its_pace(ours: Registry, large: LoRACard) -> None:
    started = time.monotonic()
    transfer(ours, [wanted(large, holder_of(holding(large)))], pace=Pace(64 * MIB))
    assert time.monotonic() - started >= 0.9 * large.nbytes / (64 * MIB)
    check(ours, large)


def test_over_flight(ours: Registry, theirs: Registry, server: LoRAFlightServer, large: LoRACard) -> None:
    entries = [theirs.publish(card) for card in (large, small_card("small"))]
    with LoRAFlightClient(server.address) as client:
        holder = Holder(source=client, origin=Origin(peer_id=theirs.identity.id, address=server.address))
        outcomes = transfer(ours, [wanted(theirs.get(entry.digest), holder) for entry in entries])
    assert all(outcome.failures == () for outcome in outcomes)
    check(ours, *(theirs.get(entry.digest) for entry in entries))
    for entry in entries:
        assert ours.get(entry.digest).signature == theirs.get(entry.digest).signature
        assert ours.path_of(entry.digest).read_bytes() == theirs.path_of(entry.digest).read_bytes()
