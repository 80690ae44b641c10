"""Spectral scores against ‖s B A x‖ with the full product, module by module and token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from arrowmoe.engine import ArrowEngine
from arrowmoe.errors import AdapterMismatchError, RoutingError
from arrowmoe.routing.gates import Gates
from arrowmoe.routing.spectral import SpectralScorer, low_rank_core, matrices_of, mean_norms
from registry.card import LoRACard
from tests.arrowmoe import tiny
from tests.arrowmoe.routing.weights import PROBES, TEXTS, card_reading, expected_means
from tests.peft_models import make_peft, tiny_bert, tiny_gpt2, tiny_llama

MODELS = {"llama": tiny_llama, "bert": tiny_bert, "gpt2": tiny_gpt2}
CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True, "r": 8},
    "wide": {"r": 24},
    "bias": {"bias": "lora_only"},
}


def moved(delta: Tensor, x: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(delta @ x)
    return length


def expected_norms(model: PreTrainedModel, card: LoRACard, texts: list[str] = TEXTS) -> npt.NDArray[np.float32]:
    return expected_means(model, card, texts, moved)


def card(directory: Path, seed: int = 1, model: PreTrainedModel | None = None, **config: Any) -> LoRACard:
    path = make_peft(model or tiny_llama(), directory / f"card{seed}", seed=seed, **config)
    return LoRACard.from_peft(path, base_name="tiny")


def norms(model: PreTrainedModel, *cards: LoRACard, texts: list[str] = TEXTS) -> npt.NDArray[np.float32]:
    base = tiny.base(model)
    found: npt.NDArray[np.float32] = mean_norms(
        base, [matrices_of(base, each, low_rank_core) for each in cards], texts
    ).numpy()
    return found


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("config", CONFIGS)
def test_norms_equal_the_full_product(tmp_path: Path, model: str, config: str) -> None:
    base = MODELS[model]()
    one = card(tmp_path, model=base, **CONFIGS[config])
    np.testing.assert_allclose(norms(base, one)[:, 0], expected_norms(base, one), rtol=1e-4)


def test_each_module_has_its_own_rank_and_scaling(tmp_path: Path) -> None:
    one = card(tmp_path, rank_pattern={"q_proj": 2}, alpha_pattern={"o_proj": 9})
    np.testing.assert_allclose(norms(tiny_llama(), one)[:, 0], expected_norms(tiny_llama(), one), rtol=1e-4)


@pytest.mark.parametrize("model", ["llama", "bert"])
def test_of_dora_the_low_rank_term_counts(tmp_path: Path, model: str) -> None:
    base = MODELS[model]()
    one = card(tmp_path, model=base, use_dora=True)
    np.testing.assert_allclose(norms(base, one)[:, 0], expected_norms(base, one), rtol=1e-4)


def test_cards_of_different_ranks_and_modules_share_a_pass(tmp_path: Path) -> None:
    cards = [
        card(tmp_path, 1, r=2),
        card(tmp_path, 2, r=7, target_modules=["down_proj"]),
        card(tmp_path, 3, target_modules=["q_proj", "down_proj"]),
    ]
    expected = np.stack([expected_norms(tiny_llama(), each) for each in cards], axis=1)
    np.testing.assert_allclose(norms(tiny_llama(), *cards), expected, rtol=1e-4)


def test_many_texts_come_back_in_their_order(tmp_path: Path) -> None:
    texts = [" ".join(f"w{3 + (row + word) % 60}" for word in range(1 + row % 5)) for row in range(70)]
    one = card(tmp_path)
    np.testing.assert_allclose(
        norms(tiny_llama(), one, texts=texts)[:, 0], expected_norms(tiny_llama(), one, texts), rtol=1e-4
    )


@pytest.mark.parametrize("silent", ["embed_tokens", "lm_head"])
def test_embeddings_and_the_head_take_no_part(tmp_path: Path, silent: str) -> None:
    one = card(tmp_path, target_modules=["q_proj", silent])
    np.testing.assert_allclose(norms(tiny_llama(), one)[:, 0], expected_norms(tiny_llama(), one), rtol=1e-4)


def test_empty_texts_have_norm_zero(tmp_path: Path) -> None:
    one = card(tmp_path)
    found = norms(tiny_llama(), one, texts=["", "w9"])[:, 0]
    np.testing.assert_allclose(found, [0, *expected_norms(tiny_llama(), one, ["w9"])], rtol=1e-4)
    assert norms(tiny_llama(), one, texts=["", ""]).tolist() == [[0.0], [0.0]]
    assert norms(tiny_llama(), texts=["w9"]).shape == (1, 0)


def test_scores_are_z_scores_on_the_probe_texts(tmp_path: Path) -> None:
    cards = [card(tmp_path, seed) for seed in (1, 2)]
    scorer = SpectralScorer(tiny.base(tiny_llama()), cards, PROBES)
    for column, one in enumerate(cards):
        usual = expected_norms(tiny_llama(), one, PROBES)
        expected = (expected_norms(tiny_llama(), one) - usual.mean()) / usual.std(ddof=1)
        np.testing.assert_allclose(scorer.scores(TEXTS)[:, column], expected, rtol=2e-3, atol=1e-3)
    assert scorer.digests == tuple(one.digest for one in cards)
    assert scorer.scores(TEXTS).dtype == np.float32


def test_a_large_adapter_is_not_favoured(tmp_path: Path) -> None:
    small, large = card(tmp_path, 1, lora_alpha=1), card(tmp_path / "large", 1, lora_alpha=100)
    assert (norms(tiny_llama(), large) > 50 * norms(tiny_llama(), small)).all()
    scores = SpectralScorer(tiny.base(tiny_llama()), [small, large], PROBES).scores(TEXTS)
    np.testing.assert_allclose(scores[:, 0], scores[:, 1], atol=1e-3)


def test_the_card_that_reads_a_text_scores_highest_on_it() -> None:
    words = ["w5", "w17", "w42"]
    cards = [card_reading(tiny_llama(), word, word) for word in words]
    scorer = SpectralScorer(tiny.base(tiny_llama()), cards, [f"w{index}" for index in range(3, 64)])
    assert scorer.scores(words).argmax(axis=1).tolist() == [0, 1, 2]


def test_cards_come_and_go(tmp_path: Path) -> None:
    one, two, three = (card(tmp_path, seed) for seed in (1, 2, 3))
    scorer = SpectralScorer(tiny.base(tiny_llama()), [one, two], PROBES)
    scorer.add(three, one)
    assert (scorer.remove(two.digest), scorer.remove(two.digest)) == (True, False)
    assert scorer.digests == (one.digest, three.digest)
    afresh = SpectralScorer(tiny.base(tiny_llama()), [one, three], PROBES)
    np.testing.assert_allclose(scorer.scores(TEXTS), afresh.scores(TEXTS), rtol=1e-4, atol=1e-5)


def test_a_scorer_may_start_empty() -> None:
    assert SpectralScorer(tiny.base(tiny_llama()), [], PROBES).scores(TEXTS).shape == (4, 0)


def test_a_card_that_moves_nothing_is_refused_with_all_that_came_with_it(tmp_path: Path) -> None:
    scorer = SpectralScorer(tiny.base(tiny_llama()), [], PROBES)
    untrained = card(tmp_path, 2, scale=0.0)
    with pytest.raises(RoutingError, match=f"{untrained.name}.*moves all probe texts alike"):
        scorer.add(card(tmp_path, 1), untrained)
    assert scorer.digests == ()


def test_a_card_for_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterMismatchError):
        SpectralScorer(tiny.base(tiny_llama()), [card(tmp_path, model=tiny_gpt2())], PROBES)


def test_one_probe_text_is_too_few() -> None:
    with pytest.raises(RoutingError, match="at least 2 different probe texts, got 1"):
        SpectralScorer(tiny.base(tiny_llama()), [], ["w3", "w3"])


def test_adapters_that_an_engine_holds_change_nothing(tmp_path: Path) -> None:
    one, loaded = card(tmp_path, 1), card(tmp_path, 2)
    expected = SpectralScorer(tiny.base(tiny_llama()), [one], PROBES).scores(TEXTS)
    engine = ArrowEngine(tiny.base(tiny_llama()))
    for each in (one, loaded):
        engine.load_lora(each)
    with engine.computing(Gates.of([], {})):
        found = SpectralScorer(engine.base, [one], PROBES).scores(TEXTS)
    np.testing.assert_array_equal(found, expected)


def test_no_hook_stays_behind(tmp_path: Path) -> None:
    base = tiny.base(tiny_llama())
    SpectralScorer(base, [card(tmp_path)], PROBES).scores(TEXTS)
    assert not any(module._forward_pre_hooks for module in base.model.modules())


def test_a_module_whose_rows_cannot_be_told_apart_is_named(tmp_path: Path) -> None:
    class Flattened(nn.Module):
        """Computes tokens in one row, as a mixture of experts does."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.inner(x.reshape(-1, x.shape[-1]))
            return y.view(*x.shape)

    model = tiny_llama()
    model.model.layers[0].mlp = Flattened(model.model.layers[0].mlp)
    one = card(tmp_path, model=model, target_modules=["up_proj"])
    with pytest.raises(RoutingError, match=r"layers\.0\.mlp\.inner\.up_proj.*rows cannot be told apart"):
        norms(model, one)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_core_has_the_size_of_a(tmp_path: Path) -> None:
    base = tiny.base(tiny_llama())
    shapes = {core.shape for core in matrices_of(base, card(tmp_path, r=3), low_rank_core).values()}
    assert shapes == {torch.Size((3, 16)), torch.Size((3, 32))}
