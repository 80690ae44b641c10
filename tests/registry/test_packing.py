"""Numbers in 8 and 4 bits: the codes are those of bitsandbytes, errors stay within half a step, hostile scales show."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from bitsandbytes import functional
from hypothesis import given
from hypothesis import strategies as st

from registry.packing import GROUP, Packing

Floats = npt.NDArray[np.float32]


def numbers(count: int, length: int, seed: int = 0, scale: float = 1.0) -> Floats:
    return (scale * np.random.default_rng(seed).standard_normal((count, length))).astype(np.float32)


def packed(bits: int, vectors: Floats) -> tuple[Packing, memoryview]:
    packing = Packing(bits=8 if bits == 8 else 4, count=len(vectors), length=vectors.shape[1])
    return packing, memoryview(packing.pack(vectors))


def greatest(vectors: Floats) -> Floats:
    """Of every number the greatest magnitude in its group."""
    starts = range(0, vectors.shape[1], GROUP)
    parts = [vectors[:, start : start + GROUP] for start in starts]
    return np.hstack([np.broadcast_to(np.abs(part).max(axis=1, keepdims=True), part.shape) for part in parts])


def test_four_bits_are_those_of_bitsandbytes() -> None:
    vectors = numbers(3, 4 * GROUP)
    packing, data = packed(4, vectors)
    theirs, state = functional.quantize_4bit(torch.from_numpy(vectors), blocksize=GROUP, quant_type="nf4")
    assert bytes(data[packing.scales_nbytes :]) == theirs.numpy().tobytes()
    assert np.frombuffer(data[: packing.scales_nbytes], "<f4").tolist() == state.absmax.tolist()
    np.testing.assert_array_equal(packing.unpack(data), functional.dequantize_4bit(theirs, state).numpy())


@given(
    count=st.integers(1, 5),
    length=st.integers(1, 200),
    seed=st.integers(0, 99),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e30]),
)
def test_eight_bits_miss_at_most_half_a_step(count: int, length: int, seed: int, scale: float) -> None:
    vectors = numbers(count, length, seed, scale)
    packing, data = packed(8, vectors)
    missed = np.abs(packing.unpack(data).astype(np.float64) - vectors)
    assert np.all(missed <= greatest(vectors) / 127 * (0.5 + 1e-4))


@given(count=st.integers(1, 5), half=st.integers(1, 100), seed=st.integers(0, 99))
def test_four_bits_miss_at_most_half_the_widest_gap(count: int, half: int, seed: int) -> None:
    vectors = numbers(count, 2 * half, seed)
    packing, data = packed(4, vectors)
    widest = 1 - 0.6961928009986877  # between the first two values of NF4
    assert np.all(np.abs(packing.unpack(data) - vectors) <= greatest(vectors) * (widest / 2 + 1e-4))


@pytest.mark.parametrize("bits", [8, 4])
def test_zeros_and_the_greatest_of_a_group_are_kept(bits: int) -> None:
    vectors = np.zeros((2, 2 * GROUP + 2), dtype=np.float32)
    vectors[0, 5], vectors[1, GROUP] = 3.0, -0.25
    packing, data = packed(bits, vectors)
    np.testing.assert_allclose(packing.unpack(data), vectors, rtol=1e-6)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("count", "length"), [(1, 2), (3, GROUP), (2, GROUP + 2), (2, (1 << 16) + 6), (2, 0)])
def test_its_size_and_its_pieces(bits: int, count: int, length: int) -> None:
    packing, data = packed(bits, numbers(count, length))
    groups = (length + GROUP - 1) // GROUP
    assert packing.nbytes == len(data) == count * (4 * groups + length * bits // 8)
    pieces = list(packing.pieces(data))
    assert all(piece.size <= 1 << 16 for piece in pieces)
    flat = np.concatenate([*pieces, np.zeros(0, np.float32)])
    np.testing.assert_array_equal(flat, packing.unpack(data).ravel())


@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_scale_that_makes_no_number_shows(bits: int, scale: float) -> None:
    packing, data = packed(bits, numbers(2, 3 * GROUP))
    assert packing.scales_are_sound(data)
    bad = bytearray(data)
    bad[packing.scales_nbytes - 4 : packing.scales_nbytes] = np.float32(scale).tobytes()
    assert not packing.scales_are_sound(memoryview(bad))


def test_whatever_the_codes_sound_scales_make_numbers() -> None:
    packing = Packing(bits=8, count=1, length=GROUP)
    data = np.float32(np.finfo(np.float32).max / 128).tobytes() + bytes([0x80]) * GROUP
    assert packing.scales_are_sound(memoryview(data))
    assert np.isfinite(packing.unpack(memoryview(data))).all()
