"""The three architectures that nested LoRAs are tested on, with inputs of three rows, and pairs that do something."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification

from evolution.nested import NestedLoRA, attach
from evolution.training_job import FineTuning
from tests.peft_models import outputs, sample_inputs, tiny_bert_classifier, tiny_llama

TUNING = FineTuning(rank=3, alpha=5, seed=1)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    build: Callable[[], PreTrainedModel]
    inputs: Callable[[], dict[str, Tensor]]
    layers: int
    """Linear layers in its blocks."""

    def nested(self, tasks: int = 3, tuning: FineTuning = TUNING, *, moved: bool = True) -> NestedLoRA:
        nested = attach(self.build(), tuning, tasks=tasks)
        if moved:
            move(nested)
        return nested

    def compute(self, nested: NestedLoRA, task: int | Tensor | None = None) -> Tensor:
        if task is None:
            return outputs(nested.model, self.inputs())
        with nested.using(task):
            return outputs(nested.model, self.inputs())


def tiny_vit() -> PreTrainedModel:
    """Images of 8 × 8 in four patches, 2 layers, d_model 16, 4 labels; eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=24,
            image_size=8,
            patch_size=4,
            num_channels=1,
            num_labels=4,
            initializer_range=0.2,
        )
        return ViTForImageClassification(config).eval()


def images(rows: int = 3) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(rows, 1, 8, 8, generator=torch.Generator().manual_seed(0))}


def move(nested: NestedLoRA, seed: int = 0) -> None:
    """Give every pair a B that is far from zero."""
    generator = torch.Generator().manual_seed(seed)
    for layer in nested.layers.values():
        for pair in (layer.slow, *layer.fast):
            pair.b.data.copy_(0.3 * torch.randn(pair.b.shape, generator=generator))


def merged(model: nn.Module, nested: NestedLoRA, weights: Mapping[int, float]) -> nn.Module:
    """`model` with W + s (B₀ A₀ + Σ weight · B_k A_k) for W: the plain formula."""
    for path, layer in nested.layers.items():
        pairs = [(1.0, layer.slow), *((weight, layer.fast[task]) for task, weight in weights.items())]
        for weight, pair in pairs:
            # TUNING's alpha / rank
            model.get_parameter(f"{path}.weight").data += 5 / 3 * weight * pair.b.detach() @ pair.a.detach()
    return model


ARCHITECTURES = {
    "llama": Architecture(build=tiny_llama, inputs=sample_inputs, layers=14),
    "bert": Architecture(build=tiny_bert_classifier, inputs=sample_inputs, layers=12),
    "vit": Architecture(build=tiny_vit, inputs=images, layers=12),
}
everywhere = pytest.mark.parametrize("kind", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
