"""Cards that say nothing of themselves: when their weights are asked, and what is made of the answer."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest

from arrowmoe.routing import Policy, by_weights
from arrowmoe.routing.by_weights import ByWeights
from arrowmoe.routing.spectral import SpectralScorer
from tests.arrowmoe import tiny
from tests.arrowmoe.routing.topics import Card, router, statistics


class Says:
    """A scorer with one answer, that counts how often it is asked."""

    def __init__(self, digest: str, z: float) -> None:
        self.digest, self.z, self.asked = digest, z, 0

    def best(self, text: str, mask: Collection[str] | None) -> tuple[str, float] | None:
        self.asked += 1
        return (self.digest, self.z) if mask is None or self.digest in mask else None


def routes_with(scorer: Says) -> object:
    made = router(Policy(least_z=3.0))
    made.register_card(Card(digest="d0", name="east"), statistics(made, "east"))
    made.register_card(Card(digest="d1", name="silent"))
    made.by_weights = (scorer,)
    return made


def test_a_prompt_that_every_card_refuses_goes_where_weights_say() -> None:
    gates = routes_with(Says("d1", 3.5)).route_texts(["south 1"])
    assert gates.attribution(0) == {"silent": 1.0}
    best = gates.decisions[0].candidates[0]
    assert (best.evidence, best.score) == ("weights", 3.5)
    assert "by its weights, z 3.5 (asked 3)" in gates.decisions[0].why


def test_too_small_a_score_abstains() -> None:
    (decision,) = routes_with(Says("d1", 2.9)).route_texts(["south 1"]).decisions
    assert decision.abstained
    assert "silent by its weights, z 2.9" in decision.why


def test_weights_are_not_asked_where_a_card_accepts_or_the_mask_forbids() -> None:
    scorer = Says("d1", 9.0)
    routes = routes_with(scorer)
    assert routes.route_texts(["east 7"]).attribution(0) == {"east": 1.0}
    assert scorer.asked == 0
    assert routes.route(routes.features(["south 1"]), mask={"d0"}).decisions[0].abstained


def test_on_an_engine_it_is_the_spectral_score_of_the_bare_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = [f"w{index} w{63 - index}" for index in range(3, 40)]
    monkeypatch.setattr(by_weights, "sentences", lambda: probe)
    engine = tiny.llama_engine()
    cards = [tiny.card_for(engine, tmp_path, name, seed) for seed, name in enumerate(("one", "two"))]
    expected = SpectralScorer(tiny.llama_engine().base, cards, probe).scores(["w5 w9"])[0]
    engine.load_lora(cards[0])
    weigher = ByWeights(engine)
    assert weigher.best("w5 w9", None) is None
    weigher.keep(cards)
    digest, z = weigher.best("w5 w9", None)
    assert digest == cards[int(expected.argmax())].digest
    np.testing.assert_allclose(z, expected.max(), rtol=1e-4)
    weigher.keep(cards[:1])
    assert weigher.best("w5 w9", None)[0] == cards[0].digest
    assert weigher.best("w5 w9", {cards[1].digest}) is None
