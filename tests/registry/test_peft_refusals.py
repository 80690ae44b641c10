"""What a card cannot hold is refused by name, and nothing in a directory is believed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from registry import peft_io
from registry.card import LoRACard
from registry.errors import ArrowMoEError, CardFormatError, CardLimitError, UnsupportedAdapterError
from registry.peft_config import CARRIED, HELD, REFUSED
from tests.peft_models import make_peft, tiny_bert_classifier, tiny_llama
from tests.registry.peft_directories import change, change_weights, config_of, key_of, weights_of


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A plain LoRA of four tensors, for tests that damage it."""
    return make_peft(tiny_llama(), tmp_path / "plain", seed=3, target_modules=["q_proj"])


def _classifier(directory: Path) -> Path:
    """An adapter with bias="all" and saved modules, whose biases PEFT writes three times."""
    return make_peft(
        tiny_bert_classifier(), directory, seed=7, task_type="SEQ_CLS", target_modules=["query"], bias="all"
    )


def test_every_setting_of_the_installed_peft_is_decided_on() -> None:
    fields = LoraConfig().to_dict().keys() | {"runtime_config"}
    assert fields <= HELD | CARRIED | REFUSED.keys()
    assert len(HELD | CARRIED | REFUSED.keys()) == len(HELD) + len(CARRIED) + len(REFUSED)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("alora_invocation_tokens", [1, 2]),
        ("arrow_config", {"top_k": 2}),
        ("ensure_weight_tying", True),
        ("kasa_config", {"beta": 1.0}),
        ("layer_replication", [[0, 2], [1, 2]]),
        ("lora_bias", True),
        ("megatron_config", {"x": 1}),
        ("monteclora_config", {"num_samples": 2}),
        ("target_parameters", ["experts.gate_up_proj"]),
        ("trainable_token_indices", [3]),
        ("use_bdlora", {"nblocks": 2}),
        ("use_qalora", True),
        ("velora_config", {"num_groups": 4}),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "of-next-year"),
        ("peft_type", "LOHA"),
        ("peft_type", None),
        ("setting_of_next_year", 0.5),
        ("setting_of_next_year", 0),
    ],
)
def test_a_setting_that_a_card_cannot_hold_is_refused_by_name(field: str, value: object, adapter: Path) -> None:
    change(adapter, **{field: value})
    with pytest.raises(UnsupportedAdapterError, match=field):
        peft_io.read(adapter)


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_an_unknown_setting_that_is_off_is_carried(value: object, adapter: Path, tmp_path: Path) -> None:
    change(adapter, setting_of_next_year=value)
    LoRACard.from_peft(adapter).to_peft(tmp_path / "out")
    assert config_of(tmp_path / "out") == config_of(adapter)


