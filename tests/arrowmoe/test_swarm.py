"""Two engines on loopback: `start_federation` and `sync_remote_skills`, and a card that is used before it is synced."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from arrowmoe.features import TextFeaturizer
from arrowmoe.routing import LoRARouter, Policy
from arrowmoe.swarm import Swarm
from federation.admission import Policy as AdmissionPolicy
from federation.client import LoRAFlightClient
from federation.errors import FederationError, NotApprovedError, TransportError
from federation.pace import Pace
from federation.peer import Peer
from registry.digest import Digest
from registry.entries import Origin
from registry.errors import RegistryError
from registry.manifest import Manifest
from registry.store import Registry
from registry.tensor import Tensor
from tests.arrowmoe.tiny import bert_engine, card_for
from tests.registry.cards import small_card, statistics

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
    taker.router = LoRARouter(TextFeaturizer(bert_engine()), policy=Policy(threshold=0.99))
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


def test_a_candidate_comes_from_all_who_have_it_whoever_fails(registries: tuple[Registry, Registry]) -> None:
    here, far = registries
    card = small_card("one", modules=8)
    entry = far.publish(card)
    with ExitStack() as stack:
        third = stack.enter_context(Registry.open(here.home.parent / "third"))
        third.admit(far.get(entry.digest), origin=Origin(peer_id=far.identity.id, address="elsewhere:1"))
        others = [stack.enter_context(Swarm(one, name="other", discovery=False)) for one in (far, third)]
        known = [other.address for other in others]
        swarm = stack.enter_context(Swarm(here, name="here", discovery=False, peers=known))
        swarm.look()
        assert [peer.address for peer in swarm.offers[entry.digest].peers] == known
        others[0].close()
        assert swarm.fetch(entry.digest).digest == entry.digest
    assert here.entry("one").origin.peer_id == third.identity.id


def test_a_candidate_that_nobody_gives_is_an_error_with_every_reason(registries: tuple[Registry, Registry]) -> None:
    here, far = registries
    entry = far.publish(small_card("one"))
    with Swarm(far, name="far", discovery=False) as other:
        swarm = Swarm(here, name="here", discovery=False, peers=[other.address]).start()
        swarm.look()
    with closing(swarm), pytest.raises(FederationError, match=r"one@1 did not come: 127\.0\.0\.1.*not available"):
        swarm.fetch(entry.digest)


def test_a_blocked_nodes_stream_is_cut_at_the_next_look(registries: tuple[Registry, Registry]) -> None:
    here, far = registries
    large = small_card("large", modules={f"m{index}": (1024, 1024) for index in range(128)}, rank=16)
    digest = here.publish(large).digest
    with (
        Swarm(here, name="here", discovery=False) as swarm,
        Swarm(far, name="far", discovery=False) as other,
        other.circle.connect(Peer.at(swarm.address)) as client,
    ):
        reading = client.read(digest, 0, large.nbytes)
        next(reading)
        swarm.circle.book.meet(far.identity.id, most_pending=8)
        swarm.circle.book.block(far.identity.id)
        swarm.look()
        with pytest.raises(TransportError):
            for _ in reading:
                pass
        with pytest.raises(NotApprovedError):
            client.health()


def test_a_pace_holds_for_syncs_and_for_candidates(registries: tuple[Registry, Registry]) -> None:
    here, far = registries
    cards = [
        small_card(name, modules={"m": (1024, 1024)}, alpha=0.01, seed=seed) for seed, name in enumerate(("one", "two"))
    ]
    entries = [far.publish(card) for card in cards]
    with (
        Swarm(far, name="far", discovery=False) as other,
        Swarm(here, name="here", discovery=False, peers=[other.address], pace=Pace(2 * cards[0].nbytes)) as swarm,
    ):
        swarm.look()
        for take in (lambda: swarm.fetch(entries[0].digest), swarm.sync):
            started_s = time.monotonic()
            take()
            assert time.monotonic() - started_s > 0.4, "half a second for one card"
    assert here.digests() == {entry.digest for entry in entries}


def test_a_peer_is_online_then_syncing_then_up_to_date(registries: tuple[Registry, Registry]) -> None:
    here, far = registries
    far.publish(small_card("one"))
    during: list[str] = []
    with (
        Swarm(far, name="far", discovery=False) as other,
        Swarm(here, name="here", discovery=False, peers=[other.address]) as swarm,
    ):

        def states() -> list[str]:
            return [str(peer.condition) for peer in swarm.look().peers]

        assert states() == ["online"]
        swarm.sync(on_progress=lambda _: during.extend(states()) if not during else None)
        assert during == ["syncing"]
        assert states() == ["up to date"]


def test_a_strangers_card_waits_until_its_publisher_is_approved(registries: tuple[Registry, Registry]) -> None:
    here, far = registries
    entry = far.publish(small_card("one"))
    policy = AdmissionPolicy(unknown_publishers="quarantine")
    with (
        Swarm(far, name="far", discovery=False) as other,
        Swarm(here, name="here", discovery=False, peers=[other.address], policy=policy) as swarm,
    ):
        assert swarm.sync().ok
        assert here.digests() == set()
        assert here.entry(entry.digest, quarantined=True).quarantined
        swarm.circle.book.approve(far.identity.id)
        swarm.look()
    assert here.digests() == {entry.digest}


@pytest.fixture
def swarm(registries: tuple[Registry, Registry]) -> Iterator[Swarm]:
    """The first registry's swarm; its only peer serves the second one."""
    here, far = registries
    with (
        Swarm(far, name="far", discovery=False) as other,
        Swarm(here, name="here", discovery=False, peers=[other.address]) as swarm,
    ):
        yield swarm


