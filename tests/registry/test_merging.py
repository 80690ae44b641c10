"""Merging cards, against formulas in plain numpy and against PEFT where PEFT is right."""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.card import LoRACard
from registry.errors import MergeError
from registry.format import LoRAFormat
from registry.identity import Identity
from registry.manifest import AdapterSpec
from registry.merging import Merge, merge
from registry.tensor import Role, Tensor
from tests.peft_models import load_peft, make_peft, outputs, tiny_gpt2, tiny_llama
from tests.registry.cards import small_card, statistics

Array = npt.NDArray[np.float64]
ONE, TWO = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"
SCALED_CARDS: Mapping[str, dict[str, Any]] = {
    "lora": {"rank": 4, "alpha": 8.0},
    "rslora": {"rank": 4, "alpha": 8.0, "scaling": "rslora"},
    "patterns": {"rank": 4, "alpha": 3.0, "rank_pattern": {ONE: 2}, "alpha_pattern": {TWO: 7.0}},
    "rslora patterns": {"rank": 3, "rank_pattern": {ONE: 5}, "alpha_pattern": {ONE: 2.0}, "scaling": "rslora"},
    "bfloat16": {"rank": 2, "dtype": "bfloat16"},
    "float16": {"rank": 2, "dtype": "float16"},
}


def delta(card: LoRACard, module: str) -> Array:
    """alpha / r · B A, or alpha / √r · B A for rsLoRA (arXiv:2312.03732)."""
    if module not in card.modules:
        return np.zeros((6, 8))
    a, b = (card.modules[module][role].float32().astype(np.float64) for role in (Role.A, Role.B))
    spec = card.manifest.adapter
    alpha, rank = spec.alpha_pattern.get(module, spec.alpha), a.shape[0]
    scaling = alpha / sqrt(rank) if spec.scaling == "rslora" else alpha / rank
    return np.asarray(scaling * b @ a)


def weighted(shares: list[tuple[LoRACard, float]], module: str) -> Array:
    return np.asarray(sum(weight * delta(card, module) for card, weight in shares))


def distance(found: Array, wanted: Array) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def of_merge(card: LoRACard) -> Any:
    return card.manifest.training["merge"]


@pytest.mark.parametrize("first", SCALED_CARDS)
@pytest.mark.parametrize("second", SCALED_CARDS)
def test_concatenation_is_the_weighted_sum_for_every_scaling_rule(first: str, second: str) -> None:
    shares = [
        (small_card("a", seed=1, **SCALED_CARDS[first]), 0.7),
        (small_card("b", seed=2, **SCALED_CARDS[second]), -1.3),
    ]
    merged = merge(shares, Merge(), name="both")
    for module in (ONE, TWO):
        assert distance(delta(merged, module), weighted(shares, module)) < 1e-6
        ranks = [card.manifest.adapter.rank_of(module) for card, _ in shares]
        assert merged.manifest.adapter.rank_of(module) == sum(ranks)
    assert of_merge(merged) == {"method": "concat", "weights": [0.7, -1.3], "error": 0.0}


@settings(max_examples=25)
@given(
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.1, 3) | st.floats(-3, -0.1), min_size=4, max_size=4),
)
def test_svd_without_a_loss_is_the_weighted_sum(ranks: list[int], weights: list[float]) -> None:
    shares = [(small_card(f"c{i}", seed=i, rank=r), w) for i, (r, w) in enumerate(zip(ranks, weights, strict=False))]
    merged = merge(shares, Merge(method="svd", rank=99), name="all")
    for module in (ONE, TWO):
        assert distance(delta(merged, module), weighted(shares, module)) < 1e-5
        assert merged.manifest.adapter.rank_of(module) == min(sum(ranks), 6)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_the_error_of_svd_is_the_discarded_energy(rank: int) -> None:
    shares = [(small_card("a", seed=1), 1.0), (small_card("b", seed=2, rank=2, scaling="rslora"), 0.5)]
    merged = merge(shares, Merge(method="svd", rank=rank), name="both")
    discarded = total = 0.0
    for module in (ONE, TWO):
        energies = np.linalg.svd(weighted(shares, module), compute_uv=False) ** 2
        discarded, total = discarded + energies[rank:].sum(), total + energies.sum()
        missed = np.linalg.norm(delta(merged, module) - weighted(shares, module)) ** 2
        assert missed == pytest.approx(energies[rank:].sum(), rel=1e-4)
    assert of_merge(merged)["error"] == pytest.approx(sqrt(discarded / total), rel=1e-6)
    assert of_merge(merged)["rank"] == rank


