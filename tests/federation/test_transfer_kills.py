"""Receivers and senders that are killed in the middle of a transfer, as real processes."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count

import pytest

from federation import limits
from federation.board import Holder
from federation.client import LoRAFlightClient
from federation.pace import Pace
from federation.server import LoRAFlightServer
from federation.transfer import transfer
from registry.card import LoRACard
from registry.drafts import BLOCK_BYTES
from registry.entries import Origin
from registry.store import Registry
from tests.federation.conftest import serving
from tests.federation.sources import wanted
from tests.registry.cards import module_shapes, small_card

MIB = 1 << 20
LARGE = small_card("large", modules=module_shapes(3, 1 << 18, 1 << 18))
"""Six tensors of 4 MiB."""


@contextmanager
def sending(registry: Registry) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that serves the registry and may be killed, and its address."""
    command = [sys.executable, "-m", "tests.federation.serve", str(registry.home)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, f"127.0.0.1:{json.loads(process.stdout.readline())['port']}"
        process.kill()


def killing(process: subprocess.Popen[str], after: int | None) -> Callable[[object], None]:
    """A watcher that kills the process at its call number `after`."""
    numbers = count(1)

    def watch(progress: object) -> None:
        if next(numbers) == after:
            process.kill()

    return watch


def here(registry: Registry, card: LoRACard) -> int:
    """How many of the card's tensor bytes its draft holds."""
    with registry.drafts.open(replace(card, tensors=())) as draft:
        return card.nbytes - sum(end - start for start, end in draft.gaps())


def test_a_killed_receiver_goes_on_where_it_was(ours: Registry, theirs: Registry, server: LoRAFlightServer) -> None:
    card = theirs.get(theirs.publish(LARGE).digest)
    rng, had = random.Random(20261121), 0
    for _ in range(8):
        command = [sys.executable, "-m", "tests.federation.receiver", str(ours.home), server.address, card.digest]
        with subprocess.Popen([*command, str(24 * MIB)], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "begun\n"
            time.sleep(rng.uniform(0.05, 0.5))
            process.kill()
        assert all(report.ok for report in ours.verify())
        if card.digest in ours.digests():
            break
        assert ours.list() == []
        has = here(ours, card)
        assert has >= had
        had = has
    assert had > 0
    with LoRAFlightClient(server.address) as client:
        holder = Holder(source=client, origin=Origin(peer_id=theirs.identity.id, address=server.address))
        (outcome,) = transfer(ours, [wanted(card, holder)])
    assert outcome.failures == ()
    assert sum(outcome.moved.values()) == card.nbytes - outcome.bytes_here
    assert [report.ok for report in ours.verify()] == [True]
    assert [*ours.home.glob("drafts/*")] == []


def test_a_killed_sender_costs_at_most_a_block_of_each_stream(
    make_registry: Callable[[str], Registry], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = make_registry("ours"), make_registry("theirs")
    monkeypatch.setattr(limits, "RETRY_DELAY_S", 0.01)
    card = theirs.get(theirs.publish(LARGE).digest)
    moved = kills = 0
    for kill_after in (2, 4, 3, None):
        with sending(theirs) as (process, address), LoRAFlightClient(address) as client:
            holder = Holder(source=client, origin=Origin(peer_id=theirs.identity.id, address=address))
            watch = killing(process, kill_after)
            (outcome,) = transfer(ours, [wanted(card, holder)], on_progress=watch, pace=Pace(64 * MIB))
        moved += sum(outcome.moved.values())
        assert all(report.ok for report in ours.verify())
        assert (outcome.entry is None) == (ours.list() == [])
        if outcome.entry is not None:
            break
        kills += 1
    assert outcome.entry is not None
    assert kills > 0
    assert moved <= card.nbytes + kills * limits.STREAMS_PER_PEER * BLOCK_BYTES
    assert [*ours.home.glob("drafts/*")] == []


def test_the_next_peer_goes_on_where_the_last_one_died(
    ours: Registry, make_registry: Callable[[str], Registry]
) -> None:
    theirs, others = make_registry("theirs"), make_registry("others")
    card = theirs.get(theirs.publish(LARGE).digest)
    others.admit(card, origin=Origin(peer_id=theirs.identity.id, address="192.0.2.1:7420"))
    with serving(others.home) as alive, sending(theirs) as (dying, address):
        addresses = [address, f"127.0.0.1:{alive.port}"]
        with LoRAFlightClient(addresses[0]) as first, LoRAFlightClient(addresses[1]) as second:
            holders = [
                Holder(source=client, origin=Origin(peer_id=f"{number:032x}", address=address))
                for number, (client, address) in enumerate(zip((first, second), addresses, strict=True))
            ]
            watch = killing(dying, 6)
            (outcome,) = transfer(ours, [wanted(card, *holders)], on_progress=watch, pace=Pace(64 * MIB))
    assert outcome.entry is not None
    assert sum(outcome.moved.values()) == card.nbytes
    assert [report.ok for report in ours.verify()] == [True]
