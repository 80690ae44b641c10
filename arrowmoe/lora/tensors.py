"""From a card's bytes to torch tensors: the only place that knows both."""

from __future__ import annotations

import warnings
from functools import cache

import torch

from registry.tensor import DType
from registry.tensor import Tensor as CardTensor

_TORCH = {DType.FLOAT32: torch.float32, DType.FLOAT16: torch.float16, DType.BFLOAT16: torch.bfloat16}


def to_torch(tensor: CardTensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`tensor` as `dtype` on `device`; where nothing has to change it lies over the card's own bytes."""
    if tensor.dtype.bits is not None:
        return torch.from_numpy(tensor.float32()).to(device=device, dtype=dtype)
    _hush()
    flat = torch.frombuffer(tensor.data, dtype=_TORCH[tensor.dtype])
    return flat.view(tensor.shape).to(device=device, dtype=dtype)


@cache
def _hush() -> None:
    """Have torch say now, unheard, what it says once a process: that a buffer is not writable.

    A card's bytes are read-only and may be a mapped file; nothing ever writes to a loaded adapter.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        torch.frombuffer(bytes(4), dtype=torch.float32)