@pytest.mark.parametrize("energy", [0.3, 0.8, 0.99, 1.0])
def test_an_energy_keeps_as_few_singular_values_as_hold_it(energy: float) -> None:
    shares = [(small_card("a", seed=1), 1.0), (small_card("b", seed=2), 1.0)]
    merged = merge(shares, Merge(method="svd", energy=energy), name="both")
    for module in (ONE, TWO):
        energies = np.linalg.svd(weighted(shares, module), compute_uv=False) ** 2
        rank = merged.manifest.adapter.rank_of(module)
        assert energies[:rank].sum() >= energy * energies.sum() * (1 - 1e-9)
        assert energies[: rank - 1].sum() < energy * energies.sum()


def test_ties_trims_elects_and_averages() -> None:
    shares = [(small_card(f"c{i}", seed=i), weight) for i, weight in enumerate((1.0, 1.0, 0.6))]
    merged = merge(shares, Merge(method="ties", density=0.4, rank=6), name="all")
    for module in (ONE, TWO):
        trimmed = []
        for card, weight in shares:
            values = weight * delta(card, module)
            smallest_kept = np.sort(np.abs(values).ravel())[-int(0.4 * values.size)]
            trimmed.append(np.where(np.abs(values) >= smallest_kept, values, 0))
        expected = np.zeros((6, 8))
        for place in np.ndindex(6, 8):
            elements = [one[place] for one in trimmed]
            agreeing = [x for x in elements if x * sum(elements) > 0]
            expected[place] = sum(agreeing) / len(agreeing) if agreeing else 0
        assert distance(delta(merged, module), expected) < 1e-5


def test_a_low_rank_of_a_wide_matrix_is_cut_as_a_whole_decomposition_would() -> None:
    card = small_card("a", seed=1, rank=8, modules={ONE: (90, 70)})
    whole = merge([(card, 1.0)], Merge(method="ties", density=0.3, energy=1.0), name="whole")
    assert whole.manifest.adapter.rank > 60
    cut = merge([(card, 1.0)], Merge(method="ties", density=0.3, rank=5), name="cut")
    u, singular, vt = np.linalg.svd(delta(whole, ONE))
    assert distance(delta(cut, ONE), (u[:, :5] * singular[:5]) @ vt[:5]) < 1e-5
    assert of_merge(cut)["error"] == pytest.approx(sqrt((singular[5:] ** 2).sum() / (singular**2).sum()), rel=1e-5)


def test_a_rank_above_what_there_is_loses_nothing() -> None:
    card = small_card("a", seed=1, rank=2, modules={ONE: (90, 70)})
    merged = merge([(card, 1.0)], Merge(method="ties", density=1.0, rank=6), name="whole")
    assert distance(delta(merged, ONE), delta(card, ONE)) < 1e-5
    assert of_merge(merged)["error"] < 1e-3


def test_a_card_that_does_nothing_merges_to_one() -> None:
    silent = small_card("a", alpha=0.0, modules={ONE: (90, 70)})
    for how in (Merge(), Merge(method="svd", energy=0.9), Merge(method="ties", density=0.3, rank=5)):
        merged = merge([(silent, 1.0)], how, name="silent")
        assert not delta(merged, ONE).any()
        assert of_merge(merged)["error"] == 0


def test_ties_of_a_card_with_itself_scaled_is_the_trimmed_mean() -> None:
    card = small_card("a", seed=1)
    merged = merge([(card, 1.0), (card.describe(name="b"), 3.0)], Merge(method="ties", density=1.0, rank=6), name="c")
    assert distance(delta(merged, ONE), 2 * delta(card, ONE)) < 1e-5


