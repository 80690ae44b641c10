"""The routing benchmark's parts on a synthetic world: four cards of three intents each; nothing is downloaded."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from arrowmoe.features import Features, Vectors
from arrowmoe.routing.probe import Probe
from benchmarks import routing, routing_peers, routing_scale
from benchmarks.routing_data import Material, Names, Rows, embedded
from benchmarks.routing_measures import decided, described, router, separated
from benchmarks.routing_peers import Peers, by_card
from registry.digest import digest_of

DIMENSION, CARDS, INTENTS, DEVIATION = 16, 4, 3, 0.05


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing_peers, "MLP", replace(routing_peers.MLP, steps=200))


def unit(rows: np.ndarray) -> Vectors:
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def rows(each: int, seed: int) -> Rows:
    """`each` prompts around every intent's centre; the centres are the same for every seed."""
    centres = unit(np.random.default_rng(0).standard_normal((CARDS * INTENTS, DIMENSION)))
    noise = DEVIATION * np.random.default_rng(seed).standard_normal((len(centres), each, DIMENSION))
    intents = np.repeat([f"intent-{at}" for at in range(len(centres))], each)
    cards = np.repeat([f"card-{at // INTENTS}" for at in range(len(centres))], each)
    return Rows(vectors=unit(centres[:, None] + noise).reshape(-1, DIMENSION), cards=cards, intents=intents)


@pytest.fixture
def world() -> Material:
    random = np.random.default_rng(9)
    probe = unit(random.standard_normal((200, DIMENSION))).astype(np.float64)
    train, test = rows(40, 1), rows(10, 2)
    return Material(
        probe=Probe(
            embedder="synthetic",
            digest=digest_of(b"probe"),
            mean=probe.mean(axis=0),
            covariance=np.cov(probe.T, bias=True),
        ),
        train=train,
        val=rows(20, 3),
        test=test,
        out_of_scope=unit(random.standard_normal((50, DIMENSION))),
        banking_train=Rows(vectors=train.vectors, cards=train.intents, intents=train.intents),
        banking_test=Rows(vectors=test.vectors, cards=test.intents, intents=test.intents),
        phrases={f"card-{at}": test.vectors[test.cards == f"card-{at}"][:2] for at in range(CARDS)},
    )


def test_what_is_easy_is_solved_and_what_is_elsewhere_is_told_apart(world: Material) -> None:
    form = router(described(world.train, world.probe, with_intents=True, held_out=world.val))
    names, scores = decided(form, world.test.vectors)
    assert (names == world.test.cards).mean() > 0.99
    assert separated(scores, decided(form, world.out_of_scope)[1])["auroc"] > 99


@pytest.mark.parametrize("peer", ["one centroid per class", "nearest example", "logistic regression", "MLP head"])
def test_every_peer_learns_what_is_easy(world: Material, peer: str) -> None:
    scores = Peers(1e-5).all()[peer](world.train.vectors, world.train.intents)(world.test.vectors)
    names = np.unique(world.train.intents)
    assert scores.shape == (len(world.test), CARDS * INTENTS)
    assert (names[scores.argmax(axis=1)] == world.test.intents).mean() > 0.97


def test_a_card_scores_as_its_best_class() -> None:
    scores = np.array([[0.1, 0.7, 0.3], [0.5, 0.2, 0.4]])
    found = by_card(scores, ["x", "y", "z"], {"x": "b", "y": "a", "z": "b"})
    assert found.tolist() == [[0.7, 0.3], [0.2, 0.5]]


def test_rejections_count_rows_below_alpha(world: Material) -> None:
    cards = described(world.train, world.probe, held_out=world.val)
    inside, outside = (decided(router(cards), x) for x in (world.test.vectors, world.out_of_scope))
    found = routing.accepted(world, cards, inside, outside)["by_alpha"]
    assert set(found) == {"0.01", "0.05", "0.1"}
    shares = [found[alpha]["rejected_by_right_card"] for alpha in ("0.01", "0.05", "0.1")]
    assert shares == sorted(shares)
    assert shares[-1] < 30
    assert found["0.1"]["rejected_out_of_scope"] > 90


def test_clusters_are_within_cards(world: Material) -> None:
    clusters: Names = routing.clusters_by_card(world.train, 2)
    assert {len(set(clusters[world.train.cards == card])) for card in np.unique(world.train.cards)} == {2}


def test_a_peers_gap_is_what_it_never_learnt(world: Material) -> None:
    assert routing.gap_of_peer(Peers(1e-5).all()["nearest example"], world, "card-1") > 95


def test_a_cold_start_draws_by_seed(world: Material) -> None:
    first, same = (routing.cold_started(world, 3, Peers(1e-5, seed=1)) for _ in range(2))
    assert first == same
    assert set(first) == {
        f"{who}, {words}" for who in ["closed form", *Peers(0).all()] for words in ("alone", "described")
    }


def test_churn_is_exact_and_every_arrival_can_be_chosen(world: Material, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing_scale, "PRESENT", 90)
    monkeypatch.setattr(routing_scale, "CHANGES", 60)
    found = routing_scale.churn(world, seed=0)
    assert found["relative_error"] < 1e-8
    assert 0 < found["arrival_median_ms"] <= found["arrival_p99_ms"] <= found["arrival_max_ms"]
    assert found["arrivals_shortlisted"] > 90


def test_a_refit_that_differs_is_seen(world: Material) -> None:
    cards = described(world.train, world.probe)
    form = router(cards)
    form.remove("card-0")
    others = {name: card for name, card in cards.items() if name != "card-0"}
    x = world.test.vectors.astype(np.float64)
    assert routing_scale.refit_error(form, others, x) < 1e-9
    form.add("other", cards["card-0"])
    assert routing_scale.refit_error(form, others, x) > 1e-3


def test_many_cards_agree_with_the_exact_score(world: Material, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing_scale, "PROMPTS", 40)
    found = routing_scale.many_cards(world, 150, seed=0)
    assert found["agreement"] >= 95
    assert found["cards"] == 150


def test_exact_best_looks_at_every_batch_of_cards(world: Material, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing_scale, "KEYS_AT_ONCE", 3)
    cards = described(world.train, world.probe)
    found = routing_scale.exact_best(router(cards), list(cards), world.test.vectors.astype(np.float64))
    assert (np.array(found) == world.test.cards).mean() > 0.99


def test_vectors_are_kept_by_what_they_are_of(tmp_path: Path) -> None:
    class Counting:
        embedder, calls = "synthetic", 0

        def features(self, texts: list[str]) -> Features:
            self.calls += 1
            return Features(
                texts=tuple(texts), vectors=np.full((len(texts), 2), math.sqrt(0.5), np.float32), embedder="s"
            )

    featurizer = Counting()
    first, again = (embedded(featurizer, ["one", "two"], tmp_path) for _ in range(2))
    assert featurizer.calls == 1
    assert first.tolist() == again.tolist()
    embedded(featurizer, ["one", "three"], tmp_path)
    assert featurizer.calls == 2
