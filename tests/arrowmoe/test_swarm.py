"""Two engines on loopback: `start_federation` and `sync_remote_skills`, and a card that is used before it is synced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pytest

from arrowmoe.features import TextFeaturizer
from arrowmoe.routing import LoRARouter
from arrowmoe.swarm import Swarm
from federation.errors import FederationError
from registry.errors import RegistryError
from registry.store import Registry
from tests.arrowmoe.tiny import bert_engine, card_for

TEXTS = ["w5 w9 w12", "w30"]


@pytest.fixture
def registries(tmp_path: Path) -> Iterator[tuple[Registry, Registry]]:
    with Registry.open(tmp_path / "a") as first, Registry.open(tmp_path / "b") as second:
        yield first, second


def test_an_engine_copies_a_peers_cards_and_routes_to_them(
    registries: tuple[Registry, Registry], tmp_path: Path
) -> None:
    giver, taker = (bert_engine(registry) for registry in registries)
    giver.registry.publish(card_for(giver, tmp_path, "one", 0).describe(description="w5 w9 w12"))
    taker.router = LoRARouter(TextFeaturizer(bert_engine()), threshold=0.99)
    with ExitStack() as stack:
        served = stack.enter_context(closing(giver.start_federation(discovery=False)))
        stack.enter_context(closing(taker.start_federation(discovery=False, peers=[served.address])))
        report = taker.sync_remote_skills()
        assert [entry.name for entry in report.fetched] == ["one"]
        assert taker.sync_remote_skills().bytes_moved == 0
    expected = giver.encode_with_lora(TEXTS, adapter=["one", None])
    np.testing.assert_array_equal(taker.encode_with_lora(TEXTS, adapter="auto"), expected)


def test_a_virtual_candidate_is_fetched_whole(registries: tuple[Registry, Registry], tmp_path: Path) -> None:
    here, far = registries
    entry = far.publish(card_for(bert_engine(), tmp_path, "one", 0))
    with (
        Swarm(far, name="far", discovery=False) as other,
        Swarm(here, name="here", discovery=False, peers=[other.address]) as swarm,
    ):
        swarm.look()
        assert swarm.offers[entry.digest].source == other.address
        assert swarm.fetch(entry.digest).digest == entry.digest
        swarm.look()
        assert not swarm.offers
        assert swarm.fetch(entry.digest).digest == entry.digest, "it came here meanwhile"
    assert here.entry("one").origin.peer_id == far.identity.id
    with pytest.raises(FederationError, match="no peer offers"):
        swarm.fetch("blake3:" + "0" * 64)


def test_what_is_missing_is_said(registries: tuple[Registry, Registry]) -> None:
    with pytest.raises(RegistryError, match="without a registry"):
        bert_engine().start_federation()
    with pytest.raises(FederationError, match="not started"):
        bert_engine(registries[0]).sync_remote_skills()