def test_dare_drops_rescales_and_is_the_same_for_one_seed() -> None:
    card = small_card("a", seed=1, rank=2, modules={ONE: (80, 60)})
    how = Merge(method="dare", density=0.25, rank=60, seed=5)
    merged = merge([(card, 2.0)], how, name="less")
    ratio = delta(merged, ONE) / (2 * delta(card, ONE))
    stays = np.abs(ratio) > 2
    np.testing.assert_allclose(ratio[stays], 4, rtol=2e-2)
    np.testing.assert_allclose((delta(merged, ONE) * ~stays), 0, atol=1e-3)
    assert stays.mean() == pytest.approx(0.25, abs=0.03)
    again, other = (
        merge([(card, 2.0)], how, name="less"),
        merge([(card, 2.0)], Merge(**vars(how) | {"seed": 6}), name="l"),
    )
    assert [one.data for one in again.tensors] == [one.data for one in merged.tensors]
    assert delta(other, ONE) != pytest.approx(delta(merged, ONE))
    assert of_merge(merged)["seed"] == 5


def test_dare_keeps_the_sum_on_average() -> None:
    shares = [(small_card("a", seed=1), 0.5), (small_card("b", seed=2), 0.5)]
    made = [merge(shares, Merge(method="dare", density=0.5, rank=6, seed=seed), name="x") for seed in range(300)]
    mean = np.mean([delta(card, ONE) for card in made], axis=0)
    assert distance(mean, weighted(shares, ONE)) < 0.1


def test_dare_draws_anew_for_each_card_and_module() -> None:
    same: dict[str, Any] = {"seed": 1, "modules": {ONE: (40, 30), TWO: (40, 30)}}
    how = Merge(method="dare", density=0.5, rank=30)
    shares = [(small_card("a", **same), 1.0), (small_card("b", **same), 1.0)]
    merged = merge(shares, how, name="x")
    counts = np.rint(delta(merged, ONE) / (2 * delta(shares[0][0], ONE)))
    assert {0, 1, 2} == set(counts.ravel()), "one mask for both cards would leave no 1"
    first, second = (np.abs(delta(merged, module)) > 1e-3 for module in (ONE, TWO))
    assert (first != second).any()


def test_linear_of_different_ranks_adds_padded_factors_and_tells_its_cross_terms() -> None:
    shares = [(small_card("a", seed=1, rank=4), 0.5), (small_card("b", seed=2, rank=2, scaling="rslora"), -0.5)]
    merged = merge(shares, Merge(method="linear"), name="both")
    missed = total = 0.0
    for module in (ONE, TWO):
        a, b = np.zeros((4, 8)), np.zeros((6, 4))
        for card, factor in ((shares[0][0], 0.5 * 2), (shares[1][0], -0.5 * 8 / sqrt(2))):
            rank = card.manifest.adapter.rank
            a[:rank] += sqrt(abs(factor)) * card.modules[module][Role.A].float32()
            b[:, :rank] += np.sign(factor) * sqrt(abs(factor)) * card.modules[module][Role.B].float32()
        assert distance(delta(merged, module), b @ a) < 1e-6
        missed += float(np.linalg.norm(b @ a - weighted(shares, module))) ** 2
        total += float(np.linalg.norm(weighted(shares, module))) ** 2
    assert of_merge(merged)["error"] == pytest.approx(sqrt(missed / total), rel=1e-6)


