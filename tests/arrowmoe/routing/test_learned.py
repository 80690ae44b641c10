"""A head as a router, held against a softmax written with loops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from arrowmoe.errors import RoutingError
from arrowmoe.features import Features
from arrowmoe.routing.heads import HeadConfig, RouterHead, SavedHead
from arrowmoe.routing.learned import HeadRouter
from arrowmoe.routing.policy import Policy

NAMES = ("a", "b", "c")


@dataclass(frozen=True, kw_only=True)
class Card:
    digest: str
    name: str
    base_name: str | None = "base"
    description: str = ""
    examples: tuple[str, ...] = ()


class Numbers:
    """Texts are seeds of vectors."""

    embedder = "numbers"

    def features(self, texts: Sequence[str]) -> Features:
        vectors = np.stack([np.random.default_rng(int(text)).normal(size=5) for text in texts]).astype(np.float32)
        return Features(texts=tuple(texts), vectors=vectors, embedder=self.embedder)


TEXTS = [str(seed) for seed in range(40)]
FEATURES = Numbers().features(TEXTS)


def saved(null: bool = False) -> SavedHead:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = RouterHead(HeadConfig(d_hidden=5, n_cards=3, width=8, null=null)).eval()
    with torch.no_grad():
        head.output.weight.mul_(8)
        head.output.bias.zero_()
    return SavedHead(head=head, names=NAMES, embedder="numbers")


def router(*names: str, null: bool = False, least: float = 0.0, policy: Policy | None = None) -> HeadRouter:
    cards = {name: Card(digest=f"digest of {name}", name=name) for name in names}
    return HeadRouter(Numbers(), saved(null), cards, policy=policy, least=least)


@torch.no_grad()
def plain(names: Sequence[str], null: bool = False) -> list[dict[str, float]]:
    """P of each name of `names` (and of none) for every text."""
    columns = [*NAMES, ""] if null else [*NAMES]
    rows = []
    for logits in saved(null).head(torch.from_numpy(FEATURES.vectors)).double().tolist():
        powers = {name: math.exp(z) for name, z in zip(columns, logits, strict=True) if name in (*names, "")}
        rows.append({name: power / sum(powers.values()) for name, power in powers.items()})
    return rows


@pytest.mark.parametrize("null", [False, True])
@pytest.mark.parametrize("names", [("a", "b", "c"), ("a", "c"), ("b",)])
def test_the_likeliest_card_that_is_here_is_chosen(names: tuple[str, ...], null: bool) -> None:
    gates = router(*names, null=null).route(FEATURES)
    chosen = set()
    for row, probs in enumerate(plain(names, null)):
        best = max(probs, key=probs.__getitem__)
        assert gates.attribution(row) == ({best: 1.0} if best else {})
        decision = gates.decisions[row]
        assert decision.abstained is (best == "")
        scores = {one.name: one.score for one in decision.candidates}
        assert scores == pytest.approx({name: probs[name] for name in names}, abs=1e-5)
        assert list(scores.values()) == sorted(scores.values(), reverse=True)
        chosen.add(best)
    assert len(chosen) == len(names) + null, "the texts ask for every card"


def test_a_mask_leaves_cards_out() -> None:
    masked = router("a", "b", "c").route(FEATURES, mask={"digest of a", "digest of c"})
    here = router("a", "c").route(FEATURES)
    assert [masked.attribution(row) for row in range(len(TEXTS))] == [
        here.attribution(row) for row in range(len(TEXTS))
    ]
    nothing = router("a").route(FEATURES, mask={"another"})
    assert nothing.adapters == ()
    assert {decision.why for decision in nothing.decisions} == {"no card that the head can name may be chosen"}


def test_below_the_least_probability_it_abstains_and_says_so() -> None:
    gates = router("a", "b", "c", least=0.7).route(FEATURES)
    best = [max(probs.values()) for probs in plain(NAMES)]
    assert [decision.abstained for decision in gates.decisions] == [value < 0.7 for value in best]
    assert 0 < sum(decision.abstained for decision in gates.decisions) < len(TEXTS)
    row = min(range(len(TEXTS)), key=best.__getitem__)
    assert gates.attribution(row) == {}
    assert f"{best[row]:.2f} (asked 0.70)" in gates.decisions[row].why


def test_several_cards_share_as_the_policy_says() -> None:
    gates = router("a", "b", "c", policy=Policy(mode="soft")).route(FEATURES)
    for row, probs in enumerate(plain(NAMES)):
        assert gates.attribution(row) == pytest.approx(probs, abs=1e-5)


def test_cards_of_the_base_are_known() -> None:
    cards = {"a": Card(digest="1", name="a", base_name="org/base"), "b": Card(digest="2", name="b", base_name=None)}
    assert HeadRouter(Numbers(), saved(), cards).for_base("base") == {"1"}


def test_a_head_that_does_not_fit_is_refused() -> None:
    other = SavedHead(head=saved().head, names=NAMES, embedder="other")
    with pytest.raises(RoutingError, match="expected a head for features by numbers, got one for other"):
        HeadRouter(Numbers(), other, {"a": Card(digest="1", name="a")})
    with pytest.raises(RoutingError, match="expected cards that the head names"):
        HeadRouter(Numbers(), saved(), {"d": Card(digest="1", name="d")})
