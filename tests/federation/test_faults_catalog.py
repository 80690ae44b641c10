"""Whoever writes the catalog is killed while cards come in, or its database goes away, on SQLite and PostgreSQL.

A card either shows and is whole, or does not show; what has come need not come again.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from federation import limits
from federation.peer import Peer
from federation.server import LoRAFlightServer
from federation.sync import sync
from registry.card import LoRACard
from registry.drafts import BLOCK_BYTES
from registry.errors import RegistryError
from registry.store import Registry
from tests.federation.conftest import serving
from tests.registry.cards import module_shapes, small_card
from tests.registry.databases import cut_off_others

MIB = 1 << 20
SMALL = 120
KILLS = 8
SPARE_BYTES = limits.STREAMS_PER_PEER * BLOCK_BYTES + SMALL * 1024
"""What a kill may make come again: a block of each stream, and small cards that were not entered yet."""


@pytest.fixture
def offered(theirs: Registry) -> dict[str, LoRACard]:
    """A card of 24 MiB among many small ones, by digest."""
    cards = [small_card(f"card-{number:03}", seed=number) for number in range(SMALL)]
    cards.append(small_card("card-060-large", modules=module_shapes(3, 1 << 18, 1 << 18)))
    found = [theirs.get(theirs.publish(card).digest) for card in cards]
    return {card.digest: card for card in found}


@pytest.fixture
def home(tmp_path: Path, empty_home: Path) -> Path:
    return Path(shutil.copytree(empty_home, tmp_path / "killed"))


def check(home: Path, catalog_url: str, offered: dict[str, LoRACard]) -> tuple[set[str], int]:
    """What shows is whole; the cards that are here, and how many of all tensor bytes, in cards and drafts."""
    with Registry.open(home, catalog_url=catalog_url) as registry:
        assert [report for report in registry.verify() if not report.ok] == []
        here = {str(entry.digest) for entry in registry.list()}
        assert here == {str(digest) for digest in registry.digests(quarantined=True)}
        assert {path.name.partition(".")[0] for path in home.glob("cards/*/*")} == {
            digest.removeprefix("blake3:") for digest in here
        }
        nbytes = sum(offered[digest].nbytes for digest in here)
        for card in (card for digest, card in offered.items() if digest not in here and card.nbytes > MIB):
            with registry.drafts.open(replace(card, tensors=())) as draft:
                nbytes += card.nbytes - sum(end - start for start, end in draft.gaps())
        return here, nbytes


@pytest.mark.slow
def test_a_syncing_process_that_is_killed_at_any_moment_goes_on_where_it_was(
    home: Path, catalog_url: str, theirs: Registry, offered: dict[str, LoRACard]
) -> None:
    rng = random.Random(20261121)
    here: set[str] = set()
    partly = 0
    with serving(theirs.home) as server:
        command = [sys.executable, "-m", "tests.federation.syncer", str(home), catalog_url]
        command += [f"127.0.0.1:{server.port}", str(16 * MIB)]
        for _ in range(KILLS):
            entered = sum(offered[digest].nbytes for digest in here)
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
                assert process.stdout is not None
                said = [*islice(process.stdout, rng.randrange(1, 200))]
                process.kill()
                said += process.stdout.readlines()
            told = max(int(line) for line in said if line.endswith("\n"))
            before = here
            here, nbytes = check(home, catalog_url, offered)
            assert before <= here
            assert nbytes >= entered + told - SPARE_BYTES
            partly += 0 < len(here) < len(offered)
        assert partly > 0, "the kills came too early or too late to say anything"
        subprocess.run(command, stdout=subprocess.DEVNULL, timeout=120, check=True)
    assert check(home, catalog_url, offered)[0] == offered.keys()
    assert [*home.glob("drafts/*")] == [*home.glob("tmp/*")] == []


@pytest.fixture
def breaking(catalog_url: str) -> Iterator[Callable[[], None]]:
    """Has the database end all its connections over and over, until it is called."""
    if catalog_url.startswith("sqlite"):
        pytest.skip("a file has no connections to end")
    enough = threading.Event()

    def run() -> None:
        while not enough.wait(0.05):
            cut_off_others(catalog_url)

    thread = threading.Thread(target=run)
    thread.start()

    def end() -> None:
        enough.set()
        thread.join()

    yield end
    end()


def test_a_database_whose_connections_break_all_the_time_shows_no_half_card(
    home: Path,
    catalog_url: str,
    theirs: Registry,
    offered: dict[str, LoRACard],
    server: LoRAFlightServer,
    request: pytest.FixtureRequest,
) -> None:
    peer, moved, broken = Peer.at(server.address), 0, 0
    with Registry.open(home, catalog_url=catalog_url) as registry:
        end = request.getfixturevalue("breaking")
        for _ in range(4):
            try:
                report = sync(registry, [peer])
            except RegistryError:  # what is asked of the catalog before any card comes
                broken += 1
                continue
            moved += report.bytes_moved
            broken += len(report.peers[0].failed)
            assert all("failed" in why for one in report.peers for _, why in one.failed)
        end()
        assert all(report.ok for report in registry.verify())
        report = sync(registry, [peer])
        assert report.ok
        moved += report.bytes_moved
    assert broken > 0
    assert check(home, catalog_url, offered)[0] == offered.keys()
    assert moved == sum(card.nbytes for card in offered.values())
