"""Extraction: a planted adapter comes back, PEFT makes the tuned model of base and card, nothing is dropped unsaid."""

from __future__ import annotations

import copy
import json
import weakref
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification
from transformers.pytorch_utils import Conv1D

from evolution.errors import ExtractionError
from evolution.extractor import Extraction, LoRAExtractor, Others, weights_digest
from evolution.model_files import INDEX, WEIGHTS, ModelFiles, ModelLayout, layout_of
from registry.card import LoRACard
from registry.low_rank import Cut
from registry.tensor import Role
from tests.peft_models import load_peft, outputs, sample_inputs, tiny_bert, tiny_gpt2, tiny_llama

RANK = 4
EXACT = Cut(rank=RANK)


def tiny_vit() -> PreTrainedModel:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4)).eval()


def tiny_tied() -> PreTrainedModel:
    model = tiny_llama()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return model


MODELS = [tiny_llama, tiny_tied, tiny_gpt2, tiny_bert, tiny_vit]


def inputs_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    if isinstance(model, ViTForImageClassification):
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
    return sample_inputs()


def linear_modules(model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    }


@torch.no_grad()
def planted(model: PreTrainedModel, rank: int = RANK) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """The model with a random delta of this rank in each linear module, and the deltas as (d_out, d_in)."""
    generator, tuned, deltas = torch.Generator().manual_seed(1), copy.deepcopy(model), {}
    for name, module in linear_modules(tuned).items():
        weight = module.get_parameter("weight")
        d_in, d_out = weight.shape if isinstance(module, Conv1D) else weight.shape[::-1]
        delta = 0.1 * torch.randn(d_out, rank, generator=generator) @ torch.randn(rank, d_in, generator=generator)
        weight.add_(delta.T if isinstance(module, Conv1D) else delta)
        deltas[name] = delta
    return tuned, deltas


@torch.no_grad()
def moved(model: PreTrainedModel, *names: str) -> PreTrainedModel:
    """The model with these parameters moved, too."""
    tuned = copy.deepcopy(model)
    for name in names:
        parameter = tuned.get_parameter(name)
        parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    return tuned


def extracted(
    base: PreTrainedModel,
    tuned: PreTrainedModel,
    tmp_path: Path,
    truncation: Cut = EXACT,
    *,
    others: Others = "refuse",
    **saving: Any,
) -> Extraction:
    base.save_pretrained(tmp_path / "base", **saving)
    tuned.save_pretrained(tmp_path / "tuned", **saving)
    extractor = LoRAExtractor(cut=truncation, others=others)
    one, other = ModelFiles(tmp_path / "base"), ModelFiles(tmp_path / "tuned")
    return extractor.extract(other, one, one.layout, name="taken", base_name=one.name)


def product(card: LoRACard, module: str) -> torch.Tensor:
    a, b = (torch.from_numpy(card.modules[module][role].float32()) for role in (Role.A, Role.B))
    return card.manifest.adapter.scaling_of(module) * (b @ a)


def with_peft(base: PreTrainedModel, card: LoRACard, directory: Path) -> torch.Tensor:
    card.to_peft(directory)
    return outputs(load_peft(base, directory), inputs_of(base))


@pytest.mark.parametrize("saving", [{}, {"max_shard_size": "8KB"}], ids=["whole", "sharded"])
@pytest.mark.parametrize("build", MODELS)
def test_a_planted_adapter_is_recovered_and_peft_gives_the_tuned_models_outputs(
    build: Callable[[], PreTrainedModel], saving: dict[str, Any], tmp_path: Path
) -> None:
    base = build()
    tuned, deltas = planted(base)
    found = extracted(base, tuned, tmp_path, **saving)
    assert (tmp_path / "base" / INDEX).exists() == bool(saving)
    assert set(found.kept) == set(deltas)
    for module, delta in deltas.items():
        assert found.kept[module].rank == min(RANK, *delta.shape)
        assert float((product(found.card, module) - delta).norm() / delta.norm()) < 1e-5
    assert found.error < 1e-5
    before, after = (outputs(model, inputs_of(base)) for model in (base, tuned))
    assert not torch.allclose(before, after, atol=0.05)
    torch.testing.assert_close(with_peft(base, found.card, tmp_path / "peft"), after, rtol=1e-4, atol=1e-5)


