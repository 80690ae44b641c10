"""Tiny causal models of several kinds of cache and position, and what transformers itself answers with them."""

from __future__ import annotations

import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from arrowmoe.base_model import BaseModel
from tests.peft_models import VOCABULARY

SIZES = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "pad_token_id": 0, "eos_token_id": 1}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}


def greedy(model: torch.nn.Module, tiny: BaseModel, prompt: str, new_tokens: int) -> list[int]:
    """What transformers' own greedy search adds to `prompt`, alone in its batch."""
    ids = torch.tensor([tiny.tokenizer(prompt)["input_ids"]])
    mask = torch.ones_like(ids)
    ends = {"eos_token_id": tiny.tokenizer.eos_token_id, "pad_token_id": tiny.tokenizer.pad_token_id}
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, **ends)
    return out[0, ids.shape[1] :].tolist()


def tiny_mistral() -> PreTrainedModel:
    """A causal model that sees four tokens back."""
    return MistralForCausalLM(MistralConfig(**SIZES, **HEADS, intermediate_size=32, sliding_window=4)).eval()


def tiny_bloom() -> PreTrainedModel:
    """A causal model without position ids."""
    return BloomForCausalLM(BloomConfig(**SIZES, n_head=4, initializer_range=0.2)).eval()


def tiny_lfm() -> PreTrainedModel:
    """A causal model with a convolution's state beside attention's keys and values."""
    types = ["conv", "full_attention"]
    return Lfm2ForCausalLM(Lfm2Config(**SIZES, **HEADS, intermediate_size=32, layer_types=types)).eval()