@pytest.mark.parametrize(
    ("method", "theirs"), [("concat", {"combination_type": "cat"}), ("linear", {"combination_type": "linear"})]
)
@pytest.mark.parametrize("base", [tiny_llama, tiny_gpt2])
def test_plain_loras_merge_as_in_peft(method: Any, theirs: dict[str, Any], base: Any, tmp_path: Path) -> None:
    model, shares = base(), []
    for row, weight in enumerate((0.6, 0.9)):
        directory = make_peft(model, tmp_path / f"c{row}", seed=row)
        shares.append((LoRACard.from_peft(directory), weight))
    theirs_model = load_peft(model, tmp_path / "c0")
    theirs_model.load_adapter(str(tmp_path / "c1"), "c1", autocast_adapter_dtype=False)
    theirs_model.add_weighted_adapter(["default", "c1"], [0.6, 0.9], "both", **theirs)
    theirs_model.set_adapter("both")
    merged = merge(shares, Merge(method=method), name="both")
    merged.to_peft(tmp_path / "out")
    torch.testing.assert_close(outputs(load_peft(model, tmp_path / "out")), outputs(theirs_model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("base", [tiny_llama, tiny_gpt2])
def test_an_exact_merge_does_in_peft_what_both_adapters_do_at_once(base: Any, tmp_path: Path) -> None:
    """rsLoRA, patterns, embeddings and Conv1D together, where PEFT's add_weighted_adapter is wrong or refuses."""
    model = base()
    embedding, layer = ("embed_tokens", "q_proj") if base is tiny_llama else ("wte", "c_attn")
    kinds: list[dict[str, Any]] = [
        {"use_rslora": True, "target_modules": [layer, embedding]},
        {"r": 3, "rank_pattern": {layer: 2}, "alpha_pattern": {embedding: 5}, "target_modules": [layer, embedding]},
    ]
    for row, kind in enumerate(kinds):
        make_peft(model, tmp_path / f"c{row}", seed=row, **kind)
    both = load_peft(model, tmp_path / "c0")
    both.load_adapter(str(tmp_path / "c1"), "c1", autocast_adapter_dtype=False)
    both.base_model.set_adapter(["default", "c1"])
    shares = [(without_whole_parameters(LoRACard.from_peft(tmp_path / f"c{row}")), 1.0) for row in range(2)]
    merge(shares, Merge(), name="both").to_peft(tmp_path / "out")
    merged = load_peft(model, tmp_path / "out")
    torch.testing.assert_close(outputs(merged), outputs(both.eval()), rtol=1e-5, atol=1e-5)


def without_whole_parameters(card: LoRACard) -> LoRACard:
    """The adapter as PEFT's `save_pretrained(…, save_embedding_layers=False)` would have it."""
    adapters = [tensor for tensor in card.tensors if tensor.role is not Role.FULL]
    return LoRACard.build(name=card.name, adapter=card.manifest.adapter, tensors=adapters, base_name=card.base_name)


def test_modules_of_only_one_card_count_as_zero_in_the_others() -> None:
    shares = [(small_card("a", seed=1, modules=2), 1.0), (small_card("b", seed=2, modules=1, rank=2), 1.0)]
    merged = merge(shares, Merge(), name="both")
    spec = merged.manifest.adapter
    assert (spec.rank_of(ONE), spec.rank_of(TWO)) == (6, 4)
    for module in (ONE, TWO):
        assert distance(delta(merged, module), weighted(shares, module)) < 1e-6
    assert merged.manifest.base.fingerprint == shares[0][0].manifest.base.fingerprint


@pytest.mark.parametrize(
    "how",
    [
        Merge(),
        Merge(method="linear"),
        Merge(method="svd", rank=2),
        Merge(method="ties", density=0.5, energy=0.9),
        Merge(method="dare", density=0.5, rank=3),
    ],
)
def test_a_merged_card_verifies_and_comes_back_from_its_file(how: Merge, tmp_path: Path) -> None:
    parents = [small_card("a", seed=1), small_card("b", seed=2, rank=3)]
    card = merge([(one, 0.5) for one in parents], how, name="both").signed(Identity.generate())
    LoRAFormat.save(card, tmp_path / "both.lora.arrow")
    back = LoRAFormat.load(tmp_path / "both.lora.arrow", verify=True)
    assert back == card
    assert back.manifest.parents == tuple(one.digest for one in parents)
    assert of_merge(back)["method"] == how.method
    assert of_merge(back)["weights"] == [0.5, 0.5]
    back.to_peft(tmp_path / "out")
    again = LoRACard.from_peft(tmp_path / "out")
    assert [(one.name, one.role, one.data) for one in again.tensors] == [
        (one.name, one.role, one.data) for one in back.tensors
    ]
    assert delta(again, ONE) == pytest.approx(delta(back, ONE))


def test_a_merged_card_says_what_its_parents_say() -> None:
    spec, tensors = statistics()
    one = small_card("a", seed=1, description="Dates", domains=["x", "y"], examples=["p"], licence="MIT")
    two = small_card(
        "b", seed=2, domains=["y", "z"], examples=["p", "q"], licence="GPL-2.0-only OR MIT", base_name=None
    )
    manifest = merge([(one.with_routing(spec, tensors), 1.0), (two, 1.0)], Merge(), name="both", version="7").manifest
    assert (manifest.name, manifest.version, manifest.description) == ("both", "7", "Dates")
    assert (manifest.domains, manifest.examples) == (("x", "y", "z"), ("p", "q"))
    assert manifest.licence == "MIT AND (GPL-2.0-only OR MIT)"
    assert (manifest.base.name, manifest.base.architecture) == ("tiny-llama", "LlamaForCausalLM")
    assert manifest.routing is None


def full_card() -> LoRACard:
    tensors = [*small_card(modules=1).tensors, Tensor.from_numpy("head.weight", Role.FULL, np.ones(3, np.float32))]
    return LoRACard.build(name="full", adapter=small_card(modules=1).manifest.adapter, tensors=tensors)


def embedding_card() -> LoRACard:
    card = small_card(modules=1)
    spec = AdapterSpec(rank=4, alpha=8.0, target_modules=(ONE,), embeddings=(ONE,))
    return LoRACard.build(name="embedding", adapter=spec, tensors=card.tensors)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (small_card("b", dora=True), "'b' cannot be merged: DoRA's magnitude"),
        (small_card("b", bias=True), "'b' cannot be merged: its biases"),
        (full_card(), "'full' cannot be merged: it replaces whole parameters.*head.weight"),
        (small_card("b", base_name="other"), "one base model, got tiny-llama, other"),
        (small_card("b", base_architecture="Bert"), "one architecture, got LlamaForCausalLM, Bert"),
        (small_card("b", modules={ONE: (9, 6)}), "expected linear 8 → 6 .* got linear 9 → 6"),
        (embedding_card(), "expected linear 8 → 6 .* got embedding 8 → 6"),
        (small_card("b", modules={"layers.0.mlp.up_proj": (8, 6)}), "'layers.0.mlp.up_proj', another 'model.layers"),
        (small_card("a"), "'a' stands twice"),
    ],
)
def test_what_is_not_a_sum_of_adapters_is_refused_by_name(other: LoRACard, said: str) -> None:
    with pytest.raises(MergeError, match=said):
        merge([(small_card("a"), 1.0), (other, 1.0)], Merge(), name="both")


