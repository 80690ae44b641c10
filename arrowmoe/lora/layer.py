"""Modules that stand in for a base model's own and add what the current batch's gates ask for.

The wrapped module is kept untouched inside, so taking the wrapper out gives the base model back bit for bit. A wrapper
does not know rows or gates: it asks the `GateContext` that all wrappers of one model share.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from arrowmoe.errors import UnsupportedCardError
from arrowmoe.lora.plan import Plan, Share
from arrowmoe.lora.slots import Slot
from arrowmoe.quantised_bases import is_packed, unpacked
from evolution.gated import add_up


@dataclass(eq=False)
class GateContext:
    """The plan of the batch in flight, shared by all wrappers of one model; None computes the bare base model."""

    plan: Plan | None = field(default=None)


class Slotted(nn.Module):
    """Slots by adapter; holds them outside the module's parameters, so that the base model's state stays its own."""

    def __init__(self, base: nn.Module, path: str, context: GateContext) -> None:
        super().__init__()
        self.base = base
        self.path = path
        self.context = context
        self.slots: dict[str, Slot] = {}

    def __getattr__(self, name: str) -> Any:
        """Models read a module's weight, its dtype or its sizes directly; they are the base's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def share(self) -> Share | None:
        """What the adapters of the batch in flight add here, if there is a batch and it has any here."""
        plan = self.context.plan
        return None if plan is None else plan.at(self.path, self.slots)


class LoRALinear(Slotted):
    """A linear module with slots: y = W x + b + Σₖ gₖ · (sₖ Bₖ Aₖ x + DoRA and bias terms).

    Wraps `nn.Linear` and transformers' `Conv1D` (GPT-2). Inputs are (rows, …, d_in), where rows are the batch's.
    """

    base: nn.Linear | Conv1D

    def forward(self, x: Tensor) -> Tensor:
        """x (rows, …, d_in) → (rows, …, d_out)."""
        base = cast("nn.Linear | Conv1D", self._modules["base"])  # looked up in vain by two `__getattr__` as self.base
        y: Tensor = base(x)
        share = self.share()
        return y if share is None else share.add(y, x, base.bias if share.rescales else None)


class LoRAEmbedding(Slotted):
    """An embedding with slots: y = W[i] + Σₖ gₖ sₖ Bₖ Aₖ[:, i]; ids are (rows, tokens)."""

    base: nn.Embedding

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (rows, tokens) → (rows, tokens, d_out)."""
        y: Tensor = self.base(ids)
        share = self.share()
        if share is None:
            return y
        share.check_rows(ids.shape)
        layout = share.concatenated()
        return add_up(y, nn.functional.embedding(ids, layout.a.T), layout)


class LoRABias(Slotted):
    """A module that is not linear but ends in adding a bias (a LayerNorm), with slots for that bias."""

    base: nn.LayerNorm

    def forward(self, x: Tensor) -> Tensor:
        """x (rows, …, d) → (rows, …, d)."""
        base = self.base
        y: Tensor = base(x)
        share = self.share()
        return y if share is None else share.add(y, x, base.bias if share.rescales else None)


Wrapper = LoRALinear | LoRAEmbedding | LoRABias


def shape_of(module: nn.Module) -> tuple[int, int] | None:
    """(d_in, d_out) of a module that LoRA can target, else None."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    return None


def dense_weight(module: nn.Linear | Conv1D) -> Tensor:
    """The weight as (d_out, d_in); `Conv1D` keeps it transposed, a quantised module packed."""
    if is_packed(module):
        return unpacked(module).to(dtype_of(module))
    return module.weight.T if isinstance(module, Conv1D) else module.weight


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype in which adapters of a module are computed: its weight's, unless that is packed.

    Raises `UnsupportedCardError` for a quantised module that does not say one.
    """
    weight = module.get_parameter("weight")
    if weight.is_floating_point():
        return weight.dtype
    dtype = getattr(module, "compute_dtype", None)
    if not isinstance(dtype, torch.dtype):
        raise UnsupportedCardError(
            f"expected a quantised module that says what it computes in, got {type(module).__name__} that does not",
            hint="load the base model by load_base_model(..., quantise='8bit')",
        )
    return dtype
