"""Arrow's prototypes against an SVD of the full product and against PEFT's own; its scores against plain loops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import ArrowConfig
from peft.tuners.lora.arrow import ArrowLoraLinearLayer
from torch import Tensor

from arrowmoe.routing.arrow_score import ArrowScorer, prototype
from evolution.gated import LowRank
from registry.card import LoRACard
from tests.arrowmoe import tiny
from tests.arrowmoe.routing.weights import TEXTS, card_reading, expected_means
from tests.peft_models import make_peft, tiny_bert, tiny_llama

MODELS = {"llama": tiny_llama, "bert": tiny_bert}


def random_weights(rank: int, d_in: int, d_out: int) -> tuple[Tensor, Tensor]:
    """A (rank, d_in) and B (d_out, rank)."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator)


def assert_same_direction(found: Tensor, expected: Tensor) -> None:
    """Equal up to sign."""
    torch.testing.assert_close(found * (found @ expected).sign(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rank", "d_in", "d_out"), [(1, 9, 7), (4, 48, 32), (8, 16, 40), (12, 9, 30), (12, 30, 5)])
@pytest.mark.parametrize("scaling", [2.0, -0.5])
def test_a_prototype_is_the_first_right_singular_vector_of_the_product(
    rank: int, d_in: int, d_out: int, scaling: float
) -> None:
    a, b = random_weights(rank, d_in, d_out)
    found = prototype(LowRank(a=a, b=b.T, scaling=scaling))
    assert found.shape == (1, d_in)
    assert_same_direction(found[0], torch.linalg.svd(b @ a).Vh[0])


def test_a_prototype_is_the_one_that_peft_computes() -> None:
    a, b = random_weights(8, 48, 32)
    config = ArrowConfig(rng_seed=0)
    config.task_adapter_names = []
    layer = ArrowLoraLinearLayer(48, config)
    expected = layer.top_right_singular_vec_from_BA(a, b, iters=500)
    assert_same_direction(prototype(LowRank(a=a, b=b.T, scaling=1.0))[0], expected)


def test_what_moves_nothing_has_no_direction() -> None:
    a, b = random_weights(4, 9, 7)
    assert not prototype(LowRank(a=a, b=torch.zeros_like(b).T, scaling=1.0)).any()


@pytest.mark.parametrize("model", MODELS)
def test_scores_are_mean_projections_on_the_prototypes(tmp_path: Path, model: str) -> None:
    cards = [card(tmp_path, seed, model) for seed in (1, 2)]
    scorer = ArrowScorer(tiny.base(MODELS[model]()), cards)

    def along_first(delta: Tensor, x: Tensor) -> Tensor:
        return torch.abs(torch.linalg.svd(delta).Vh[0] @ x)

    expected = np.stack([expected_means(MODELS[model](), one, TEXTS, along_first) for one in cards], axis=1)
    np.testing.assert_allclose(scorer.scores(TEXTS), expected, rtol=1e-3)
    assert scorer.digests == tuple(one.digest for one in cards)


def test_the_card_that_reads_a_text_scores_highest_on_it() -> None:
    words = ["w5", "w17", "w42"]
    cards = [card_reading(tiny_llama(), word, word) for word in words]
    assert ArrowScorer(tiny.base(tiny_llama()), cards).scores(words).argmax(axis=1).tolist() == [0, 1, 2]


def test_cards_come_and_go(tmp_path: Path) -> None:
    one, two, three = (card(tmp_path, seed) for seed in (1, 2, 3))
    scorer = ArrowScorer(tiny.base(tiny_llama()), [one, two])
    scorer.add(three)
    assert (scorer.remove(two.digest), scorer.remove(two.digest)) == (True, False)
    afresh = ArrowScorer(tiny.base(tiny_llama()), [one, three])
    assert scorer.digests == afresh.digests
    np.testing.assert_allclose(scorer.scores(TEXTS), afresh.scores(TEXTS), rtol=1e-5)


def card(directory: Path, seed: int, model: str = "llama") -> LoRACard:
    return LoRACard.from_peft(make_peft(MODELS[model](), directory / f"card{seed}", seed=seed), base_name="tiny")
