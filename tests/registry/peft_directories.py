"""Changing a PEFT directory in a test: its config, its weights, its keys."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def config_of(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "adapter_config.json").read_text())
    return config


def change(directory: Path, **fields: Any) -> None:
    (directory / "adapter_config.json").write_text(json.dumps(config_of(directory) | fields))


def weights_of(directory: Path) -> Path:
    return directory / "adapter_model.safetensors"


def change_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(weights_of(directory))
    change(tensors)
    save_file(tensors, weights_of(directory), metadata={"format": "pt"})


def key_of(layer: int, part: str, module: str = "self_attn.q_proj") -> str:
    return f"base_model.model.model.layers.{layer}.{module}.{part}"
