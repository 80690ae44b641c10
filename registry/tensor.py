"""One tensor of a card: its place in the model, its form, and its bytes.

The bytes are little-endian and C-contiguous. This floor has no torch, and numpy has no bfloat16, so `data` is the
truth and `float32()` what it says; the engine makes torch tensors from the `data` of plain elements without a copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import prod
from typing import Literal

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

from registry.errors import CardFormatError
from registry.packing import Packing


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
    INT8 = "int8"
    """Of A and B only: codes of 8 bits in groups along each of the rank's vectors, a scale a group (`packing`)."""
    NF4 = "nf4"
    """The same in 4 bits."""

    @property
    def itemsize(self) -> int:
        """Bytes of one element, or of one scale where elements are packed: data begins at a multiple of it."""
        return 2 if self in (DType.FLOAT16, DType.BFLOAT16) else 4

    @property
    def bits(self) -> Literal[8, 4] | None:
        """Bits of one code; None for plain elements."""
        return 8 if self is DType.INT8 else 4 if self is DType.NF4 else None


def packing_of(role: Role, dtype: DType, shape: Sequence[int]) -> Packing | None:
    """How elements are packed, None for plain ones: the rank's vectors are A's rows and B's columns.

    Raises `CardFormatError` for a tensor that cannot be.
    """
    if dtype.bits is None:
        return None
    if role not in (Role.A, Role.B) or len(shape) != 2:
        raise CardFormatError(f"expected {dtype} for A and B alone, as matrices, got {role} of shape {tuple(shape)}")
    count, length = shape if role is Role.A else reversed(shape)
    if dtype is DType.NF4 and length % 2:
        raise CardFormatError(f"expected vectors of even length for {dtype}, got {role} of shape {tuple(shape)}")
    return Packing(bits=dtype.bits, count=count, length=length)


def nbytes_of(role: Role, dtype: DType, shape: Sequence[int]) -> int:
    """Size of a tensor's data in bytes. Raises as `packing_of`."""
    packing = packing_of(role, dtype, shape)
    return prod(shape) * dtype.itemsize if packing is None else packing.nbytes


_PIECE_BYTES = 1 << 18
_EXPONENTS = {DType.FLOAT16: 0x7C00, DType.BFLOAT16: 0x7F80}
"""An element is NaN or infinite if and only if all bits of its exponent are set. NumPy is slow at half precision."""


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
        expected = nbytes_of(role, dtype, shape)
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
        """The values as float32, of `shape`: exact for plain elements, a view for float32 and a copy otherwise."""
        if self._packing is not None:
            vectors = self._packing.unpack(self.data)
            return vectors if self.role is Role.A else vectors.T
        return _widened(self.dtype, self.data).reshape(self.shape)

    def pieces(self) -> Iterator[npt.NDArray[np.float32]]:
        """The values as float32, flat, some at a time, so that a tensor of any size takes little memory."""
        if self._packing is not None:
            yield from self._packing.pieces(self.data)
        else:
            yield from (_widened(self.dtype, piece) for piece in self._pieces())

    def is_finite(self) -> bool:
        """Whether no element is NaN or infinite; looks at scales or exponents piece by piece, so it needs no memory."""
        if self._packing is not None:
            return self._packing.scales_are_sound(self.data)
        return all(_is_finite(self.dtype, piece) for piece in self._pieces())

    @property
    def _packing(self) -> Packing | None:
        return packing_of(self.role, self.dtype, self.shape)

    def _pieces(self) -> Iterator[memoryview]:
        return (self.data[start : start + _PIECE_BYTES] for start in range(0, self.nbytes, _PIECE_BYTES))


def _is_finite(dtype: DType, data: memoryview) -> bool:
    if dtype is DType.FLOAT32:
        return bool(np.isfinite(np.frombuffer(data, dtype="<f4")).all())
    mask = _EXPONENTS[dtype]
    return not ((np.frombuffer(data, dtype="<u2") & mask) == mask).any()


def _widened(dtype: DType, data: memoryview) -> npt.NDArray[np.float32]:
    if dtype is DType.BFLOAT16:
        return (np.frombuffer(data, dtype="<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(data, dtype="<f4" if dtype is DType.FLOAT32 else "<f2").astype(np.float32, copy=False)
