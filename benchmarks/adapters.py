"""SmolLM2-135M and random rank-8 adapters on its seven linear maps, as PEFT writes them: what the benchmarks share."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from arrowmoe.base_model import BaseModel, load_base_model

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK = 8


def smollm2() -> BaseModel:
    """The base model in fp32 on the CPU."""
    return load_base_model("builtin:smollm2", device="cpu", dtype="float32")


def write_adapters(base: BaseModel, directory: Path, count: int, rank: int = RANK) -> list[Path]:
    """`count` PEFT directories with random weights; one is made by PEFT, the others are its likeness."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(TARGETS), init_lora_weights=False)
    model = get_peft_model(base.model, config)
    model.peft_config["default"].base_model_name_or_path = base.name
    model.save_pretrained(directory / "adapter-0")
    first = {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}
    model.unload()
    paths = [directory / f"adapter-{index}" for index in range(count)]
    for seed, path in enumerate(paths):
        path.mkdir(exist_ok=True)
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            name.replace(".default", ""): 0.02 * torch.randn(tensor.shape, generator=generator)
            for name, tensor in first.items()
        }
        save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
        (path / "adapter_config.json").write_bytes((paths[0] / "adapter_config.json").read_bytes())
    return paths
