"""Modules that stand in for a base model's own and add what the current batch's gates ask for.

The wrapped module is kept untouched inside, so taking the wrapper out gives the base model back bit for bit. A wrapper
does not know rows or gates: it asks the `GateContext` that all wrappers of one model share.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from arrowmoe.lora.kernels import LowRank, add_by_row, add_concatenated, add_up

if TYPE_CHECKING:
    from arrowmoe.lora.plan import Plan


@dataclass(frozen=True, kw_only=True, eq=False)
class Slot:
    """What one adapter holds for one module.

    `low_rank` is B A. `rescale` (d_out,) is DoRA's magnitude / ‖W + s B A‖ minus one, by which the base output without
    its bias grows (arXiv:2402.09353, eq. 5; B already carries the factor). `bias` (d_out,) is the adapter's bias minus
    the base's. So a gate of g adds g times the adapter's whole contribution.
    """

    low_rank: LowRank | None = None
    rescale: Tensor | None = None
    bias: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """All tensors held."""
        low_rank = [] if self.low_rank is None else [self.low_rank.a, self.low_rank.b]
        return low_rank + [tensor for tensor in (self.rescale, self.bias) if tensor is not None]


@dataclass(eq=False)
class GateContext:
    """The plan of the batch in flight, shared by all wrappers of one model; None computes the bare base model."""

    plan: Plan | None = field(default=None)


class _Slotted(nn.Module):
    """Slots by adapter; holds them outside the module's parameters, so that the base model's state stays its own."""

    def __init__(self, base: nn.Module, path: str, context: GateContext) -> None:
        super().__init__()
        self.base = base
        self.path = path
        self.context = context
        self.slots: dict[str, Slot] = {}


class LoRALinear(_Slotted):
    """A linear module with slots: y = W x + b + Σₖ gₖ · (sₖ Bₖ Aₖ x + DoRA and bias terms).

    Wraps `nn.Linear` and transformers' `Conv1D` (GPT-2). Inputs are (rows, …, d_in), where rows are the batch's.
    """

    base: nn.Linear | Conv1D

    @property
    def weight(self) -> Tensor:
        """The base's weight; some models read a module's weight or dtype directly."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The base's bias, or None."""
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (rows, …, d_in) → (rows, …, d_out)."""
        y: Tensor = self.base(x)
        plan = self.context.plan
        if plan is None or plan.is_empty(self):
            return y
        plan.check_rows(self, x)
        return _add_vectors(y, plan, self, _add_low_rank(y, x, plan, self))


class LoRAEmbedding(_Slotted):
    """An embedding with slots: y = W[i] + Σₖ gₖ sₖ Bₖ Aₖ[:, i]; ids are (rows, tokens)."""

    base: nn.Embedding

    @property
    def weight(self) -> Tensor:
        """The base's table, which an output head may share."""
        return self.base.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (rows, tokens) → (rows, tokens, d_out)."""
        y: Tensor = self.base(ids)
        plan = self.context.plan
        if plan is None or plan.is_empty(self):
            return y
        plan.check_rows(self, ids)
        layout = plan.concatenated(self)
        return add_up(y, nn.functional.embedding(ids, layout.a.T), layout)


class LoRABias(_Slotted):
    """A module that is not linear but ends in adding a bias (a LayerNorm), with slots for that bias."""

    base: nn.LayerNorm

    @property
    def weight(self) -> Tensor:
        """The base's weight."""
        return self.base.weight

    @property
    def bias(self) -> Tensor:
        """The base's bias."""
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (rows, …, d) → (rows, …, d_out)."""
        y: Tensor = self.base(x)
        plan = self.context.plan
        if plan is None or plan.is_empty(self):
            return y
        plan.check_rows(self, x)
        return _add_vectors(y, plan, self, y)


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
    """The weight as (d_out, d_in); `Conv1D` keeps it transposed."""
    return module.weight.T if isinstance(module, Conv1D) else module.weight


def _add_low_rank(y: Tensor, x: Tensor, plan: Plan, module: LoRALinear) -> Tensor:
    if not plan.has_low_rank(module):
        return y
    if plan.prefers_rows(module, x):
        return add_by_row(y, x, plan.by_row(module))
    return add_concatenated(y, x, plan.concatenated(module))


def _add_vectors(base_output: Tensor, plan: Plan, module: LoRALinear | LoRABias, y: Tensor) -> Tensor:
    """Add DoRA's rescaling of the base output (without its bias) and the change of bias to `y`."""
    rescale, bias = plan.vectors(module)
    if rescale is not None:
        weighted = base_output if module.bias is None else base_output - module.bias
        y = torch.addcmul(y, _spread(rescale, y), weighted)
    if bias is not None:
        y = y + _spread(bias, y)
    return y


def _spread(vectors: Tensor, like: Tensor) -> Tensor:
    """(rows, d) → (rows, 1 …, d) with as many dimensions as `like`."""
    return vectors.view(vectors.shape[0], *[1] * (like.dim() - 2), vectors.shape[1])
