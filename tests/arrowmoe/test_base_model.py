"""Loading a base model: its pooling wherever it comes from, its name, and files that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from arrowmoe.base_model import Pooling, load_base_model, read_pooling
from arrowmoe.base_names import logical_name
from arrowmoe.errors import ModelLoadError
from tests.arrowmoe.tiny import bert_engine

REVISION = "a" * 40


def describe(directory: Path, *kinds: str, **pooling: bool) -> None:
    """Write sentence-transformers files: modules of `kinds`, and how `Pooling` is set."""
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": kind} for kind in kinds]
    (directory / "Pooling").mkdir()
    write(directory / "modules.json", modules)
    write(directory / "Pooling" / "config.json", pooling)


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def save_encoder(directory: Path) -> None:
    base = bert_engine().base
    base.model.save_pretrained(directory)
    base.tokenizer.save_pretrained(directory)


def test_the_pooling_of_a_hub_id_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--someone--encoder"
    snapshot = repository / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    save_encoder(snapshot)
    describe(snapshot, "Transformer", "Pooling", pooling_mode_cls_token=True, pooling_mode_mean_tokens=False)
    loaded = load_base_model("someone/encoder", device="cpu")
    assert (loaded.name, loaded.pooling) == ("someone/encoder", Pooling(mode="cls", normalise=False))


def test_a_directory_without_such_files_is_pooled_by_mean(tmp_path: Path) -> None:
    assert read_pooling(tmp_path) == Pooling(mode="mean", normalise=True)


def test_modules_that_would_be_left_out_are_refused(tmp_path: Path) -> None:
    describe(tmp_path, "Transformer", "Pooling", "Dense", "Normalize", pooling_mode_mean_tokens=True)
    with pytest.raises(ModelLoadError, match="Dense"):
        read_pooling(tmp_path)


def test_cut_weights_are_an_error_that_says_so(tmp_path: Path) -> None:
    save_encoder(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(ModelLoadError, match="cannot be loaded"):
        load_base_model(tmp_path, device="cpu")


def test_the_logical_name_is_the_one_that_loading_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny").mkdir()
    save_encoder(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path / "tiny")
    for model in (".", str(tmp_path / "tiny"), "../tiny/"):
        assert logical_name(model) == load_base_model(model, device="cpu").name == "tiny"
    assert logical_name("/some/where/SmolLM2.Q4.gguf") == "SmolLM2.Q4"
    assert logical_name("someone/encoder") == "someone/encoder"
