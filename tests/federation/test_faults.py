"""The line fails at every place where it can: between any two frames, and by any bit. Real sockets, real processes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import registry.drafts
from federation import limits
from federation.board import Holder
from federation.client import LoRAFlightClient
from federation.credentials import Credentials
from federation.server import LoRAFlightServer
from federation.transfer import CardOutcome, transfer
from registry.card import LoRACard
from registry.entries import Origin
from registry.store import Registry
from tests.federation.proxy import CHUNK_BYTES, Proxy
from tests.federation.sources import wanted
from tests.registry.cards import module_shapes, small_card

KIB = 1 << 10
BATCH_BYTES = 32 * KIB
CONNECTION_BYTES = 8 * KIB
"""What a server sends on a connection beside tensors: settings, the manifest, headers, pings."""


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many borders as a large card has, in a small one."""
    monkeypatch.setattr(limits, "TENSOR_CHUNK_BYTES", BATCH_BYTES)
    monkeypatch.setattr(registry.drafts, "BLOCK_BYTES", BATCH_BYTES)
    monkeypatch.setattr(limits, "RETRY_DELAY_S", 0.01)


@pytest.fixture
def card(theirs: Registry) -> LoRACard:
    """Ten tensors of 32 KiB, published by `theirs`; too large to come in one call."""
    card = theirs.get(theirs.publish(small_card("card", modules=module_shapes(5, 2 * KIB, 2 * KIB))).digest)
    assert card.nbytes > limits.SMALL_CARD_BYTES
    return card


def brought(ours: Registry, card: LoRACard, proxy: Proxy, credentials: Credentials | None = None) -> CardOutcome:
    """One transfer through the proxy, with a connection of its own."""
    with LoRAFlightClient(proxy.address, credentials=credentials, timeout_s=2.0) as client:
        holder = Holder(source=client, origin=Origin(peer_id="0" * 32, address=proxy.address))
        (outcome,) = transfer(ours, [wanted(card, holder)])
    return outcome


def moved(outcome: CardOutcome) -> int:
    return sum(outcome.moved.values())


def check_here(ours: Registry, theirs: Registry, card: LoRACard) -> None:
    """The card is here, byte for byte, with nothing beside it."""
    assert [report.ok for report in ours.verify()] == [True]
    assert ours.path_of(card.digest).read_bytes() == theirs.path_of(card.digest).read_bytes()
    assert [*ours.home.glob("drafts/*")] == [*ours.home.glob("tmp/*")] == []


def check_nothing_shows(ours: Registry) -> None:
    assert (ours.list(), ours.verify(), ours.digests(quarantined=True)) == ([], [], set())
    assert [*ours.home.glob("cards/*/*")] == []


@contextmanager
def for_now(ours: Registry, card: LoRACard) -> Iterator[None]:
    """Afterwards the card is as if it had never come."""
    yield
    ours.remove(card.digest)
    ours.unhide(card.digest)


def frame_ends(stream: bytes) -> list[int]:
    """Where the HTTP/2 frames of a server end (RFC 9113, 4.1): 3 bytes of length, 6 more, and so many."""
    ends, at = [], 0
    while at + 9 <= len(stream):
        at += 9 + int.from_bytes(stream[at : at + 3], "big")
        ends.append(at)
    return ends


def borders(ours: Registry, card: LoRACard, proxy: Proxy) -> list[int]:
    """After how many bytes a frame ends in a transfer that nothing disturbs; a batch is two frames here."""
    proxy.record = bytearray()
    with for_now(ours, card):
        assert brought(ours, card, proxy).failures == ()
    ends = frame_ends(bytes(proxy.record))
    proxy.reset()
    assert len(ends) > 2 * card.nbytes / BATCH_BYTES
    return ends


def test_a_line_that_is_cut_at_any_border_goes_on_and_wastes_at_most_a_batch(
    ours: Registry, theirs: Registry, server: LoRAFlightServer, card: LoRACard
) -> None:
    with Proxy(server.port) as proxy:
        for border in borders(ours, card, proxy):
            proxy.reset()
            proxy.cut_after, proxy.cuts_left = border, 1
            with for_now(ours, card):
                outcome = brought(ours, card, proxy)
                assert proxy.cuts == (border < proxy.bytes_back)
                assert moved(outcome) == card.nbytes  # none twice
                check_here(ours, theirs, card)
            lines = 1 + proxy.cuts
            assert proxy.bytes_back <= card.nbytes + BATCH_BYTES + CHUNK_BYTES + lines * CONNECTION_BYTES


@pytest.mark.slow
def test_a_transfer_that_is_cut_off_at_any_border_shows_nothing_and_is_taken_up(
    ours: Registry, theirs: Registry, server: LoRAFlightServer, card: LoRACard
) -> None:
    broken = 0
    with Proxy(server.port) as proxy:
        for border in borders(ours, card, proxy):
            proxy.reset()
            proxy.cut_after = border
            with for_now(ours, card):
                first = brought(ours, card, proxy)
                if first.entry is None:
                    broken += 1
                    check_nothing_shows(ours)
                    proxy.reset()
                    second = brought(ours, card, proxy)
                    assert moved(second) == card.nbytes - second.bytes_here
                    assert second.bytes_here >= moved(first) - BATCH_BYTES
                check_here(ours, theirs, card)
    assert broken > card.nbytes / BATCH_BYTES


@pytest.mark.parametrize("secured", [False, True], ids=["plaintext", "tls"])
def test_a_bit_that_flips_on_the_wire_is_never_kept(
    ours: Registry, theirs: Registry, card: LoRACard, secured: bool
) -> None:
    """Under TLS the line itself notices; in plaintext the digests do. The next transfer brings the card either way."""
    rng, told = random.Random(20261121), []
    own, other = (Credentials.of(node.identity) if secured else None for node in (ours, theirs))
    with (
        LoRAFlightServer(theirs, node_id=theirs.identity.id, name="theirs", credentials=other) as server,
        Proxy(server.port) as proxy,
    ):
        for _ in range(24):
            proxy.reset()
            proxy.flip_at = rng.randrange(card.nbytes)
            with for_now(ours, card):
                outcome = brought(ours, card, proxy, own)
                told += [why for _, why in outcome.failures]
                if outcome.entry is None:
                    check_nothing_shows(ours)
                    proxy.reset()
                    assert brought(ours, card, proxy, own).entry is not None
                check_here(ours, theirs, card)
    forged = [why for why in told if "damaged or forged" in why]
    if secured:
        assert forged == []
    else:
        assert len(forged) > 12  # most of the bytes are tensors'


def test_the_wire_that_is_flipped_carries_the_bit(server: LoRAFlightServer, card: LoRACard, tmp_path: Path) -> None:
    """What the tests above rest on: without a check the damage would be here."""
    with Proxy(server.port) as proxy, LoRAFlightClient(proxy.address) as client:
        proxy.flip_at = card.nbytes // 2
        came = b"".join(client.read(card.digest, 0, card.nbytes))
    sent = b"".join(bytes(tensor.data) for tensor in card.tensors)
    differing = [(one, other) for one, other in zip(came, sent, strict=True) if one != other]
    assert [one ^ other for one, other in differing] == [0x10]
