"""Base models in 8 and 4 bits, by bitsandbytes: the only place that knows how it packs weights.

8 bits are LLM.int8() (arXiv:2208.07339), 4 bits NF4 (arXiv:2305.14314) of which every product is computed in the
model's dtype. Adapters stay in that dtype; their shapes are those of the whole weight, so cards fit as they did.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from arrowmoe.errors import ModelLoadError

Quantise = Literal["8bit", "4bit"]


def quantising(how: Quantise, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` takes so that a model comes quantised. Raises `ModelLoadError` without bitsandbytes."""
    if how not in ("8bit", "4bit"):
        raise ModelLoadError(f"expected 8bit or 4bit, got {how!r}")
    if find_spec("bitsandbytes") is None:
        raise ModelLoadError(
            f"a base model in {how} needs bitsandbytes, which is not installed",
            hint="run: pip install 'arrowmoe[quantised]', or set engine.quantise to none",
        )
    # At every product it says that float32 is cast: thousands of lines for one answer.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if how == "8bit":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": config, "device_map": {"": device}}


def settle(model: nn.Module, dtype: torch.dtype) -> None:
    """Make a model that came quantised ready for adapters in `dtype`."""
    for module in model.modules():
        if is_packed(module):
            module.compute_dtype = cast(Any, dtype)
            # On CPUs with AVX512-BF16 the first pass would repack 4-bit weights, round their scales to bfloat16, and
            # fail at sizes that are not multiples of 32 and 64.
            module.support_avx512bf16_for_cpu = cast(Any, False)


def is_packed(module: nn.Module) -> bool:
    """Whether the elements of a linear module's weight are codes."""
    weight = getattr(module, "weight", None)
    return isinstance(module, nn.Linear) and isinstance(weight, Tensor) and not weight.is_floating_point()


def unpacked(module: nn.Linear) -> Tensor:
    """The weight (d_out, d_in) that packed codes stand for."""
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight  # imports bitsandbytes, so only at need

    weight: Tensor = dequantize_bnb_weight(module.weight, getattr(module, "state", None))
    return weight.reshape(module.out_features, module.in_features)


__all__ = ["Quantise", "is_packed", "quantising", "settle", "unpacked"]
