"""PEFT directories in and out. The reference is the installed PEFT: what it writes must come back, bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import PreTrainedModel

from registry import peft_io
from registry.card import LoRACard
from registry.errors import RegistryError, UnsupportedAdapterError
from registry.format import LoRAFormat
from registry.manifest import AdapterSpec
from registry.peft_config import logical_base
from registry.tensor import DType, Role, Tensor
from tests.peft_models import (
    adapted_model,
    load_peft,
    make_peft,
    outputs,
    tiny_bert,
    tiny_bert_classifier,
    tiny_gpt2,
    tiny_llama,
)
from tests.registry.peft_directories import change, change_weights, config_of, key_of, weights_of

CASES: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any]]] = {
    "lora": (tiny_llama, {"lora_dropout": 0.1}),
    "task-type": (tiny_llama, {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}),
    "rslora": (tiny_llama, {"use_rslora": True, "lora_alpha": 3}),
    "dora": (tiny_llama, {"use_dora": True}),
    "patterns": (
        tiny_llama,
        {
            "rank_pattern": {r"layers\.0\..*_proj": 2, "^model.layers.1.mlp.up_proj": 7, "q_proj": 3},
            "alpha_pattern": {"o_proj": 11, r"layers.1.mlp.(up|down)_proj": 2.5},
        },
    ),
    "rslora-patterns": (
        tiny_llama,
        {"use_rslora": True, "rank_pattern": {"k_proj": 6}, "alpha_pattern": {"k_proj": 1}},
    ),
    "bias-all": (tiny_bert, {"bias": "all", "target_modules": ["query", "value"]}),
    "bias-lora-only": (tiny_bert, {"bias": "lora_only"}),
    "bias-dora": (tiny_bert, {"bias": "lora_only", "use_dora": True}),
    "modules-to-save": (tiny_bert_classifier, {"modules_to_save": ["classifier", "pooler"]}),
    "classifier": (tiny_bert_classifier, {"task_type": "SEQ_CLS", "target_modules": ["query"]}),
    "classifier-bias-all": (
        tiny_bert_classifier,
        {"task_type": "SEQ_CLS", "target_modules": ["query"], "bias": "all", "modules_to_save": ["pooler"]},
    ),
    "layers": (tiny_llama, {"layers_to_transform": [1], "layers_pattern": "layers"}),
    "exclude-and-expression": (tiny_llama, {"target_modules": r".*\.0\..*(q|v)_proj", "exclude_modules": ["v_proj"]}),
    "all-linear": (tiny_llama, {"target_modules": "all-linear"}),
    "gpt2": (tiny_gpt2, {"fan_in_fan_out": True}),
    "gpt2-dora": (tiny_gpt2, {"fan_in_fan_out": True, "use_dora": True, "target_modules": ["c_attn", "wte"]}),
    "embedding": (tiny_gpt2, {"fan_in_fan_out": True, "target_modules": ["wte", "c_attn"], "rank_pattern": {"wte": 2}}),
    "embedding-with-base": (tiny_llama, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "embedding-saved": (tiny_llama, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "mica": (tiny_llama, {"init_lora_weights": "mica"}),
}


@pytest.fixture(params=CASES, scope="module")
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The name of a case and the directory that PEFT wrote for it."""
    return request.param, _save(request.param, tmp_path_factory.mktemp("peft") / request.param)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A plain LoRA of four tensors, for tests that damage it."""
    return make_peft(tiny_llama(), tmp_path / "plain", seed=3, target_modules=["q_proj"])


def _save(case: str, directory: Path, **more: Any) -> Path:
    build, config = CASES[case]
    return make_peft(build(), directory, seed=7, **(config | more))


def test_a_directory_comes_back_as_it_was(saved: tuple[str, Path], tmp_path: Path) -> None:
    case, source = saved
    LoRACard.from_peft(source).to_peft(tmp_path / "out")
    assert config_of(tmp_path / "out") == config_of(source), case
    assert weights_of(tmp_path / "out").read_bytes() == weights_of(source).read_bytes()


def test_peft_computes_the_same_with_what_comes_out(saved: tuple[str, Path], tmp_path: Path) -> None:
    case, source = saved
    LoRACard.from_peft(source).to_peft(tmp_path / "out")
    build, config = CASES[case]
    expected = outputs(adapted_model(build(), seed=7, **config))
    assert torch.equal(outputs(load_peft(build(), tmp_path / "out")), expected)
    assert not torch.allclose(expected, outputs(build()), atol=1e-3), "an adapter that does nothing shows nothing"


def test_a_card_file_keeps_everything(saved: tuple[str, Path], tmp_path: Path) -> None:
    _, source = saved
    LoRAFormat.save(LoRACard.from_peft(source), tmp_path / "card.lora.arrow")
    LoRAFormat.load(tmp_path / "card.lora.arrow").to_peft(tmp_path / "out")
    assert config_of(tmp_path / "out") == config_of(source)
    assert weights_of(tmp_path / "out").read_bytes() == weights_of(source).read_bytes()


def test_ranks_and_scalings_are_those_that_peft_uses(saved: tuple[str, Path]) -> None:
    case, source = saved
    build, config = CASES[case]
    spec = peft_io.read(source).spec
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in adapted_model(build(), seed=7, **config).named_modules()
        if isinstance(module, LoraLayer)
    }
    assert spec.target_modules == tuple(sorted(layers))
    assert {name: spec.rank_of(name) for name in layers} == {name: layer.r["default"] for name, layer in layers.items()}
    assert {name: spec.scaling_of(name) for name in layers} == {
        name: layer.scaling["default"] for name, layer in layers.items()
    }
    assert set(spec.embeddings) == {name for name in layers if name.endswith(("wte", "embed_tokens"))}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["patterns", "dora", "bias-lora-only", "gpt2"])
def test_half_precision_keeps_its_bits(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = _save(case, tmp_path / "in", dtype=dtype)
    card = LoRACard.from_peft(source)
    card.to_peft(tmp_path / "out")
    assert {tensor.dtype for tensor in card.tensors} == {DType(str(dtype).removeprefix("torch."))}
    assert weights_of(tmp_path / "out").read_bytes() == weights_of(source).read_bytes()
    build, _ = CASES[case]
    assert torch.equal(outputs(load_peft(build(), tmp_path / "out")), outputs(load_peft(build(), source)))


def test_dtypes_may_differ_within_an_adapter(adapter: Path, tmp_path: Path) -> None:
    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key_of(0, "lora_B.weight")] = tensors[key_of(0, "lora_B.weight")].bfloat16()
        tensors[key_of(1, "lora_A.weight")] = tensors[key_of(1, "lora_A.weight")].half()

    change_weights(adapter, narrow)
    LoRACard.from_peft(adapter).to_peft(tmp_path / "out")
    assert weights_of(tmp_path / "out").read_bytes() == weights_of(adapter).read_bytes()


def test_biases_and_saved_modules_have_their_places(tmp_path: Path) -> None:
    spec_and_tensors = peft_io.read(_save("classifier-bias-all", tmp_path / "in"))
    places = {(tensor.name, tensor.role) for tensor in spec_and_tensors.tensors}
    assert spec_and_tensors.spec.bias == "all"
    assert {
        ("bert.encoder.layer.0.attention.self.query", Role.BIAS),
        ("bert.embeddings.LayerNorm", Role.BIAS),
        ("classifier", Role.BIAS),
        ("classifier.weight", Role.FULL),
        ("classifier.bias", Role.FULL),
        ("bert.pooler.dense.weight", Role.FULL),
    } <= places


def test_layers_that_are_not_transformed_are_no_targets(tmp_path: Path) -> None:
    adapter = peft_io.read(_save("layers", tmp_path / "in"))
    assert {module.split(".")[2] for module in adapter.spec.target_modules} == {"1"}
    assert adapter.config["layers_to_transform"] == [1]


def test_a_resized_vocabulary_is_kept(tmp_path: Path) -> None:
    def resized() -> PreTrainedModel:
        model = tiny_llama()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model.resize_token_embeddings(72)
        return model

    model = adapted_model(resized(), seed=1, target_modules=["q_proj"])
    model.save_pretrained(tmp_path / "in", save_embedding_layers=True)
    card = LoRACard.from_peft(tmp_path / "in")
    card.to_peft(tmp_path / "out")
    assert {tensor.name for tensor in card.tensors if tensor.role is Role.FULL} == {
        "model.embed_tokens.weight",
        "lm_head.weight",
    }
    assert weights_of(tmp_path / "out").read_bytes() == weights_of(tmp_path / "in").read_bytes()
    assert torch.equal(outputs(load_peft(resized(), tmp_path / "out")), outputs(model))


@pytest.mark.parametrize(
    "case", ["patterns", "rslora-patterns", "dora", "bias-all", "modules-to-save", "embedding-with-base"]
)
def test_a_card_made_without_peft_loads_there(case: str, tmp_path: Path) -> None:
    adapter = peft_io.read(_save(case, tmp_path / "in"))
    card = LoRACard.build(name="own", adapter=adapter.spec, tensors=adapter.tensors, base_name="owner/model")
    card.to_peft(tmp_path / "out")
    build, config = CASES[case]
    assert torch.equal(outputs(load_peft(build(), tmp_path / "out")), outputs(adapted_model(build(), seed=7, **config)))
    assert weights_of(tmp_path / "out").read_bytes() == weights_of(tmp_path / "in").read_bytes()
    assert config_of(tmp_path / "out")["base_model_name_or_path"] == "owner/model"
    again = peft_io.read(tmp_path / "out")
    assert again.spec == adapter.spec


def test_statistics_for_the_router_stay_out_of_a_peft_directory(adapter: Path, tmp_path: Path) -> None:
    read = peft_io.read(adapter)
    statistics = Tensor.of("prototypes", Role.STATS, DType.FLOAT32, (2,), bytes(8))
    LoRACard.build(name="own", adapter=read.spec, tensors=(*read.tensors, statistics)).to_peft(tmp_path / "out")
    assert weights_of(tmp_path / "out").read_bytes() == weights_of(adapter).read_bytes()


def test_a_config_of_an_old_peft_is_enough(adapter: Path, tmp_path: Path) -> None:
    kept = ("peft_type", "r", "lora_alpha", "target_modules", "bias", "task_type")
    config = config_of(adapter)
    (adapter / "adapter_config.json").write_text(json.dumps({field: config[field] for field in kept}))
    LoRACard.from_peft(adapter).to_peft(tmp_path / "out")
    assert config_of(tmp_path / "out").keys() == set(kept)
    assert torch.equal(outputs(load_peft(tiny_llama(), tmp_path / "out")), outputs(load_peft(tiny_llama(), adapter)))


def test_the_name_is_the_folders(adapter: Path, tmp_path: Path) -> None:
    assert peft_io.read(adapter).name == "plain"
    assert LoRACard.from_peft(adapter, name="given").name == "given"


def test_a_relative_path_has_a_name_too(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(adapter)
    assert peft_io.read(Path()).name == "plain"


def test_a_checkpoint_root_is_understood(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    adapter.rename(tmp_path / "run" / "final")
    assert peft_io.read(tmp_path / "run").name == "run"
    assert len(peft_io.read(tmp_path / "run").tensors) == 4


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        (None, None),
        ("", None),
        (".", None),
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B"),
        ("gpt2", "gpt2"),
        ("builtin:smollm2", "builtin:smollm2"),
        ("/home/someone/models/SmolLM2-135M/", "SmolLM2-135M"),
        ("./models/SmolLM2-135M", "SmolLM2-135M"),
        ("~/SmolLM2-135M", "SmolLM2-135M"),
        ("some/relative/path", "path"),
        (r"C:\models\SmolLM2", "SmolLM2"),
        ("/root/.cache/huggingface/hub/models--owner--a--b/snapshots/0123abcd", "owner/a--b"),
        ("/root/.cache/huggingface/hub/models--owner--name/snapshots/0123abcd", "owner/name"),
    ],
)
def test_the_base_models_path_is_reduced_to_an_id(written: str | None, kept: str | None, adapter: Path) -> None:
    change(adapter, base_model_name_or_path=written)
    read = peft_io.read(adapter)
    assert (read.base_name, read.config["base_model_name_or_path"]) == (kept, kept)
    assert logical_base(kept) == kept or kept is None


def test_an_adapter_is_never_overwritten(adapter: Path, tmp_path: Path) -> None:
    card = LoRACard.from_peft(adapter)
    card.to_peft(tmp_path / "out")
    before = weights_of(tmp_path / "out").read_bytes()
    with pytest.raises(RegistryError, match="exists already") as caught:
        card.describe(description="other").to_peft(tmp_path / "out")
    assert caught.value.hint
    assert weights_of(tmp_path / "out").read_bytes() == before


def test_a_place_that_cannot_be_written_is_an_error(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RegistryError, match="cannot be written"):
        LoRACard.from_peft(adapter).to_peft(tmp_path / "file" / "out")


def test_other_files_of_the_directory_stay_and_no_draft_is_left(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("mine")
    LoRACard.from_peft(adapter).to_peft(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_the_reference_library_reads_what_is_written(adapter: Path, tmp_path: Path) -> None:
    LoRACard.from_peft(adapter).to_peft(tmp_path / "out")
    with safe_open(str(weights_of(tmp_path / "out")), "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(load_file(weights_of(adapter)))


def test_a_card_whose_settings_contradict_its_adapter_is_not_exported(adapter: Path, tmp_path: Path) -> None:
    card = LoRACard.from_peft(adapter)
    assert card.manifest.peft is not None
    lying = card.describe(peft=card.manifest.peft | {"lora_alpha": 600})
    with pytest.raises(UnsupportedAdapterError, match="alpha"):
        lying.to_peft(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_are_read_and_not_mapped(adapter: Path) -> None:
    card = LoRACard.from_peft(adapter)
    weights_of(adapter).write_bytes(b"")
    shutil.rmtree(adapter)
    card.verify()


def test_the_spec_is_the_plain_one(adapter: Path) -> None:
    spec = peft_io.read(adapter).spec
    modules = tuple(f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1))
    assert spec == AdapterSpec(rank=4, alpha=6.0, target_modules=modules)