def test_weights_that_peft_would_leave_out_are_refused(adapter: Path) -> None:
    change(adapter, target_modules=["v_proj", "proj"])
    with pytest.raises(UnsupportedAdapterError, match="target_modules"):
        peft_io.read(adapter)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"r": 0}, "r: expected a rank"),
        ({"r": "4"}, "r: expected a rank"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"rank_pattern": {"q_proj": 1.5}}, "rank_pattern"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern"),
        ({"alpha_pattern": {"(": 3}}, "alpha_pattern"),
        ({"use_dora": "yes"}, "use_dora"),
        ({"bias": "some"}, "bias"),
        ({"modules_to_save": "classifier"}, "modules_to_save"),
        ({"modules_to_save": [""]}, "modules_to_save"),
        ({"target_modules": [1]}, "target_modules"),
        ({"r": 8}, "r and rank_pattern do not fit"),
        ({"use_dora": True}, "magnitude is missing"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(fields: dict[str, Any], match: str, adapter: Path) -> None:
    change(adapter, **fields)
    with pytest.raises(CardFormatError, match=match):
        peft_io.read(adapter)


def test_an_expression_that_could_run_for_ever_is_refused(adapter: Path) -> None:
    change(adapter, alpha_pattern={"(m+)+!": 3})
    with pytest.raises(UnsupportedAdapterError, match="alpha_pattern"):
        peft_io.read(adapter)


def test_patterns_whose_order_decides_are_refused(adapter: Path) -> None:
    change(adapter, alpha_pattern={"q_proj": 3, "layers.0.self_attn.q_proj": 5})
    with pytest.raises(UnsupportedAdapterError, match="sorting"):
        peft_io.read(adapter)


def test_an_empty_target_list_is_not_a_lora(tmp_path: Path) -> None:
    directory = make_peft(tiny_bert_classifier(), tmp_path / "probe", seed=1, modules_to_save=["classifier"])
    change_weights(directory, lambda tensors: [tensors.pop(key) for key in list(tensors) if "lora_" in key])
    with pytest.raises(UnsupportedAdapterError, match="no LoRA weights"):
        peft_io.read(directory)


@pytest.mark.parametrize(
    "key",
    [
        key_of(0, "lora_C.weight"),
        key_of(0, "lora_B.bias"),
        key_of(0, "lora_velora_embed"),
        key_of(0, "lora_A.default.weight"),
        key_of(0, "bias"),
        key_of(0, "base_layer.lora_A.weight"),
        key_of(0, "base_layer.bias", "mlp.up_proj"),
        key_of(0, "weight", "mlp.up_proj"),
        "base_model.model.model.norm.weight",
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
        "base_model.model.classifier.original_module.bias",
        "base_model.model.classifier.modules_to_save.weight",
        "base_model.model.lora_A.weight",
        "model.layers.0.self_attn.k_proj.lora_A.weight",
        "prompt_embeddings",
    ],
)
def test_an_unknown_weight_is_refused_by_name(key: str, adapter: Path) -> None:
    change_weights(adapter, lambda tensors: tensors.update({key: torch.zeros(16)}))
    with pytest.raises(UnsupportedAdapterError, match=key.replace(".", r"\.")):
        peft_io.read(adapter)


@pytest.mark.parametrize("part", ["A", "B"])
def test_half_a_pair_is_refused(part: str, adapter: Path) -> None:
    change_weights(adapter, lambda tensors: tensors.pop(key_of(1, f"lora_{part}.weight")))
    with pytest.raises(CardFormatError, match=rf"layers\.1\.self_attn\.q_proj.* {part} is missing"):
        peft_io.read(adapter)


def test_a_magnitude_without_dora_is_refused(adapter: Path) -> None:
    change_weights(adapter, lambda tensors: tensors.update({key_of(0, "lora_magnitude_vector"): torch.ones(16)}))
    with pytest.raises(CardFormatError, match="use_dora"):
        peft_io.read(adapter)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_a_dtype_that_a_card_cannot_hold_is_refused(dtype: torch.dtype, adapter: Path) -> None:
    key = key_of(0, "lora_A.weight")
    change_weights(adapter, lambda tensors: tensors.update({key: tensors[key].to(dtype)}))
    with pytest.raises(UnsupportedAdapterError, match=r"lora_A.*dtype"):
        peft_io.read(adapter)


def test_convolutions_are_refused(adapter: Path) -> None:
    change_weights(adapter, lambda tensors: tensors.update({key_of(0, "lora_A.weight"): torch.zeros(4, 16, 3, 3)}))
    with pytest.raises(UnsupportedAdapterError, match="convolution"):
        peft_io.read(adapter)


@pytest.mark.parametrize("shape", [(0,), (4, 0), (64,)])
def test_shards_that_were_not_gathered_are_refused(shape: tuple[int, ...], adapter: Path) -> None:
    change_weights(adapter, lambda tensors: tensors.update({key_of(0, "lora_A.weight"): torch.zeros(shape)}))
    with pytest.raises(CardFormatError, match="shards"):
        peft_io.read(adapter)


def test_a_saved_bias_that_peft_wrote_twice_must_agree(tmp_path: Path) -> None:
    directory = _classifier(tmp_path / "in")
    key = "base_model.model.classifier.modules_to_save.bias"
    change_weights(directory, lambda tensors: tensors.update({key: tensors[key] + 1}))
    with pytest.raises(UnsupportedAdapterError, match="two different values"):
        peft_io.read(directory)


def test_a_key_that_would_not_come_back_is_refused(tmp_path: Path) -> None:
    directory = _classifier(tmp_path / "in")
    change_weights(directory, lambda tensors: tensors.pop("base_model.model.classifier.modules_to_save.bias"))
    with pytest.raises(UnsupportedAdapterError, match="would not come back"):
        peft_io.read(directory)


def test_a_pickle_is_refused_and_not_opened(adapter: Path) -> None:
    weights_of(adapter).rename(adapter / "adapter_model.bin")
    with pytest.raises(UnsupportedAdapterError, match="pickle") as caught:
        peft_io.read(adapter)
    assert "save_file" in (caught.value.hint or "")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(name: str, adapter: Path) -> None:
    (adapter / name).unlink()
    with pytest.raises(CardFormatError, match=name):
        peft_io.read(adapter)


def test_a_missing_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CardFormatError, match=r"adapter_config\.json"):
        peft_io.read(tmp_path / "nowhere")


