"""Numbers in 8 and 4 bits: codes in groups of 64, each group with the scale that its greatest number sets.

Packed are vectors of one length: first all scales, float32, group by group, vector by vector; then all codes in the
same order. The last group of a vector may be shorter. Pure arithmetic; knows no tensor and no card.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

GROUP = 64
"""For 8 bits a fifth less error than one scale a vector, for 5 % more bytes (on the demo's cards: ADR 0033)."""

SCALE_BYTES = 4
MAX_SCALE = float(np.finfo(np.float32).max) / 128
"""The greatest scale at which every code still is a finite float32."""

_PIECE_ELEMENTS = 1 << 16  # whole groups
_GREATEST = 127
# NF4: quantiles of a normal distribution, zero among them (QLoRA, arXiv:2305.14314, appendix E).
_NF4 = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    dtype=np.float32,
)
_BORDERS = (_NF4[1:] + _NF4[:-1]) / 2

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Packing:
    """`count` vectors of `length` numbers in `bits` bits each.

    8 bits: scale · code, where `pack` uses -127 to 127. 4 bits: scale · NF4[code]; `length` is even, and a byte holds
    two, the first one in its high half.
    """

    bits: Literal[8, 4]
    count: int
    length: int

    @property
    def groups(self) -> int:
        """Scales of one vector."""
        return -(-self.length // GROUP)

    @property
    def scales_nbytes(self) -> int:
        """Bytes of all scales, which come first."""
        return self.count * self.groups * SCALE_BYTES

    @property
    def nbytes(self) -> int:
        """Bytes of scales and codes."""
        return self.scales_nbytes + self.count * self._row_nbytes

    @property
    def _row_nbytes(self) -> int:
        return self.length * self.bits // 8

    def pack(self, vectors: Floats) -> bytes:
        """`vectors` (count, length), finite, as bytes."""
        padded = np.zeros((self.count, self.groups * GROUP), dtype=np.float32)
        padded[:, : self.length] = vectors
        grouped = padded.reshape(self.count, self.groups, GROUP)
        scales = np.abs(grouped).max(axis=2, initial=0) / np.float32(_GREATEST if self.bits == 8 else 1)
        steps = scales[:, :, None]
        ratios = np.divide(grouped, steps, out=np.zeros_like(grouped), where=steps > 0)
        codes = self._nearest(ratios).reshape(self.count, -1)[:, : self.length]
        stored = codes if self.bits == 8 else (codes[:, ::2] << 4) | codes[:, 1::2]
        return bytes(scales.astype("<f4").tobytes() + stored.tobytes())

    def _nearest(self, ratios: Floats) -> npt.NDArray[np.int8] | npt.NDArray[np.uint8]:
        if self.bits == 8:
            return np.clip(np.rint(ratios), -_GREATEST, _GREATEST).astype(np.int8)
        return np.searchsorted(_BORDERS, ratios).astype(np.uint8)

    def unpack(self, data: memoryview) -> Floats:
        """The numbers (count, length)."""
        return self._numbers(*self._parts(data))

    def pieces(self, data: memoryview) -> Iterator[Floats]:
        """The numbers, flat and in order, some at a time, so that it takes little memory."""
        scales, codes = self._parts(data)
        for row in range(self.count):
            for start in range(0, self.length, _PIECE_ELEMENTS):
                groups = slice(start // GROUP, (start + _PIECE_ELEMENTS) // GROUP)
                part = slice(start * self.bits // 8, (start + _PIECE_ELEMENTS) * self.bits // 8)
                yield self._numbers(scales[row : row + 1, groups], codes[row : row + 1, part])[0]

    def scales_are_sound(self, data: memoryview) -> bool:
        """Whether every scale is a number at which every code is finite."""
        ends = range(0, self.scales_nbytes, _PIECE_ELEMENTS)
        parts = (data[start : min(start + _PIECE_ELEMENTS, self.scales_nbytes)] for start in ends)
        # NaN compares as false.
        return all(bool(np.all(np.abs(np.frombuffer(part, dtype="<f4")) <= MAX_SCALE)) for part in parts)

    def _parts(self, data: memoryview) -> tuple[Floats, npt.NDArray[np.uint8]]:
        scales = np.frombuffer(data[: self.scales_nbytes], dtype="<f4").reshape(self.count, self.groups)
        codes = np.frombuffer(data[self.scales_nbytes :], dtype=np.uint8).reshape(self.count, self._row_nbytes)
        return scales, codes

    def _numbers(self, scales: Floats, codes: npt.NDArray[np.uint8]) -> Floats:
        """Codes (n, bytes) under scales (n, groups) as numbers (n, length of these)."""
        if self.bits == 8:
            numbers = codes.view(np.int8).astype(np.float32)
        else:
            numbers = _NF4[np.stack([codes >> 4, codes & 15], axis=2).reshape(len(codes), -1)]
        numbers *= np.repeat(scales, GROUP, axis=1)[:, : numbers.shape[1]]
        return numbers
