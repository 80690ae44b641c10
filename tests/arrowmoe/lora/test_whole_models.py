"""Every layout through whole models: unequal ranks, padding on either side, fused maps, embeddings, and tracing.

References are PEFT's own forward passes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, Phi3Config, Phi3ForCausalLM, PreTrainedModel

from arrowmoe.lora.costs import LAYOUTS
from arrowmoe.lora.manager import LoRAManager
from arrowmoe.routing.gates import Gates
from registry.card import LoRACard
from tests.peft_models import (
    SHAPE,
    load_peft,
    make_peft,
    outputs,
    sample_inputs,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
)

RANKS = (1, 64, 5, 16)
CHOICES = [0, 1, None, 3, 1, 2, 0, 3]
LENGTHS = [9, 3, 9, 1, 5, 7, 2, 9]
FUSED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("arrowmoe.lora.costs.cheapest", lambda *_: request.param)
    return str(request.param)


def tiny_phi3() -> PreTrainedModel:
    """Query, key and value in one map, gate and up in another."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Phi3ForCausalLM(Phi3Config(**SHAPE)).eval().requires_grad_(False)


def adapters(model: PreTrainedModel, directory: Path, **config: object) -> list[Path]:
    return [
        make_peft(model, directory / f"a{seed}", seed=seed, r=rank, scale=0.2, **config)
        for seed, rank in enumerate(RANKS)
    ]


def loaded(model: PreTrainedModel, paths: list[Path]) -> tuple[LoRAManager, Gates]:
    cards = [LoRACard.from_peft(path) for path in paths]
    manager = LoRAManager(model)
    for card in cards:
        manager.apply_card(card)
    rows = [{} if k is None else {cards[k].digest: 1.0} for k in CHOICES]
    return manager, Gates.of(rows, {card.digest: card.name for card in cards})


def by_peft(model: PreTrainedModel, paths: list[Path], inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Each row of one forward pass for each adapter."""
    whole = [outputs(load_peft(model, path), inputs) for path in paths]
    bare = outputs(model, inputs)
    return torch.stack([bare[row] if k is None else whole[k][row] for row, k in enumerate(CHOICES)])


def padded(side: str) -> dict[str, torch.Tensor]:
    inputs = sample_inputs(rows=len(CHOICES), length=max(LENGTHS))
    for row, length in enumerate(LENGTHS):
        empty = slice(0, max(LENGTHS) - length) if side == "left" else slice(length, None)
        inputs["input_ids"][row, empty], inputs["attention_mask"][row, empty] = 0, 0
    return inputs


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_unequal_rank_and_length_equal_peft(layout: str, side: str, tmp_path: Path) -> None:
    model, inputs = tiny_llama(), padded(side)
    paths = adapters(model, tmp_path)
    ours = copy.deepcopy(model)
    manager, gates = loaded(ours, paths)
    attended = inputs["attention_mask"].bool()
    with manager.gated(gates):
        found = outputs(ours, inputs)
    assert relative_error(found[attended], by_peft(model, paths, inputs)[attended]) <= 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
def test_in_bf16_they_stay_near_pefts_fp32(layout: str, side: str, tmp_path: Path) -> None:
    """Within three times what rounding to bf16 does to the bare base."""
    model, inputs = tiny_llama(), padded(side)
    paths = adapters(model, tmp_path)
    half = copy.deepcopy(model).to(torch.bfloat16)
    attended = inputs["attention_mask"].bool()
    bare = relative_error(outputs(half, inputs).float()[attended], outputs(model, inputs)[attended])
    manager, gates = loaded(half, paths)
    with manager.gated(gates):
        found = outputs(half, inputs).float()
    assert relative_error(found[attended], by_peft(model, paths, inputs)[attended]) <= 3 * bare


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_a_prompt_in_chunks_then_token_by_token_equals_peft(
    layout: str, build: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    """With a cache, the rows of the batch at chunks of 4, 3, 1 and 1 tokens, padded on the left."""
    model, inputs = build(), padded("left")
    paths = adapters(model, tmp_path)
    ours = copy.deepcopy(model)
    manager, gates = loaded(ours, paths)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    cache, found = DynamicCache(config=ours.config), []
    plan = manager.plan(gates)
    for start, end in ((0, 4), (4, 7), (7, 8), (8, 9)):
        with manager.running(plan), torch.inference_mode():
            made = ours(
                ids[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, start:end],
                past_key_values=cache,
                use_cache=True,
            )
        found.append(made.logits)
    expected = by_peft(model, paths, inputs | {"position_ids": positions})
    assert relative_error(torch.cat(found, dim=1)[mask.bool()], expected[mask.bool()]) <= 1e-5


def test_fused_maps_equal_peft(layout: str, tmp_path: Path) -> None:
    model, inputs = tiny_phi3(), sample_inputs(rows=len(CHOICES))
    paths = adapters(model, tmp_path, target_modules=list(FUSED))
    ours = copy.deepcopy(model)
    manager, gates = loaded(ours, paths)
    with manager.gated(gates):
        assert relative_error(outputs(ours, inputs), by_peft(model, paths, inputs)) <= 1e-5


@pytest.mark.parametrize(
    ("build", "targets"),
    [(tiny_gpt2, ["c_attn", "c_proj", "c_fc", "wte"]), (tiny_bert, ["word_embeddings", "query", "dense"])],
)
def test_conv1d_and_embeddings_in_mixed_rows_equal_peft(
    layout: str, build: type[PreTrainedModel], targets: list[str], tmp_path: Path
) -> None:
    model, inputs = build(), sample_inputs(rows=len(CHOICES))
    paths = adapters(model, tmp_path, target_modules=targets)
    ours = copy.deepcopy(model)
    manager, gates = loaded(ours, paths)
    with manager.gated(gates):
        assert relative_error(outputs(ours, inputs), by_peft(model, paths, inputs)) <= 1e-5


def test_a_forward_pass_is_traced_whole_and_never_waits_for_a_device(layout: str, tmp_path: Path) -> None:
    """`.item()`, `nonzero` and shapes that depend on data would break the graph; the first pass lays out.

    The traced model follows a change of the batch.
    """
    model, inputs = tiny_llama(), sample_inputs(rows=len(CHOICES))
    manager, gates = loaded(model, adapters(model, tmp_path))
    traced = torch.compile(model, fullgraph=True, backend="eager")
    plan = manager.plan(gates)
    assert plan is not None
    for _ in range(2):
        with manager.running(plan), torch.no_grad():
            expected = outputs(model, inputs)
            assert torch.equal(traced(**inputs).logits, expected)
        plan = plan.followed_by(plan.adapters, plan.gates.roll(1, dims=0))
