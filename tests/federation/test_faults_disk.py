"""A disk that is full, at every step of a card's way here, and one that rots, under cards and under drafts."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from federation import limits
from federation.care import from_peers, heal
from federation.peer import Peer
from federation.server import LoRAFlightServer
from federation.sync import sync
from federation.transfer import CardOutcome, Check, Keep, transfer
from registry.arrivals import Arrival
from registry.card import LoRACard
from registry.entries import CardEntry
from registry.errors import ArrowMoEError, HomeError, NoSpaceError
from registry.store import Registry
from tests.federation.sources import FakeSource, holder_of, holding, wanted
from tests.registry.cards import module_shapes, small_card

KIB, MIB = 1 << 10, 1 << 20
DISK_BYTES = 12 * MIB
PAGE_BYTES = 4 * KIB
CARD = small_card("card", modules=module_shapes(2, 1 << 16, 1 << 16))
"""Four tensors of 1 MiB."""


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "RETRY_DELAY_S", 0.0)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 12 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(place)]
    try:
        subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no disk can be mounted here, which takes root: {getattr(error, 'stderr', error)}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.fixture
def small(disk: Path, empty_home: Path) -> Iterator[Registry]:
    """A registry whose home is on the small disk."""
    shutil.copytree(empty_home, disk / "home")
    with Registry.open(disk / "home") as registry:
        yield registry


def fill(disk: Path, *, leaving: int = 0) -> None:
    """Take all the room but `leaving` bytes."""
    with (disk / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - leaving)
    assert shutil.disk_usage(disk).free == leaving


def make_room(disk: Path) -> None:
    (disk / "filler").unlink(missing_ok=True)


def brought(ours: Registry, source: FakeSource, *, check: Check | None = None, keep: Keep | None = None) -> CardOutcome:
    (outcome,) = transfer(ours, [wanted(CARD, holder_of(source))], check=check, keep=keep)
    return outcome


def check_nothing_shows(registry: Registry) -> None:
    assert (registry.list(), registry.digests(quarantined=True)) == ([], set())


def check_here(registry: Registry, *cards: LoRACard) -> None:
    assert {report.digest: report.ok for report in registry.verify()} == {card.digest: True for card in cards}
    assert [*registry.home.glob("drafts/*")] == [*registry.home.glob("tmp/*")] == []


@pytest.mark.parametrize("leaving", [0, 2 * MIB])
def test_a_card_that_has_no_room_is_refused_before_a_byte_comes(small: Registry, disk: Path, leaving: int) -> None:
    source = holding(CARD)
    outcome = brought(small, source, check=lambda card, origin: fill(disk, leaving=leaving))
    assert [why.partition(" in ")[0] for _, why in outcome.failures] == [
        f"expected room for the {CARD.nbytes} bytes of card {CARD.digest}"
    ]
    assert source.given == 0
    check_nothing_shows(small)
    make_room(disk)
    assert brought(small, source).entry is not None
    check_here(small, CARD)


def test_a_disk_that_fills_up_while_a_card_comes_costs_nothing_of_it(small: Registry, disk: Path) -> None:
    source = holding(CARD)

    def on_piece() -> None:
        if source.given == MIB:
            fill(disk)

    source.on_piece = on_piece
    outcome = brought(small, source)
    assert all("expected room for" in why for _, why in outcome.failures)
    assert outcome.entry is None
    assert source.given == CARD.nbytes  # the room for it had been taken before
    check_nothing_shows(small)
    make_room(disk)
    assert brought(small, source).entry is not None
    assert source.given == CARD.nbytes
    check_here(small, CARD)


def test_a_disk_with_too_few_pages_left_for_the_catalog_costs_nothing_of_a_card(small: Registry, disk: Path) -> None:
    """With each page more the admission comes one step further."""
    source, told, pages = holding(CARD), [], 0

    def keep(arrivals: Sequence[Arrival]) -> Sequence[CardEntry | ArrowMoEError | OSError]:
        fill(disk, leaving=pages * PAGE_BYTES)
        return small.admit_all(arrivals)

    while (outcome := brought(small, source, keep=keep)).entry is None:
        told += [why for _, why in outcome.failures]
        assert len(told) == pages + 1
        check_nothing_shows(small)
        make_room(disk)
        pages += 1
    make_room(disk)
    assert source.given == CARD.nbytes
    assert all("expected room for" in why or "disk is full" in why for why in told)
    assert any("disk is full" in why for why in told)
    assert outcome.bytes_here == CARD.nbytes
    check_here(small, CARD)


def test_of_many_cards_those_that_have_room_come_and_the_others_later(
    small: Registry, theirs: Registry, server: LoRAFlightServer, disk: Path
) -> None:
    cards = [
        theirs.get(theirs.publish(small_card(f"card-{n}", seed=n, modules=module_shapes(1, 1 << 14, 1 << 14))).digest)
        for n in range(8)
    ]
    fill(disk, leaving=2 * MIB)  # each takes 1/2 MiB
    report = sync(small, [Peer.at(server.address)])
    failed = dict(report.peers[0].failed)
    assert 0 < len(failed) < len(cards)
    assert {entry.digest for entry in report.fetched} == small.digests() == {card.digest for card in cards} - {*failed}
    assert all("expected room for" in why or "disk is full" in why for why in failed.values())
    assert all(one.ok for one in small.verify())
    make_room(disk)
    assert sync(small, [Peer.at(server.address)]).ok
    check_here(small, *cards)


def test_publishing_on_a_full_disk_is_refused_and_works_again(small: Registry, disk: Path) -> None:
    before = small.publish(small_card("before"))
    fill(disk)
    with pytest.raises(NoSpaceError) as caught:
        small.publish(CARD)
    assert "make room" in str(caught.value.hint)
    with pytest.raises(HomeError, match="No space left"):
        Registry.open(disk / "new")
    with Registry.open(small.home) as again:
        assert again.get("before", verify=True).digest == before.digest
    assert small.digests() == {before.digest}
    make_room(disk)
    after = small.publish(CARD)
    assert small.digests() == {before.digest, after.digest}
    assert all(report.ok for report in small.verify())


def flip(path: Path, at: int) -> None:
    """Turn one bit, as a disk would, without a word to whoever has it open."""
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.unlink()
    path.write_bytes(data)


def test_a_bit_that_flips_anywhere_in_a_card_is_found_and_healed_by_a_peer(
    ours: Registry, theirs: Registry, server: LoRAFlightServer
) -> None:
    digest = theirs.publish(small_card("card")).digest
    peer = Peer.at(server.address)
    assert sync(ours, [peer]).ok
    path, whole = ours.path_of(digest), theirs.path_of(digest).read_bytes()
    found = 0
    for at in [*range(0, len(whole), len(whole) // 48), len(whole) - 1]:
        flip(path, at)
        healed = heal(ours, ours.verify(), from_peers(lambda: [peer]))
        assert all(one.ok for one in healed)
        found += len(healed)
        card = ours.get(digest, verify=True)
        assert [bytes(tensor.data) for tensor in card.tensors] == [
            bytes(tensor.data) for tensor in theirs.get(digest).tensors
        ]
        assert path.read_bytes() == whole or not healed  # some bits are padding's, which nobody reads
        path.write_bytes(whole)
    assert found > 30
    assert ours.changes().last == 1


def test_a_bit_that_flips_anywhere_in_a_draft_costs_at_most_a_tensor(make_registry: Callable[[str], Registry]) -> None:
    rng, come = random.Random(20261121), 3 * MIB
    ours = make_registry("ours")
    for _ in range(24):
        assert brought(ours, holding(CARD, cut_after=come)).entry is None
        [draft] = ours.home.glob("drafts/*")
        flip(draft, rng.randrange(draft.stat().st_size))
        rest = holding(CARD)
        assert brought(ours, rest).entry is not None
        assert rest.given <= CARD.nbytes - come + MIB
        check_here(ours, CARD)
        ours.remove(CARD.digest)
        ours.unhide(CARD.digest)
