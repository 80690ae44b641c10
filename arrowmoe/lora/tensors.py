"""From a card's bytes to torch tensors: the only place that knows both."""

from __future__ import annotations

import warnings

import torch

from registry.tensor import DType
from registry.tensor import Tensor as CardTensor

_TORCH = {DType.FLOAT32: torch.float32, DType.FLOAT16: torch.float16, DType.BFLOAT16: torch.bfloat16}


def to_torch(tensor: CardTensor, like: torch.Tensor) -> torch.Tensor:
    """`tensor` in the dtype and on the device of `like`; where both agree it lies over the card's own bytes."""
    with warnings.catch_warnings():
        # The bytes are read-only and may be a mapped file; nothing ever writes to a loaded adapter.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        flat = torch.frombuffer(tensor.data, dtype=_TORCH[tensor.dtype])
    return flat.view(tensor.shape).to(device=like.device, dtype=like.dtype)