def test_the_hint_names_folders_that_hold_adapters(adapter: Path) -> None:
    with pytest.raises(CardFormatError) as caught:
        peft_io.read(adapter.parent)
    assert "plain" in (caught.value.hint or "")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"r": NaN}', "\xff", "[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused(text: str, adapter: Path) -> None:
    (adapter / "adapter_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CardFormatError, match=r"adapter_config\.json"):
        peft_io.read(adapter)


def test_files_that_are_too_large_are_refused_before_they_are_read(
    adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.truncate(weights_of(adapter), peft_io.MAX_WEIGHTS_BYTES + 1)  # sparse: takes no space
    with pytest.raises(CardLimitError, match="safetensors"):
        peft_io.read(adapter)
    (adapter / "adapter_config.json").write_text(" " * (peft_io.MAX_CONFIG_BYTES + 1))
    with pytest.raises(CardLimitError, match="config"):
        peft_io.read(adapter)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_link_may_not_leave_the_directory(name: str, adapter: Path, tmp_path: Path) -> None:
    (adapter / name).rename(tmp_path / "elsewhere")
    (adapter / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CardFormatError, match="link"):
        peft_io.read(adapter)


def test_final_may_not_leave_its_root(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "final").symlink_to(adapter)
    with pytest.raises(CardFormatError, match="leads out"):
        peft_io.read(tmp_path / "run")


def test_the_hugging_face_cache_may_link_to_its_blobs(adapter: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for index, name in enumerate(("adapter_config.json", "adapter_model.safetensors")):
        (adapter / name).rename(blobs / str(index))
        (snapshot / name).symlink_to(Path("../../blobs") / str(index))
    assert len(peft_io.read(snapshot).tensors) == 4


def test_a_pipe_is_not_waited_for(adapter: Path) -> None:
    weights_of(adapter).unlink()
    os.mkfifo(weights_of(adapter))
    with pytest.raises(CardFormatError, match="regular file"):
        peft_io.read(adapter)


def test_a_damaged_weights_file_is_an_error_or_holds_the_same_places(adapter: Path) -> None:
    whole = weights_of(adapter).read_bytes()
    places = {(tensor.name, tensor.role, tensor.shape) for tensor in peft_io.read(adapter).tensors}
    header_end = 8 + int.from_bytes(whole[:8], "little")
    for index in range(header_end):
        damaged = bytearray(whole)
        damaged[index] ^= 1 + index % 255
        weights_of(adapter).write_bytes(damaged)
        try:
            found = peft_io.read(adapter)
        except ArrowMoEError:
            continue
        assert {(tensor.name, tensor.role, tensor.shape) for tensor in found.tensors} == places
    for length in range(0, len(whole), 7):
        weights_of(adapter).write_bytes(whole[:length])
        with pytest.raises(ArrowMoEError):
            peft_io.read(adapter)


def test_a_key_of_absurd_length_is_refused(adapter: Path) -> None:
    change_weights(adapter, lambda tensors: tensors.update({"x" * 2000: torch.zeros(1)}))
    with pytest.raises(CardLimitError, match="2000"):
        peft_io.read(adapter)


def test_overlapping_and_scattered_tensors_are_refused(adapter: Path) -> None:
    whole = weights_of(adapter).read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    header[key_of(0, "lora_A.weight")]["data_offsets"] = header[key_of(0, "lora_B.weight")]["data_offsets"]
    text = json.dumps(header).encode()
    weights_of(adapter).write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + size :])
    with pytest.raises(CardFormatError, match="expected a tensor at byte"):
        peft_io.read(adapter)
