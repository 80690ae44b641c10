"""A slot: what one adapter holds for one module."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from arrowmoe.lora.kernels import LowRank


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
