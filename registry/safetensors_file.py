"""The safetensors layout, read and written as raw bytes: the registry has no torch, and numpy has no bfloat16.

A file is the header's length (8 bytes, little-endian), the header (JSON: name → dtype, shape, data_offsets), then the
data. As the reference parser does, reading demands that the tensors cover the data without a hole or an overlap;
writing gives the bytes that the reference writer gives. Weights are read, not mapped: the directory belongs to
somebody else, and a mapped file that its owner writes anew would change under a card that was already verified.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

from registry.errors import CardFormatError, CardLimitError, UnsupportedAdapterError
from registry.tensor import DType

MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 65_536
MAX_KEY_LENGTH = 1024
_LENGTH_BYTES = 8
_METADATA = "__metadata__"
# In the order in which the reference writer lays them out.
_DTYPES = {"F32": DType.FLOAT32, "BF16": DType.BFLOAT16, "F16": DType.FLOAT16}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class RawTensor:
    """A tensor under its key; `data` is little-endian and C-contiguous."""

    key: str
    dtype: DType
    shape: tuple[int, ...]
    data: memoryview


def read_tensors(path: Path, *, max_bytes: int) -> tuple[tuple[RawTensor, ...], dict[str, str]]:
    """The tensors of the file and its metadata.

    Raises `CardLimitError` before more than `max_bytes` are read, `CardFormatError` for a damaged file, and
    `UnsupportedAdapterError` for a dtype that a card cannot hold.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise CardLimitError(f"expected at most {max_bytes} bytes in {path.name}, got {size}")
        header = _read_header(file, size, path.name)
        data = memoryview(file.read()).toreadonly()
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict):
        raise CardFormatError(f"{path.name}: expected {_METADATA} to be an object, so the file is damaged")
    if len(header) > MAX_TENSORS:
        raise CardLimitError(f"expected at most {MAX_TENSORS} tensors in {path.name}, got {len(header)}")
    longest = max(map(len, header), default=0)
    if longest > MAX_KEY_LENGTH:
        raise CardLimitError(f"expected keys of at most {MAX_KEY_LENGTH} characters in {path.name}, got {longest}")
    spans = {key: _span_of(key, entry) for key, entry in header.items()}
    _check_cover(spans.values(), data.nbytes, path.name)
    return tuple(_raw_tensor(key, header[key], data[slice(*span)]) for key, span in spans.items()), metadata


def write_tensors(file: IO[bytes], tensors: Iterable[RawTensor], metadata: Mapping[str, str]) -> None:
    """Write `tensors` to an open file, in the order and with the padding of the reference writer."""
    order = list(_CODES)
    ordered = sorted(tensors, key=lambda tensor: (order.index(tensor.dtype), tensor.key))
    header: dict[str, Any] = {_METADATA: dict(metadata)}
    offset = 0
    for tensor in ordered:
        span = [offset, offset + tensor.data.nbytes]
        header[tensor.key] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        offset = span[1]
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    file.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
    for tensor in ordered:
        file.write(tensor.data)


def _read_header(file: IO[bytes], size: int, name: str) -> dict[str, Any]:
    length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    if size < _LENGTH_BYTES or length > size - _LENGTH_BYTES:
        raise CardFormatError(f"{name} is not a safetensors file, or is cut off: {size} bytes, header of {length}")
    if length > MAX_HEADER_BYTES:
        raise CardLimitError(f"expected a header of at most {MAX_HEADER_BYTES} bytes in {name}, got {length}")
    try:
        header = json.loads(file.read(length), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise CardFormatError(f"the header of {name} is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise CardFormatError(f"expected the header of {name} to be an object, got {type(header).__name__}")
    return header


def _span_of(key: str, entry: Any) -> tuple[int, int]:
    """Where the tensor lies in the data, after a check of the entry's form."""
    match entry:
        case {"dtype": str(), "shape": [*shape], "data_offsets": [begin, end]} if all(
            type(number) is int and number >= 0 for number in (*shape, begin, end)
        ):
            return begin, end
    raise CardFormatError(f"tensor {key!r}: expected dtype, shape and data_offsets, got {str(entry)[:80]}")


def _check_cover(spans: Iterable[tuple[int, int]], nbytes: int, name: str) -> None:
    covered = 0
    for begin, end in sorted(spans):
        if begin != covered or end < begin:
            raise CardFormatError(f"{name}: expected a tensor at byte {covered} of the data, got one at {begin}")
        covered = end
    if covered != nbytes:
        raise CardFormatError(f"{name}: expected {covered} bytes of data, got {nbytes}, so the file is damaged")


def _raw_tensor(key: str, entry: Mapping[str, Any], data: memoryview) -> RawTensor:
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is None:
        raise UnsupportedAdapterError(
            f"tensor {key!r} has dtype {entry['dtype'][:16]}, and a card holds only {', '.join(_DTYPES)}",
            hint="convert the adapter to float32, float16 or bfloat16 and save it again",
        )
    shape = tuple(entry["shape"])
    if prod(shape) * dtype.itemsize != data.nbytes:
        raise CardFormatError(f"tensor {key!r}: {data.nbytes} bytes do not fit {dtype} of shape {shape}")
    return RawTensor(key=key, dtype=dtype, shape=shape, data=data)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"key {twice!r} stands twice")
    return fields