@pytest.mark.parametrize("weight", [0.0, float("nan"), float("inf")])
def test_a_weight_that_does_nothing_or_everything_is_refused(weight: float) -> None:
    with pytest.raises(MergeError, match="finite and not zero"):
        merge([(small_card(), weight)], Merge(), name="x")


def test_no_cards_are_refused() -> None:
    with pytest.raises(MergeError, match="at least one card"):
        merge([], Merge(), name="x")


def test_ties_of_a_module_too_large_to_multiply_out_is_refused() -> None:
    card = small_card(rank=1, modules={"lm_head": (8192, 8193)})
    with pytest.raises(MergeError, match="'lm_head': expected at most 67108864 elements for ties"):
        merge([(card, 1.0)], Merge(method="ties", density=0.5, rank=1), name="x")
    assert merge([(card, 1.0)], Merge(method="svd", rank=1), name="x").manifest.adapter.rank == 1


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"method": "mean"}, "expected a method of concat, svd"),
        ({"method": "svd"}, "a rank or an energy for svd"),
        ({"method": "svd", "rank": 2, "energy": 0.5}, "a rank or an energy for svd"),
        ({"rank": 2}, "neither rank nor energy for concat"),
        ({"method": "ties", "rank": 2}, "a density for ties"),
        ({"method": "svd", "rank": 2, "density": 0.5}, "no density for svd"),
        ({"method": "svd", "rank": 0}, "rank of at least 1"),
        ({"method": "svd", "energy": 1.5}, "energy above 0 and at most 1"),
        ({"method": "dare", "rank": 2, "density": 0.0}, "density above 0 and at most 1"),
        ({"seed": -1}, "seed of at least 0"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(MergeError, match=said):
        Merge(**wrong)


@pytest.mark.parametrize(
    "how", [Merge(), Merge(method="linear"), Merge(method="svd", rank=1), Merge(method="ties", density=1.0, rank=1)]
)
def test_weights_that_overflow_are_refused(how: Merge) -> None:
    tensors = [Tensor.from_numpy(ONE, Role.A, np.full((1, 8), 3e38, np.float32))]
    tensors.append(Tensor.from_numpy(ONE, Role.B, np.full((6, 1), 3e38, np.float32)))
    card = LoRACard.build(name="huge", adapter=AdapterSpec(rank=1, alpha=9.0, target_modules=(ONE,)), tensors=tensors)
    with pytest.raises(MergeError, match="too large to be added up"):
        merge([(card, 1.0)], how, name="x")
