"""One tensor of a card: its place in the model, its form, and its bytes.

The bytes are little-endian and C-contiguous. This floor has no torch, and numpy has no bfloat16, so `data` is the
truth and `float32()` an exact widening of it; the engine makes torch tensors from `data` without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import prod

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

from registry.errors import CardFormatError


class Role(StrEnum):
    """What a tensor is to its module."""

    A = "A"
    """Down-projection, (rank, d_in); for an embedding (rank, num_embeddings)."""
    B = "B"
    """Up-projection, (d_out, rank)."""
    MAGNITUDE = "magnitude"
    """DoRA's magnitude, (d_out,)."""
    BIAS = "bias"
    """A bias that replaces the module's own, (d_out,)."""
    FULL = "full"
    """A whole parameter that replaces the base model's (PEFT's modules_to_save); `name` is the parameter's path."""
    STATS = "stats"
    """Statistics for the router; no part of the model."""


class DType(StrEnum):
    """Element types whose bits a card keeps."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return 4 if self is DType.FLOAT32 else 2


_PIECE_BYTES = 1 << 18
_EXPONENTS = {DType.FLOAT32: ("<u4", 0x7F800000), DType.FLOAT16: ("<u2", 0x7C00), DType.BFLOAT16: ("<u2", 0x7F80)}
"""An element is NaN or infinite if and only if all bits of its exponent are set."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Tensor:
    """A named tensor; `data` is a read-only view that may lie in a mapped file."""

    name: str
    role: Role
    dtype: DType
    shape: tuple[int, ...]
    data: memoryview

    @classmethod
    def of(cls, name: str, role: Role, dtype: DType, shape: Sequence[int], data: Buffer) -> Tensor:
        """A tensor over the bytes of `data`, not copied. Raises `CardFormatError` if their number does not fit."""
        view = memoryview(data)
        view = view.cast("B").toreadonly() if view.nbytes else memoryview(b"")
        expected = prod(shape) * dtype.itemsize
        if view.nbytes != expected:
            raise CardFormatError(
                f"tensor {name!r} ({role}): expected {expected} bytes for {dtype} of shape {tuple(shape)}, "
                f"got {view.nbytes}"
            )
        return cls(name=name, role=role, dtype=dtype, shape=tuple(shape), data=view)

    @classmethod
    def from_numpy(cls, name: str, role: Role, array: npt.NDArray[np.float32] | npt.NDArray[np.float16]) -> Tensor:
        """A tensor that holds `array`, float32 or float16."""
        contiguous = np.ascontiguousarray(array)
        return cls.of(name, role, DType(str(contiguous.dtype)), contiguous.shape, contiguous.data)

    @property
    def nbytes(self) -> int:
        """Size of `data` in bytes."""
        return self.data.nbytes

    def float32(self) -> npt.NDArray[np.float32]:
        """The values as float32, of `shape`: exact for every dtype, a view for float32 and a copy otherwise."""
        if self.dtype is DType.BFLOAT16:
            bits = np.frombuffer(self.data, dtype="<u2").astype("<u4") << 16
            return bits.view("<f4").reshape(self.shape)
        flat = np.frombuffer(self.data, dtype="<f4" if self.dtype is DType.FLOAT32 else "<f2")
        return flat.astype(np.float32, copy=False).reshape(self.shape)

    def is_finite(self) -> bool:
        """Whether no element is NaN or infinite; looks at exponent bits piece by piece, so it needs no memory."""
        bits, mask = _EXPONENTS[self.dtype]
        pieces = (self.data[start : start + _PIECE_BYTES] for start in range(0, self.nbytes, _PIECE_BYTES))
        return not any(np.any((np.frombuffer(piece, dtype=bits) & mask) == mask) for piece in pieces)
