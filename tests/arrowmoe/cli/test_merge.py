"""`skills merge`: what is published, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from registry.card import LoRACard
from registry.store import Registry
from registry.tensor import Role
from tests.arrowmoe.cli.conftest import Cli
from tests.registry.cards import small_card, statistics

MODULE = "model.layers.0.mlp.up_proj"


@pytest.fixture
def parents(home: Path) -> list[LoRACard]:
    cards = [small_card("dates", seed=1, description="Dates"), small_card("units", seed=2, description="Units", rank=2)]
    with Registry.open(home) as registry:
        for card in cards:
            registry.publish(card)
        return [registry.get(card.name) for card in cards]


def delta(card: LoRACard) -> np.ndarray:
    tensors, spec = card.modules[MODULE], card.manifest.adapter
    alpha = spec.alpha_pattern.get(MODULE, spec.alpha)
    a, b = tensors[Role.A].float32(), tensors[Role.B].float32()
    return np.asarray(alpha / a.shape[0] * b @ a)


def test_the_sum_is_published_as_a_signed_card_with_its_parents(cli: Cli, home: Path, parents: list[LoRACard]) -> None:
    done = cli("skills", "merge", "dates", "units", "--weights", "-0.5,2", "--name", "both", "--json").json
    assert (done["name"], done["version"], done["rank"]) == ("both", "1", 6)
    assert done["description"] == "Dates; Units"
    assert done["parents"] == [card.digest for card in parents]
    assert done["merge"] == {"method": "concat", "weights": [-0.5, 2.0], "error": 0.0}
    with Registry.open(home) as registry:
        card = registry.get("both", verify=True)
        assert card.manifest.publisher == registry.identity.id
    np.testing.assert_allclose(delta(card), -0.5 * delta(parents[0]) + 2 * delta(parents[1]), atol=1e-4)
    assert card.manifest.parents == tuple(one.digest for one in parents)


def test_it_tells_the_error_and_the_rank(cli: Cli, parents: list[LoRACard]) -> None:
    args = ["--method", "svd", "--rank", "3", "--name", "small", "--version", "2", "--description", "Both"]
    done = cli("skills", "merge", "dates", "units", *args)
    assert done.code == 0, done.err
    assert "merged 2 into small@2" in done.out
    assert "(rank 3," in done.out
    assert "relative error 0." in done.out
    assert "by svd" in done.out


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_ties_and_dare_take_a_density(cli: Cli, parents: list[LoRACard], method: str) -> None:
    args = ["--method", method, "--density", "0.5", "--energy", "0.9", "--name", method]
    merged = cli("skills", "merge", "dates", "units", *args, "--json").json["merge"]
    assert (merged["method"], merged["density"], merged["energy"]) == (method, 0.5, 0.9)
    assert 0 < merged["error"] < np.sqrt(0.1)


def test_lost_statistics_are_told(cli: Cli, home: Path) -> None:
    with Registry.open(home) as registry:
        spec, tensors = statistics()
        registry.publish(small_card("known").with_routing(spec, tensors))
    done = cli("skills", "merge", "known", "--name", "alone")
    assert done.code == 0
    assert "skills describe alone" in done.err


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["--weights", "1"], 2, "a weight for each of 2 cards, got 1"),
        (["--weights", "1,much"], 2, "numbers with commas between"),
        (["--weights", "1,0"], 1, "finite and not zero"),
        (["--method", "svd"], 1, "a rank or an energy for svd"),
        (["--method", "mean"], 2, "mean"),
    ],
)
def test_what_makes_no_sense_is_refused(
    cli: Cli, parents: list[LoRACard], args: list[str], code: int, said: str
) -> None:
    done = cli("skills", "merge", "dates", "units", "--name", "both", *args)
    assert done.code == code
    assert said in " ".join(done.err.split())
    assert cli("skills", "ls", "--name", "both", "--json").json == []
