"""Loads one damaged file after the other in a process of its own, for a crash here would take the test run with it.

`python -m tests.registry.corruption_worker CARD MODE COUNT` prints one JSON line. Memory: the address space may grow by
no more than `ADDRESS_SPACE_BYTES`, so an allocation by a length out of a damaged file fails; the peak is reported.
"""

from __future__ import annotations

import json
import random
import resource
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from registry.errors import CardError
from registry.format import LoRAFormat
from tests.memory import forget_peak, peak_bytes, resident_bytes

SEED = 20_261_121
ADDRESS_SPACE_BYTES = 256 << 20


def truncations(data: bytes) -> Iterator[bytes]:
    """Every proper prefix."""
    return (data[:size] for size in range(len(data)))


def corruptions(data: bytes, count: int) -> Iterator[bytes]:
    """`count` damaged copies, the same ones at every run."""
    generator = random.Random(SEED)
    kinds = (
        bit_flips,
        bytes_overwritten,
        integer_overwritten,
        block_zeroed,
        block_doubled,
        blocks_swapped,
        cut_out,
        manifest_changed,
    )
    for index in range(count):
        yield bytes(kinds[index % len(kinds)](bytearray(data), generator))


def place(data: bytearray, generator: random.Random) -> int:
    """Anywhere, or in a header, or in the weights, or in the footer's list of batches."""
    end = len(data)
    spans = [(0, end), (0, 128), (end // 2 - 1024, end // 2 + 1024), (end - 700, end)]
    start, stop = generator.choice(spans)
    return generator.randrange(max(0, start), stop)


def manifest_changed(data: bytearray, generator: random.Random) -> bytearray:
    """The same damage in both copies of the manifest, so that it is not their difference that is noticed."""
    first, second = data.index(b'{"adapter"'), data.rindex(b'{"adapter"')
    at, value = generator.randrange(data.index(b"}]", first) - first), generator.randrange(256)
    data[first + at] = data[second + at] = value
    return data


def bit_flips(data: bytearray, generator: random.Random) -> bytearray:
    for _ in range(generator.choice([1, 1, 1, 2, 8])):
        data[place(data, generator)] ^= 1 << generator.randrange(8)
    return data


def bytes_overwritten(data: bytearray, generator: random.Random) -> bytearray:
    start = place(data, generator)
    for at in range(start, min(len(data), start + generator.choice([1, 2, 4, 16]))):
        data[at] = generator.randrange(256)
    return data


def integer_overwritten(data: bytearray, generator: random.Random) -> bytearray:
    width = generator.choice([2, 4, 8])
    start = place(data, generator) // width * width
    value = generator.choice([0, 1, -1, 1 << 30, (1 << 31) - 1, -(1 << 31), 1 << 62, 65_535, len(data)])
    data[start : start + width] = (value % (1 << 8 * width)).to_bytes(width, "little")
    return data


def block_zeroed(data: bytearray, generator: random.Random) -> bytearray:
    start, size = place(data, generator), generator.choice([8, 64, 512])
    data[start : start + size] = bytes(len(data[start : start + size]))
    return data


def block_doubled(data: bytearray, generator: random.Random) -> bytearray:
    start, size = place(data, generator) // 8 * 8, generator.choice([8, 24, 64, 512])
    data[start:start] = data[start : start + size]
    return data


def blocks_swapped(data: bytearray, generator: random.Random) -> bytearray:
    size = generator.choice([8, 16, 64])
    one, other = (min(place(data, generator), len(data) - size) // 8 * 8 for _ in range(2))
    data[one : one + size], data[other : other + size] = data[other : other + size], data[one : one + size]
    return data


def cut_out(data: bytearray, generator: random.Random) -> bytearray:
    start = place(data, generator)
    del data[start : start + generator.choice([1, 8, 64, 512])]
    return data


def address_space_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def outcome(path: Path, original: Path, memory_map: bool) -> str:
    """An error's class, or "equal"; a card that differs in one bit is an `AssertionError`."""
    try:
        card = LoRAFormat.load(path, memory_map=memory_map)
    except CardError as error:
        return type(error).__name__
    expected = LoRAFormat.load(original)
    assert card.manifest_bytes == expected.manifest_bytes
    assert [bytes(tensor.data) for tensor in card.tensors] == [bytes(tensor.data) for tensor in expected.tensors]
    return "equal"


def main(original: Path, mode: str, count: int) -> None:
    data = original.read_bytes()
    damaged = original.with_name("damaged.lora.arrow")
    for memory_map in (True, False):
        assert outcome(original, original, memory_map) == "equal"
    limit = address_space_bytes() + ADDRESS_SPACE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    forget_peak()
    before, outcomes = resident_bytes(), Counter[str]()
    for index, content in enumerate(truncations(data) if mode == "truncations" else corruptions(data, count)):
        damaged.write_bytes(content)
        outcomes[outcome(damaged, original, memory_map=index % 2 == 0)] += 1
    print(json.dumps({"outcomes": outcomes, "growth_bytes": peak_bytes() - before}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
