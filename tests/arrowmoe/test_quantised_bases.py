"""Base models in 8 and 4 bits, and quantised cards: what the engine computes with them is what PEFT does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from arrowmoe import quantised_bases
from arrowmoe.base_model import BaseModel, load_base_model
from arrowmoe.engine import ArrowEngine
from arrowmoe.errors import AdapterMismatchError, ModelLoadError, UnsupportedCardError
from arrowmoe.lora.manager import LoRAManager
from arrowmoe.quantised_bases import Quantise
from arrowmoe.routing.gates import Gates
from registry.card import LoRACard
from registry.quantising import Bits, quantise
from tests.arrowmoe.tiny import tokenizer
from tests.peft_models import load_peft, make_peft, outputs, tiny_bert, tiny_llama

HOW = get_args(Quantise)
SETTINGS = [{}, {"use_dora": True}, {"use_rslora": True, "r": 8}]
MODELS = [tiny_llama, tiny_bert]
Build = Callable[[], PreTrainedModel]


def saved(model: PreTrainedModel, directory: Path) -> Path:
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def loaded(directory: Path, how: Quantise) -> BaseModel:
    return load_base_model(directory, device="cpu", quantise=how)


def computed(model: PreTrainedModel, *cards: LoRACard) -> torch.Tensor:
    """Three rows: all of the first card, or one card each."""
    manager = LoRAManager(model)
    for card in cards:
        manager.apply_card(card)
    rows = [{cards[row % len(cards)].digest: 1.0} for row in range(3)]
    with manager.gated(Gates.of(rows, {card.digest: card.name for card in cards})):
        return outputs(model).float()


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("build", MODELS)
def test_an_adapter_on_a_quantised_base_equals_peft(how: Quantise, setting: dict, build: Build, tmp_path: Path) -> None:
    model = build()
    path = make_peft(model, tmp_path / "a", seed=1, **setting)
    home = saved(model, tmp_path / "base")
    theirs = PeftModel.from_pretrained(loaded(home, how).model, str(path), autocast_adapter_dtype=False).eval()
    expected, bare = outputs(theirs), outputs(loaded(home, how).model)
    found = computed(loaded(home, how).model, LoRACard.from_peft(path))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (expected - bare).abs().max() > 0.05


@pytest.mark.parametrize("how", HOW)
def test_mixed_rows_on_a_quantised_base_equal_rows_alone(how: Quantise, tmp_path: Path) -> None:
    model = tiny_llama()
    home = saved(model, tmp_path / "base")
    cards = [LoRACard.from_peft(make_peft(model, tmp_path / f"a{seed}", seed=seed, r=2 + seed)) for seed in range(3)]
    together = computed(loaded(home, how).model, *cards)
    for row, card in enumerate(cards):
        alone = computed(loaded(home, how).model, card)
        # In 8 bits a product's inputs are rounded too, so the last bit of a float32 sum can move one a whole step.
        within = 1e-4 if how == "4bit" else 0.05
        assert (together[row] - alone[row]).norm() <= within * alone[row].norm()
        assert all(
            (alone[row] - together[other]).norm() > 3 * within * alone[row].norm() for other in {0, 1, 2} - {row}
        )


@pytest.mark.parametrize("how", HOW)
def test_a_quantised_base_is_near_the_whole_one_and_smaller(how: Quantise, tmp_path: Path) -> None:
    model = tiny_llama()
    base = loaded(saved(model, tmp_path / "base"), how)
    path = "model.layers.0.mlp.up_proj"
    before, after = model.get_submodule(path).weight, base.model.get_submodule(path)
    assert after.weight.nbytes <= before.nbytes / (4 if how == "8bit" else 8)
    error = (quantised_bases.unpacked(after) - before).norm() / before.norm()
    assert 0 < error < (0.02 if how == "8bit" else 0.2)
    assert base.dtype == torch.float32


@pytest.mark.parametrize("how", HOW)
def test_an_engine_answers_on_a_quantised_base(how: Quantise, tmp_path: Path) -> None:
    model = tiny_llama()
    path = make_peft(model, tmp_path / "a", seed=1)
    engine = ArrowEngine.from_pretrained(saved(model, tmp_path / "tiny"), device="cpu", quantise=how)
    engine.load_lora(LoRACard.from_peft(path, name="a", base_name="tiny"))
    with_it, without = (engine.generate(["w5 w9 w7"], name, max_new_tokens=4)[0].tokens for name in ("a", None))
    assert len(with_it) > 0
    assert with_it != without


def test_an_adapter_of_another_shape_is_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    path = make_peft(tiny_llama(), tmp_path / "a", seed=1, target_modules=["up_proj"])
    card = LoRACard.from_peft(path)
    for layer in model.model.layers:
        layer.mlp.up_proj = torch.nn.Linear(16, 64, bias=False)
        layer.mlp.gate_proj = torch.nn.Linear(16, 64, bias=False)
        layer.mlp.down_proj = torch.nn.Linear(64, 16, bias=False)
    model.config.intermediate_size = 64
    base = loaded(saved(model, tmp_path / "base"), "4bit")
    with pytest.raises(AdapterMismatchError, match="16 → 32, the base model has Linear4bit 16 → 64"):
        LoRAManager(base.model).prepare(card)


def test_a_quantised_module_that_does_not_say_its_dtype_is_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    card = LoRACard.from_peft(make_peft(model, tmp_path / "a", seed=1))
    base = loaded(saved(model, tmp_path / "base"), "8bit")
    for module in base.model.modules():
        if quantised_bases.is_packed(module):
            del module.compute_dtype
    with pytest.raises(UnsupportedCardError, match="Linear8bitLt that does not"):
        LoRAManager(base.model).prepare(card)


def test_without_bitsandbytes_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(quantised_bases, "find_spec", lambda name: None)
    with pytest.raises(ModelLoadError, match="needs bitsandbytes") as caught:
        load_base_model(saved(tiny_llama(), tmp_path / "base"), device="cpu", quantise="4bit")
    assert "arrowmoe[quantised]" in str(caught.value.hint)


def test_another_word_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="expected 8bit or 4bit, got '3bit'"):
        load_base_model(saved(tiny_llama(), tmp_path / "base"), device="cpu", quantise="3bit")  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("build", MODELS)
def test_a_quantised_card_computes_what_peft_does_with_its_weights(
    bits: Bits, setting: dict, build: Build, tmp_path: Path
) -> None:
    model = build()
    card = quantise(LoRACard.from_peft(make_peft(model, tmp_path / "a", seed=1, **setting)), bits, name="small")
    card.to_peft(tmp_path / "small")
    expected = outputs(load_peft(model, tmp_path / "small"))
    torch.testing.assert_close(computed(model, card), expected, atol=1e-5, rtol=1e-5)


def test_quantised_and_other_cards_share_a_batch(tmp_path: Path) -> None:
    model = tiny_llama()
    whole = LoRACard.from_peft(make_peft(model, tmp_path / "a", seed=1))
    cards = [whole, quantise(whole, 8, name="eight"), quantise(whole, 4, name="four")]
    together = computed(tiny_llama(), *cards)
    for row, card in enumerate(cards):
        torch.testing.assert_close(together[row], computed(tiny_llama(), card)[row], atol=1e-5, rtol=1e-5)
    missed = [float((together[0] - one).norm()) for one in computed(tiny_llama(), *cards)[1:]]
    assert min(missed) > 0
