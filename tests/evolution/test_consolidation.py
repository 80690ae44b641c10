"""A task's end: what the slow pair takes over, what a cut costs, and what a card of it is worth."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.intruders import reduce_intruder_dimension
from torch import Tensor

from evolution.consolidation import (
    Consolidation,
    consolidate,
    join,
    roll_back,
    truncate,
)
from evolution.errors import TrainingError
from evolution.intruders import intruder_dimensions, intruders
from evolution.nested import NestedLoRA, attach
from evolution.nested_cards import Part, card_of, load_card
from registry.card import LoRACard
from registry.format import LoRAFormat
from registry.low_rank import Cut
from registry.tensor import Role
from registry.tensor import Tensor as CardTensor
from tests.evolution.nested_models import ARCHITECTURES, TUNING, Architecture, everywhere, merged, move
from tests.peft_models import make_peft, outputs, tiny_llama

LLAMA, VIT = ARCHITECTURES["llama"], ARCHITECTURES["vit"]
Changes = dict[str, np.ndarray[Any, np.dtype[np.float64]]]


def changes(nested: NestedLoRA, task: int | None) -> Changes:
    """ΔW by layer, of fast `task` or of slow: the plain formula, in float64."""
    pairs = {path: layer.slow if task is None else layer.fast[task] for path, layer in nested.layers.items()}
    return {
        path: 5 / 3 * pair.b.detach().double().numpy() @ pair.a.detach().double().numpy()
        for path, pair in pairs.items()
    }


def close(found: Changes, expected: Changes) -> bool:
    return all(np.allclose(found[path], expected[path], rtol=1e-5, atol=1e-6) for path in expected)


@everywhere
def test_the_slow_pair_takes_over_and_the_fast_one_begins_anew(kind: Architecture) -> None:
    nested = kind.nested(tasks=3)
    slow, fast, other = changes(nested, None), changes(nested, 0), changes(nested, 1)
    drawn = {path: layer.fast[0].a.clone() for path, layer in nested.layers.items()}
    everything = kind.compute(nested)
    consolidate(nested, 0)
    assert close(changes(nested, None), {path: slow[path] + fast[path] for path in slow})
    assert close(changes(nested, 1), other)
    for path, layer in nested.layers.items():
        assert layer.slow.rank == 6
        assert not layer.fast[0].b.any()
        assert layer.fast[0].a.shape == drawn[path].shape
        assert not torch.equal(layer.fast[0].a, drawn[path])
    torch.testing.assert_close(kind.compute(nested), everything, rtol=1e-5, atol=1e-5)


@everywhere
def test_consolidating_task_after_task_changes_no_output(kind: Architecture) -> None:
    nested = kind.nested(tasks=3)
    everything = kind.compute(nested)
    for task in range(3):
        consolidate(nested, task)
    assert {layer.slow.rank for layer in nested.layers.values()} == {12}
    torch.testing.assert_close(kind.compute(nested), everything, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kind.compute(nested, 1), everything, rtol=1e-5, atol=1e-5)


@everywhere
@pytest.mark.parametrize(("rank", "energy"), [(2, None), (4, None), (None, 0.9), (None, 0.5), (3, 0.99)])
def test_a_cut_costs_the_energy_that_it_discards(kind: Architecture, rank: int | None, energy: float | None) -> None:
    nested = kind.nested(tasks=2)
    slow, fast = changes(nested, None), changes(nested, 1)
    done = consolidate(nested, 1, Consolidation(rank=rank, energy=energy))
    for path, found in changes(nested, None).items():
        whole = slow[path] + fast[path]
        values = np.linalg.svd(whole, compute_uv=False)
        enough = int(np.searchsorted(np.cumsum(values**2), (energy or 1) * (values**2).sum())) + 1
        wanted = min(rank or 99, enough if energy else 99)
        discarded = np.sqrt((values[wanted:] ** 2).sum())
        assert nested.layers[path].slow.rank == wanted == done.cuts[path].rank
        assert done.cuts[path].rank_joined == 6
        assert np.linalg.norm(whole - found) == pytest.approx(discarded, rel=1e-4, abs=1e-5)
        assert done.cuts[path].lost == pytest.approx(discarded, rel=1e-5)
        assert done.cuts[path].norm == pytest.approx(np.linalg.norm(whole), rel=1e-5)
        assert done.cuts[path].lost_energy == pytest.approx((discarded / np.linalg.norm(whole)) ** 2, rel=1e-4)


@everywhere
def test_rolling_back_is_exact(kind: Architecture) -> None:
    nested = kind.nested(tasks=2)
    before = {name: weight.clone() for name, weight in nested.model.state_dict().items()}
    done = consolidate(nested, 1, Consolidation(rank=2))
    for weight in nested.trainable(1):
        weight.data += 1
    roll_back(nested, done)
    after = nested.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_an_average_moves_both_ways_and_part_of_a_fast_pair_may_stay() -> None:
    nested = LLAMA.nested(tasks=2)
    slow, fast = changes(nested, None), changes(nested, 1)
    consolidate(nested, 1, Consolidation.ema(0.75))
    assert close(changes(nested, None), {path: 0.75 * slow[path] + 0.25 * fast[path] for path in slow})
    assert not any(change.any() for change in changes(nested, 1).values())

    nested = LLAMA.nested(tasks=2)
    everything = LLAMA.compute(nested)
    consolidate(nested, 1, Consolidation(fast=0.75, left=0.25))
    assert close(changes(nested, None), {path: slow[path] + 0.75 * fast[path] for path in slow})
    assert close(changes(nested, 1), {path: 0.25 * fast[path] for path in fast})
    torch.testing.assert_close(LLAMA.compute(nested), everything, rtol=1e-5, atol=1e-5)


def test_what_was_consolidated_goes_on_learning() -> None:
    """Pairs that change nothing too: factors that are both zero would never move again."""
    for moved in (True, False):
        nested = VIT.nested(tasks=1, moved=moved)
        consolidate(nested, 0, Consolidation(rank=2))
        nested.model.train()
        with nested.using(0):
            nested.model(**VIT.inputs()).logits.square().mean().backward()
        for layer in nested.layers.values():
            for pair in (layer.slow, layer.fast[0]):
                assert pair.b.grad is not None
                assert pair.b.grad.any()


def test_ranks_never_exceed_what_the_change_has() -> None:
    a = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    b = torch.randn(7, 2, generator=torch.Generator().manual_seed(1))
    twice_a, twice_b = join([((a, b), 1.0), ((a, b), 0.5)])
    one = truncate(twice_a, twice_b, Cut(rank=4))
    assert (twice_a.shape, one.a.shape, one.b.shape) == ((4, 9), (2, 9), (7, 2))
    torch.testing.assert_close(one.b @ one.a, 1.5 * b @ a, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one.a @ one.a.T, one.b.T @ one.b, rtol=1e-4, atol=1e-4)  # √S on either side
    assert truncate(twice_a, twice_b, Cut(energy=1.0)).a.shape == (2, 9)
    wide = torch.randn(12, 9, generator=torch.Generator().manual_seed(2))
    assert truncate(wide, torch.ones(7, 12), Cut(energy=1.0)).a.shape == (1, 9)
    nothing = truncate(a, torch.zeros(7, 2), Cut(rank=2))
    assert (nothing.norm, nothing.lost, nothing.b.any().item()) == (0, 0, False)


def test_a_planted_intruder_is_found() -> None:
    """W is diagonal, so its left singular vectors are the axes; a direction between many of them is near none."""
    weight = torch.zeros(12, 16, dtype=torch.float64)
    weight[range(12), range(12)] = torch.arange(12, 0, -1).double()
    between = torch.ones(12, 1, dtype=torch.float64) / 12**0.5
    aside = torch.zeros(1, 16, dtype=torch.float64)
    aside[0, 15] = 1
    assert intruder_dimensions(weight, torch.zeros_like(weight)).at == ()
    assert intruder_dimensions(weight, 100 * between @ aside).at == (0,)
    assert intruder_dimensions(weight, 100 * between @ aside, cosine=0.1).at == ()
    assert intruder_dimensions(weight, 20 * weight[:, 3:4] @ aside).at == ()
    assert 11 not in intruder_dimensions(weight, 100 * between @ aside, top=3).at


def test_intruders_of_the_slow_pair_are_told_by_layer() -> None:
    nested = LLAMA.nested(tasks=1, moved=False)
    assert set(intruders(nested).values()) == {()}
    path, layer = next(iter(nested.layers.items()))
    layer.slow.b.data[:, 0] = 1000.0
    found = intruders(nested)
    assert found.pop(path) == (0,)
    assert set(found.values()) == {()}


def test_softened_intruders_are_pefts(tmp_path: Path) -> None:
    """PEFT's reduction cuts back to the pair's own rank, so ours is told to."""
    nested = LLAMA.nested(tasks=1)
    for layer in nested.layers.values():
        layer.slow.b.data[:, 0] *= 10
    card_of(nested, "slow", name="slow").to_peft(tmp_path)
    peft = PeftModel.from_pretrained(LLAMA.build(), str(tmp_path), autocast_adapter_dtype=False)
    reduce_intruder_dimension(peft, mitigation_lambda=0.25, logging_sink=None)
    before, fast = intruders(nested), changes(nested, 0)
    done = consolidate(nested, 0, Consolidation(fast=0.0, left=1.0, rank=TUNING.rank, intruders=0.25))
    assert any(before.values())
    assert {cut.intruders for cut in done.cuts.values()} == {len(found) for found in before.values()}
    assert close(changes(nested, 0), fast)
    for path, found in changes(nested, None).items():
        delta = peft.base_model.model.get_submodule(path).get_delta_weight("intruder_reduced")
        assert np.allclose(found, delta.detach().numpy(), rtol=1e-3, atol=1e-4)
    assert sum(map(len, intruders(nested).values())) < sum(map(len, before.values()))


def test_intruders_left_as_they_are_cost_nothing() -> None:
    one, other = LLAMA.nested(tasks=1), LLAMA.nested(tasks=1)
    consolidate(one, 0, Consolidation(intruders=1.0))
    consolidate(other, 0)
    assert all(np.array_equal(changes(one, None)[path], found) for path, found in changes(other, None).items())


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"energy": 0.0}, {"energy": 1.5}, {"intruders": -0.1}])
def test_a_consolidation_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(TrainingError, match="expected"):
        Consolidation(**wrong)
    with pytest.raises(TrainingError, match="decay"):
        Consolidation.ema(1.5)
    nested = LLAMA.nested(tasks=2)
    with pytest.raises(TrainingError, match="from 0 to 1, got 2"):
        consolidate(nested, 2)


def test_weights_that_are_not_finite_are_refused_before_anything_changes() -> None:
    nested = LLAMA.nested(tasks=1)
    path, layer = list(nested.layers.items())[-1]
    layer.fast[0].b.data[0, 0] = float("nan")
    with pytest.raises(TrainingError, match=f"finite weights.*{path}"):
        consolidate(nested, 0)
    assert {layer.slow.rank for layer in nested.layers.values()} == {3}


@everywhere
def test_cards_bring_every_pair_back_bit_for_bit(kind: Architecture, tmp_path: Path) -> None:
    nested = kind.nested(tasks=2)
    consolidate(nested, 0, Consolidation(energy=0.9))
    nested.layers[next(iter(nested.layers))].fast[0].b.data += 1
    assert len({layer.slow.rank for layer in nested.layers.values()}) > 1
    parts: list[Part] = ["slow", 0, 1]
    for part in parts:
        LoRAFormat.save(card_of(nested, part, name=f"nested-{part}", base_name="tiny"), tmp_path / f"{part}.lora.arrow")
    copy = attach(kind.build(), replace(TUNING, seed=9), tasks=2)
    for part in parts:
        load_card(copy, part, LoRAFormat.load(tmp_path / f"{part}.lora.arrow"))  # type: ignore[arg-type]
    kept = copy.model.state_dict()
    assert all(torch.equal(kept[name], weight) for name, weight in nested.model.state_dict().items())
    assert torch.equal(kind.compute(copy), kind.compute(nested))


@everywhere
def test_peft_computes_the_cards_as_the_nested_set_does(kind: Architecture, tmp_path: Path) -> None:
    nested = kind.nested(tasks=2)
    consolidate(nested, 1, Consolidation(energy=0.9))
    move(nested, seed=3)
    expected: dict[Part, Tensor] = {
        "slow": outputs(merged(kind.build(), nested, {}), kind.inputs()),
        "sum": kind.compute(nested),
        "mean": outputs(merged(kind.build(), nested, {0: 0.5, 1: 0.5}), kind.inputs()),
    }
    for part, wanted in expected.items():
        directory = tmp_path / str(part)
        card_of(nested, part, name="part").to_peft(directory)
        peft = PeftModel.from_pretrained(kind.build(), str(directory), autocast_adapter_dtype=False).eval()
        torch.testing.assert_close(outputs(peft, kind.inputs()), wanted, rtol=1e-5, atol=1e-5)
        back = LoRACard.from_peft(directory)
        fresh = attach(kind.build(), TUNING)
        load_card(fresh, "slow", back)
        torch.testing.assert_close(kind.compute(fresh), wanted, rtol=1e-5, atol=1e-5)


def test_a_card_says_what_it_is_and_does_not_move_with_the_training() -> None:
    nested = LLAMA.nested(tasks=2)
    parent = card_of(nested, "slow", name="slow")
    card = card_of(nested, 1, name="fast", parents=[parent.digest], training={"steps": 3}, base_name="tiny")
    assert card.manifest.parents == (parent.digest,)
    assert card.manifest.training == {"steps": 3, "nested": {"part": 1, "tasks": 2}}
    assert (card.manifest.base.name, card.manifest.base.architecture) == ("tiny", "LlamaForCausalLM")
    for weight in nested.trainable(1):
        weight.data += 1
    card.verify()


def test_a_card_of_another_scale_changes_the_same(tmp_path: Path) -> None:
    card = LoRACard.from_peft(make_peft(tiny_llama(), tmp_path, seed=2, r=2, lora_alpha=6, use_rslora=True))
    nested = LLAMA.nested(tasks=1)
    load_card(nested, 0, card)
    for path, change in changes(nested, 0).items():
        a, b = (card.modules[path][role].float32() for role in (Role.A, Role.B))
        assert np.allclose(change, 6 / np.sqrt(2) * b @ a, rtol=1e-5, atol=1e-6)


def test_a_card_that_does_not_fit_is_refused_whole(tmp_path: Path) -> None:
    nested = LLAMA.nested(tasks=1)
    before = {name: weight.clone() for name, weight in nested.model.state_dict().items()}
    fewer = attach(tiny_llama(), replace(TUNING, targets=("q_proj",)))
    dora = make_peft(tiny_llama(), tmp_path, seed=2, use_dora=True)
    full = card_of(nested, 0, name="full")
    extra = CardTensor.from_numpy("model.norm.weight", Role.FULL, np.ones(16, np.float32))
    more = LoRACard.build(name="full", adapter=full.manifest.adapter, tensors=[*full.tensors, extra])
    for card, message in (
        (card_of(fewer, "slow", name="fewer"), "differ first at"),
        (card_of(VIT.nested(), "slow", name="other"), "differ first at"),
        (LoRACard.from_peft(dora), "A and B alone"),
        (more, "A and B alone"),
    ):
        with pytest.raises(TrainingError, match=message):
            load_card(nested, "slow", card)
    with pytest.raises(TrainingError, match="from 0 to 0, got 1"):
        load_card(nested, 1, full)
    with pytest.raises(TrainingError, match="from 0 to 0, got 1"):
        card_of(nested, 1, name="none")
    assert all(torch.equal(weight, before[name]) for name, weight in nested.model.state_dict().items())
