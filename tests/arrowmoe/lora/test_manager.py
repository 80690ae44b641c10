"""What fits, what does not, and that a refusal leaves the model as it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from arrowmoe.errors import AdapterMismatchError, GateError, UnknownAdapterError, UnsupportedCardError
from arrowmoe.lora.manager import LoRAManager
from arrowmoe.routing.gates import Gates
from registry.card import LoRACard
from registry.manifest import AdapterSpec
from registry.tensor import Role, Tensor
from tests.peft_models import make_peft, outputs, sample_inputs, tiny_bert, tiny_bert_classifier, tiny_llama


def card_of(**modules: tuple[int, int]) -> LoRACard:
    """A rank-2 card for modules path (with __ for dots) → (d_in, d_out)."""
    shapes = {path.replace("__", "."): shape for path, shape in modules.items()}
    tensors = [
        Tensor.from_numpy(path, role, np.ones(size, dtype=np.float32))
        for path, (d_in, d_out) in shapes.items()
        for role, size in ((Role.A, (2, d_in)), (Role.B, (d_out, 2)))
    ]
    return LoRACard.build(
        name="c", adapter=AdapterSpec(rank=2, alpha=2.0, target_modules=tuple(shapes)), tensors=tensors
    )


def only(card: LoRACard, rows: int = 3) -> Gates:
    return Gates.of([{card.digest: 1.0}] * rows, {card.digest: card.name})


def test_a_path_of_the_backbone_alone_finds_its_module() -> None:
    model = tiny_llama()
    manager = LoRAManager(model)
    entry = manager.apply_card(card_of(layers__1__mlp__up_proj=(16, 32)))
    assert entry.modules == ("model.layers.1.mlp.up_proj",)


def test_a_path_with_a_longer_prefix_finds_its_module() -> None:
    manager = LoRAManager(tiny_bert())
    entry = manager.apply_card(card_of(auto_model__encoder__layer__0__attention__self__query=(16, 16)))
    assert entry.modules == ("encoder.layer.0.attention.self.query",)


def test_an_ambiguous_path_is_refused() -> None:
    with pytest.raises(AdapterMismatchError, match="up_proj"):
        LoRAManager(tiny_llama()).apply_card(card_of(up_proj=(16, 32)))


def test_a_missing_module_is_named_and_nothing_is_touched() -> None:
    model = tiny_llama()
    modules = dict(model.named_modules())
    with pytest.raises(AdapterMismatchError, match=r"1 of 2 modules.*layers\.7\.mlp\.up_proj"):
        LoRAManager(model).apply_card(
            card_of(model__layers__0__mlp__up_proj=(16, 32), model__layers__7__mlp__up_proj=(16, 32))
        )
    assert dict(model.named_modules()) == modules


def test_a_wrong_shape_is_named() -> None:
    with pytest.raises(AdapterMismatchError, match=r"16 → 48, the base model has Linear 16 → 32"):
        LoRAManager(tiny_llama()).apply_card(card_of(model__layers__0__mlp__up_proj=(16, 48)))


def test_whole_parameters_are_refused_by_name(tmp_path: Path) -> None:
    model = tiny_bert_classifier()
    path = make_peft(model, tmp_path / "a", seed=0, modules_to_save=["classifier"], target_modules=["query"])
    with pytest.raises(UnsupportedCardError, match="classifier"):
        LoRAManager(model).apply_card(LoRACard.from_peft(path))


def test_applying_twice_changes_nothing_and_removing_twice_says_so(tmp_path: Path) -> None:
    model = tiny_llama()
    card = LoRACard.from_peft(make_peft(model, tmp_path / "a", seed=0))
    manager = LoRAManager(model)
    assert manager.apply_card(card) == manager.apply_card(card)
    assert len(manager.loaded()) == 1
    assert manager.remove_card(card.digest)
    assert not manager.remove_card(card.digest)


def test_removing_one_of_two_leaves_the_other(tmp_path: Path) -> None:
    model = tiny_llama()
    cards = [LoRACard.from_peft(make_peft(model, tmp_path / f"a{seed}", seed=seed)) for seed in range(2)]
    manager = LoRAManager(model)
    for card in cards:
        manager.apply_card(card)
    with manager.gated(only(cards[1])):
        before = outputs(model)
    manager.remove_card(cards[0].digest)
    with manager.gated(only(cards[1])):
        assert torch.equal(outputs(model), before)
    with pytest.raises(UnknownAdapterError), manager.gated(only(cards[0])):
        pass


def test_a_batch_of_other_rows_than_the_gates_is_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    card = LoRACard.from_peft(make_peft(model, tmp_path / "a", seed=0))
    manager = LoRAManager(model)
    manager.apply_card(card)
    with manager.gated(only(card, rows=2)), pytest.raises(GateError, match="2 rows"):
        model(**sample_inputs(rows=3))


def test_a_wrapped_module_still_shows_what_models_read_of_it() -> None:
    model = tiny_llama()
    manager = LoRAManager(model)
    manager.apply_card(card_of(model__layers__1__mlp__up_proj=(16, 32)))
    module = model.model.layers[1].mlp.up_proj
    assert (module.in_features, module.out_features, module.bias) == (16, 32, None)
    assert module.weight.dtype == torch.float32
    with pytest.raises(AttributeError, match="no_such"):
        module.no_such  # noqa: B018


def test_an_fp32_card_is_not_copied(tmp_path: Path) -> None:
    model = tiny_llama()
    card = LoRACard.from_peft(make_peft(model, tmp_path / "a", seed=0))
    manager = LoRAManager(model)
    manager.apply_card(card)
    name = "model.layers.0.mlp.up_proj"
    slot = model.get_submodule(name).slots[card.digest]
    where = np.frombuffer(card.modules[name][Role.A].data, dtype=np.uint8).ctypes.data
    assert slot.low_rank.a.data_ptr() == where