def test_ranks_differ_where_the_changes_do_and_come_back_through_peft(tmp_path: Path) -> None:
    base = tiny_llama()
    tuned, _ = planted(base, rank=2)
    with torch.no_grad():
        tuned.get_parameter("model.layers.1.mlp.up_proj.weight").add_(0.1 * torch.eye(32, 16))
    found = extracted(base, tuned, tmp_path, Cut(error=1e-4))
    ranks = {cut.rank for cut in found.kept.values()}
    assert len(ranks) > 1
    torch.testing.assert_close(with_peft(base, found.card, tmp_path / "peft"), outputs(tuned), rtol=1e-3, atol=1e-3)
    again = LoRACard.from_peft(tmp_path / "peft")
    assert again.manifest.adapter == found.card.manifest.adapter
    for module in found.kept:
        assert torch.equal(product(again, module), product(found.card, module))


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_the_error_it_tells_is_the_one_that_is_there(energy: float, tmp_path: Path) -> None:
    base = tiny_llama()
    tuned = moved(base, *(f"{name}.weight" for name in linear_modules(base)))
    found = extracted(base, tuned, tmp_path, Cut(energy=energy))
    left = whole = 0.0
    for module in linear_modules(base):
        delta = (tuned.get_parameter(f"{module}.weight") - base.get_parameter(f"{module}.weight")).detach().double()
        error = (delta - product(found.card, module).double()).square().sum()
        assert float(error / delta.square().sum()) <= 1 - energy
        left, whole = left + float(error), whole + float(delta.square().sum())
    assert found.error == pytest.approx((left / whole) ** 0.5, rel=1e-3)
    assert found.card.manifest.training["extraction"]["error"] == found.error


def test_a_module_that_did_not_change_is_no_target(tmp_path: Path) -> None:
    base = tiny_llama()
    found = extracted(base, moved(base, "model.layers.0.mlp.up_proj.weight"), tmp_path)
    assert found.card.manifest.adapter.target_modules == ("model.layers.0.mlp.up_proj",)


@pytest.mark.parametrize(
    ("build", "names", "kind"),
    [
        (tiny_llama, ["model.norm.weight"], "norm"),
        (tiny_llama, ["model.embed_tokens.weight"], "embedding"),
        (tiny_tied, ["model.embed_tokens.weight"], "embedding"),
        (tiny_gpt2, ["transformer.h.1.attn.c_attn.bias"], "bias"),
        (tiny_bert, ["encoder.layer.0.attention.self.query.bias", "embeddings.LayerNorm.bias"], "bias"),
        (tiny_vit, ["vit.embeddings.cls_token"], "other"),
    ],
)
def test_what_has_no_low_rank_form_is_refused_by_name_or_kept_whole(
    build: Callable[[], PreTrainedModel], names: list[str], kind: str, tmp_path: Path
) -> None:
    base = build()
    tuned = moved(planted(base)[0], *names)
    with pytest.raises(ExtractionError, match=rf"{min(names)} \({kind}\)"):
        extracted(base, tuned, tmp_path / "refused")
    found = extracted(base, tuned, tmp_path, others="full")
    assert sorted(change.name for change in found.others) == sorted(names)
    assert all(change.relative > 0 for change in found.others)
    given = with_peft(base, found.card, tmp_path / "peft")
    torch.testing.assert_close(given, outputs(tuned, inputs_of(base)), rtol=1e-4, atol=1e-5)


def test_weights_in_bf16_are_subtracted_in_fp32(tmp_path: Path) -> None:
    base = tiny_llama().to(torch.bfloat16)
    tuned = moved(base, "model.layers.0.mlp.up_proj.weight")
    one, other = (m.get_parameter("model.layers.0.mlp.up_proj.weight").detach().float() for m in (base, tuned))
    found = extracted(base, tuned, tmp_path, Cut(rank=16))
    torch.testing.assert_close(product(found.card, "model.layers.0.mlp.up_proj"), other - one, rtol=1e-4, atol=1e-6)


def test_the_card_says_what_it_was_taken_from(tmp_path: Path) -> None:
    base = tiny_llama()
    found = extracted(base, planted(base)[0], tmp_path)
    manifest = found.card.manifest
    said = manifest.training["extraction"]
    assert (manifest.base.name, manifest.base.architecture) == ("base", "LlamaForCausalLM")
    assert said["bound"] == {"rank": RANK}
    digests = [weights_digest(ModelFiles(tmp_path / which)) for which in ("base", "tuned")]
    assert [said["base"], said["tuned"]] == digests
    assert said["base"] != said["tuned"]


