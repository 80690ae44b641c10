"""A slot: what one adapter holds for one module; and an adapter as all of its slots."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from evolution.gated import LowRank


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

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> list[Tensor]:
        """All tensors held."""
        low_rank = [] if self.low_rank is None else [self.low_rank.a, self.low_rank.b]
        return low_rank + [tensor for tensor in (self.rescale, self.bias) if tensor is not None]

    def to(self, device: torch.device) -> Slot:
        """The same on `device`; from pinned memory the copy overlaps what the device computes."""
        if all(tensor.device == device for tensor in self.tensors()):
            return self
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Slot:
        """The same in pinned host memory, from which a CUDA device copies without waiting."""
        return self._mapped(lambda tensor: tensor.pin_memory())

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Slot:
        low = self.low_rank
        return Slot(
            low_rank=None if low is None else LowRank(a=change(low.a), b=change(low.b), scaling=low.scaling),
            rescale=None if self.rescale is None else change(self.rescale),
            bias=None if self.bias is None else change(self.bias),
        )


Slots = Mapping[str, Slot]


@dataclass(frozen=True, kw_only=True)
class LoadedLoRA:
    """An adapter that a model can compute: its card, the modules it is in, and the bytes its slots take."""

    name: str
    digest: str
    modules: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedLoRA:
    """An adapter that fits, its slots in host memory by module path."""

    entry: LoadedLoRA
    slots: Slots