def test_an_offers_statistics_come_without_its_weights_and_once(
    registries: tuple[Registry, Registry], swarm: Swarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, far = registries
    spec, tensors = statistics()
    described = far.publish(small_card("described").with_routing(spec, tensors))
    plain = far.publish(small_card("plain"))
    calls = counted_fetches(monkeypatch)
    assert swarm.statistics(described.digest) is None, "nobody looked yet"
    for _ in range(2):
        swarm.look()
        found = swarm.statistics(described.digest)
        assert found is not None
        assert found[0] == spec
        assert {tensor.name: bytes(tensor.data) for tensor in found[1]} == {t.name: bytes(t.data) for t in tensors}
        assert swarm.statistics(plain.digest) is None
    assert calls == [described.digest]
    assert not here.digests()
    far.remove("described")
    swarm.look()
    assert swarm.statistics(described.digest) is None


def test_a_peer_that_fails_gives_no_statistics_until_the_next_look(
    registries: tuple[Registry, Registry],
    swarm: Swarm,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    entry = registries[1].publish(small_card("described").with_routing(*statistics()))
    swarm.look()
    path = registries[1].path_of(entry.digest)
    whole = path.read_bytes()
    path.chmod(0o600)
    path.write_bytes(b"no arrow at all")
    calls = counted_fetches(monkeypatch)
    for _ in range(2):
        assert swarm.statistics(entry.digest) is None
    assert calls == [entry.digest]
    assert caplog.text.count("statistics_not_fetched") == 1
    path.write_bytes(whole)
    swarm.look()
    assert swarm.statistics(entry.digest) is not None


def test_a_peer_that_claims_statistics_of_a_card_without_any(
    registries: tuple[Registry, Registry], swarm: Swarm
) -> None:
    entry = registries[1].publish(small_card("plain"))
    swarm.look()
    offer = swarm.offers[entry.digest]
    swarm.offers = {entry.digest: replace(offer, entry=replace(offer.entry, has_statistics=True))}
    assert swarm.statistics(entry.digest) is None


def counted_fetches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The digests whose statistics a client asks for from now on."""
    calls: list[str] = []
    fetch = LoRAFlightClient.fetch_statistics

    def counted(client: LoRAFlightClient, digest: Digest) -> tuple[Manifest, tuple[Tensor, ...]]:
        calls.append(digest)
        return fetch(client, digest)

    monkeypatch.setattr(LoRAFlightClient, "fetch_statistics", counted)
    return calls


def test_what_is_missing_is_said(registries: tuple[Registry, Registry]) -> None:
    with pytest.raises(RegistryError, match="without a registry"):
        bert_engine().start_federation()
    with pytest.raises(FederationError, match="not started"):
        bert_engine(registries[0]).sync_remote_skills()