class InMemory:
    """Weights that count how many of them somebody holds at once."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self.held = self.most = 0

    @property
    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def tensor(self, name: str) -> torch.Tensor:
        given = self._tensors[name].clone()
        self.held += 1
        self.most = max(self.most, self.held)
        weakref.finalize(given, self._let_go)
        return given

    def _let_go(self) -> None:
        self.held -= 1


@pytest.fixture
def llama() -> tuple[PreTrainedModel, ModelLayout]:
    model = tiny_llama()
    return model, layout_of(model)


def state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_memory_holds_a_few_tensors_at_a_time(llama: tuple[PreTrainedModel, ModelLayout]) -> None:
    base, layout = llama
    one, other = InMemory(state(base)), InMemory(state(planted(base)[0]))
    found = LoRAExtractor(cut=EXACT).extract(other, one, layout, name="taken", base_name=None)
    assert len(found.kept) == 14
    assert one.most <= 2
    assert other.most <= 2


def test_a_difference_alone_is_enough(llama: tuple[PreTrainedModel, ModelLayout]) -> None:
    base, layout = llama
    deltas = planted(base)[1]
    weights = InMemory({f"{module}.weight": delta for module, delta in deltas.items()})
    found = LoRAExtractor(cut=EXACT).extract(weights, None, layout, name="taken", base_name="tiny")
    for module, delta in deltas.items():
        assert float((product(found.card, module) - delta).norm() / delta.norm()) < 1e-5
    whole = InMemory({"model.norm.weight": torch.ones(16)})
    with pytest.raises(ExtractionError, match=r"model\.norm\.weight .* alone"):
        LoRAExtractor(cut=EXACT, others="full").extract(whole, None, layout, name="x", base_name=None)


def test_the_same_model_gives_no_card(tmp_path: Path) -> None:
    with pytest.raises(ExtractionError, match="got none"):
        extracted(tiny_llama(), tiny_llama(), tmp_path)


@pytest.mark.parametrize("others", ["refuse", "full"])
def test_a_resized_vocabulary_is_refused(others: Others, tmp_path: Path) -> None:
    base, tuned = tiny_llama(), planted(tiny_llama())[0]
    tuned.resize_token_embeddings(70)
    with pytest.raises(ExtractionError, match=r"shape \(64, 16\), got \(70, 16\)") as caught:
        extracted(base, tuned, tmp_path, others=others)
    assert "vocabulary" in (caught.value.hint or "")


def test_an_output_layer_that_is_tied_in_name_only_is_refused(tmp_path: Path) -> None:
    tiny_tied().save_pretrained(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    shared = weights["model.embed_tokens.weight"]
    save_file(weights | {"lm_head.weight": shared.clone()}, tmp_path / WEIGHTS, metadata={"format": "pt"})
    assert "lm_head.weight" not in ModelFiles(tmp_path).names
    save_file(weights | {"lm_head.weight": shared + 1}, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ExtractionError, match=r"lm_head\.weight to be model\.embed_tokens\.weight"):
        ModelFiles(tmp_path)


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ExtractionError, match="in one only"):
        extracted(tiny_llama(), tiny_gpt2(), tmp_path)


@pytest.mark.parametrize(
    ("weight", "said"),
    [(torch.full((32, 16), torch.nan), "finite weights"), (torch.ones((32, 16), dtype=torch.int8), "int8")],
)
def test_nan_and_integers_are_refused_with_their_module(
    llama: tuple[PreTrainedModel, ModelLayout], weight: torch.Tensor, said: str
) -> None:
    base, layout = llama
    broken = InMemory(state(base) | {"model.layers.0.mlp.up_proj.weight": weight})
    with pytest.raises(ExtractionError, match=said) as caught:
        LoRAExtractor(cut=EXACT).extract(broken, InMemory(state(base)), layout, name="x", base_name=None)
    assert "model.layers.0.mlp.up_proj" in str(caught.value)


def test_directories_that_hold_no_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExtractionError, match=r"config\.json"):
        ModelFiles(tmp_path)
    tiny_llama().save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"nothing of the kind")
    with pytest.raises(ExtractionError, match="cannot be read"):
        ModelFiles(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(ExtractionError, match=rf"expected {WEIGHTS}"):
        ModelFiles(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "../else.safetensors"}}))
    with pytest.raises(ExtractionError, match="itself"):
        ModelFiles(tmp_path)
