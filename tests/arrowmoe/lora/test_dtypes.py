"""Cards of any dtype on bases of any dtype: exact on an fp32 base, and within the base's own rounding on a half one."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from arrowmoe.lora.manager import LoRAManager
from arrowmoe.routing.gates import Gates
from registry.card import LoRACard
from tests.peft_models import load_peft, make_peft, outputs, tiny_bert, tiny_llama

HALF = [torch.bfloat16, torch.float16]


def computed(model: torch.nn.Module, card: LoRACard) -> torch.Tensor:
    manager = LoRAManager(model)
    manager.apply_card(card)
    with manager.gated(Gates.of([{card.digest: 1.0}] * 3, {card.digest: card.name})):
        return outputs(model).float()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("setting", [{}, {"use_dora": True}, {"bias": "all"}])
def test_a_half_card_on_an_fp32_base_equals_peft(dtype: torch.dtype, setting: dict, tmp_path: Path) -> None:
    model = tiny_bert()
    path = make_peft(model, tmp_path / "a", seed=1, dtype=dtype, **setting)
    expected = outputs(load_peft(model, path))
    assert relative_error(computed(copy.deepcopy(model), LoRACard.from_peft(path)), expected) <= 1e-5


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("setting", [{}, {"use_dora": True}])
def test_a_half_base_stays_near_the_fp32_reference(dtype: torch.dtype, setting: dict, tmp_path: Path) -> None:
    model = tiny_llama()
    path = make_peft(model, tmp_path / "a", seed=1, scale=0.1, **setting)
    expected = outputs(load_peft(model, path))
    bare = relative_error(outputs(copy.deepcopy(model).to(dtype)).float(), outputs(model))
    found = relative_error(computed(copy.deepcopy(model).to(dtype), LoRACard.from_peft(path)), expected)
    assert found <= 3 * bare, f"{found:.1e}, where the bare base in {dtype} is off by {bare:.1e}"
    assert relative_error(outputs(model), expected) > 10 * found, "the adapter does much more than rounding does"
