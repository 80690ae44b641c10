"""Tiny random base models and PEFT adapters with weights that do something, for tests that compare with PEFT.

Base models are built once a session and never handed out: every call returns a copy of its own, with the same weights.
Nothing here downloads.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

VOCABULARY = 64
HIDDEN = 16
LAYERS = 2
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
"""A tiny decoder's settings, as Llama and those after it call them."""
LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BERT_TARGETS = ("query", "key", "value", "dense")
GPT2_TARGETS = ("c_attn", "c_proj", "c_fc")


def tiny_llama(seed: int = 0) -> PreTrainedModel:
    """A causal Llama: 2 layers, d_model 16, 4 heads on 2 key-value heads, vocabulary 64; fp32, CPU, eval mode."""
    return copy.deepcopy(_llama(seed))


def tiny_bert(seed: int = 0) -> PreTrainedModel:
    """A BERT encoder (`BertModel`) of the same size."""
    return copy.deepcopy(_bert(seed))


def tiny_bert_classifier(seed: int = 0) -> PreTrainedModel:
    """The same BERT with a classifier of 3 labels on top: a module for `modules_to_save`."""
    return copy.deepcopy(_bert_classifier(seed))


def tiny_gpt2(seed: int = 0) -> PreTrainedModel:
    """A causal GPT-2 of the same size; its linear layers are `Conv1D`, which store the weight as (d_in, d_out)."""
    return copy.deepcopy(_gpt2(seed))


def make_peft(
    model: PreTrainedModel,
    directory: Path,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    scale: float = 0.3,
    **lora_config: Any,
) -> Path:
    """Save a random adapter for `model` with PEFT's own `save_pretrained`; every weight of it is trained, so to speak.

    `lora_config` are fields of `LoraConfig`; `target_modules` defaults to what fits a Llama, BERT or GPT-2. A and B are
    normal with deviation `scale`, B far from zero; biases, magnitudes and saved modules are moved off the base's.
    `dtype` is that of the tensors in the file. `model` itself is left as it was. Returns `directory`.
    """
    adapted_model(model, seed=seed, dtype=dtype, scale=scale, **lora_config).save_pretrained(directory)
    return directory


def adapted_model(
    model: PreTrainedModel, *, seed: int, dtype: torch.dtype = torch.float32, scale: float = 0.3, **lora_config: Any
) -> PeftModel:
    """The `PeftModel` that `make_peft` saves, in eval mode, over a copy of `model`."""
    if "target_modules" not in lora_config:
        lora_config["target_modules"] = list(_targets_of(model))
    lora_config.setdefault("r", 4)
    lora_config.setdefault("lora_alpha", 6)
    with torch.random.fork_rng(devices=[]):
        peft_model = get_peft_model(copy.deepcopy(model), LoraConfig(**lora_config), autocast_adapter_dtype=False)
    _train(peft_model, seed, dtype, scale)
    return peft_model.eval()


def load_peft(model: PreTrainedModel, directory: Path) -> PeftModel:
    """PEFT's own view of an adapter directory over a copy of `model`: PEFT widens the tensors to the model's dtype."""
    return PeftModel.from_pretrained(copy.deepcopy(model), str(directory), autocast_adapter_dtype=False).eval()


def sample_inputs(rows: int = 3, length: int = 7, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Token ids and a full attention mask, both (rows, length)."""
    ids = torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def outputs(model: torch.nn.Module, inputs: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    """Logits, or the last hidden state of a model without a head: (rows, length or labels, …)."""
    result = model(**(inputs or sample_inputs()))
    found: torch.Tensor = result.logits if "logits" in result else result.last_hidden_state
    return found


@torch.no_grad()
def _train(model: PeftModel, seed: int, dtype: torch.dtype, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if not parameter.requires_grad:
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        if "lora_" in name and "lora_magnitude" not in name:
            parameter.copy_(scale * noise)
        else:
            parameter.copy_(parameter * (1 + 0.1 * noise) + 0.05 * noise)
        parameter.data = parameter.data.to(dtype)


def _targets_of(model: PreTrainedModel) -> tuple[str, ...]:
    return {"llama": LLAMA_TARGETS, "bert": BERT_TARGETS, "gpt2": GPT2_TARGETS}[model.config.model_type]


def _seeded(build: Callable[[], PreTrainedModel], seed: int) -> PreTrainedModel:
    """`build` under a seed, the global generator put back; every bias is made to differ from its zero start."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build().eval().requires_grad_(False)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


def _bert_config() -> BertConfig:
    return BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=64,
        num_labels=3,
    )


@cache
def _llama(seed: int) -> PreTrainedModel:
    config = LlamaConfig(**SHAPE, max_position_embeddings=128)
    return _seeded(lambda: LlamaForCausalLM(config), seed)


@cache
def _bert(seed: int) -> PreTrainedModel:
    return _seeded(lambda: BertModel(_bert_config()), seed)


@cache
def _bert_classifier(seed: int) -> PreTrainedModel:
    return _seeded(lambda: BertForSequenceClassification(_bert_config()), seed)


@cache
def _gpt2(seed: int) -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=HIDDEN,
        n_layer=LAYERS,
        n_head=4,
        n_positions=128,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.5,
    )
    return _seeded(lambda: GPT2LMHeadModel(config), seed)
