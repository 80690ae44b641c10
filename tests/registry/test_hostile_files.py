"""Files made by hand to do harm. Where it is cheap, a test shows first that plain Arrow would have taken the bait."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from registry.card import LoRACard
from registry.errors import CardError, CardFormatError, CardIntegrityError, CardLimitError
from registry.format import SCHEMA, LoRAFormat, card_batches
from registry.identity import Identity
from registry.tensor import Role, Tensor
from tests.registry.cards import module_shapes, small_card
from tests.registry.hostile import (
    BLOCK,
    blocks_of,
    footer_of,
    offsets_of,
    refused,
    replaced_once,
    with_first_tensor,
    write,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "card.lora.arrow"


def test_the_helper_itself_writes_a_card(path: Path) -> None:
    assert LoRAFormat.load(write(path, small_card())) == small_card()


# The container.


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_a_compressed_bomb_is_refused_unopened(path: Path, codec: str) -> None:
    bomb = small_card(modules={"m": (2_000_000, 8)})
    zeros = replace(bomb, tensors=tuple(replace(t, data=memoryview(bytes(t.nbytes))) for t in bomb.tensors))
    write(path, zeros, compression=codec)
    assert path.stat().st_size < bomb.nbytes / 50
    with pa.memory_map(str(path)) as source:
        before = pa.total_allocated_bytes()
        batch = pa.ipc.open_file(source).get_batch(0)
        assert pa.total_allocated_bytes() - before > bomb.nbytes / 2
        del batch
    before = pa.total_allocated_bytes()
    refused(path, CardFormatError, "compressed")
    assert pa.total_allocated_bytes() - before < 1 << 20


def test_metadata_of_8_mib_is_refused(path: Path) -> None:
    write(path, small_card(), metadata={b"arrowmoe.signature": b"x" * (8 << 20)})
    refused(path, CardLimitError, "footer of at most")


def test_metadata_a_little_over_the_limit_is_refused(path: Path) -> None:
    write(path, small_card(), metadata={b"arrowmoe.signature": b"x" * (1 << 20)})
    refused(path, CardLimitError, "metadata of at most 1048576 bytes")


def test_a_footer_that_claims_200_mib_is_refused_unread(path: Path) -> None:
    with path.open("wb") as file:
        file.write(b"ARROW1\0\0")
        file.truncate(200 << 20)
        file.seek(0, io.SEEK_END)
        file.write(struct.pack("<i", (200 << 20) - 64) + b"ARROW1")
    before = pa.total_allocated_bytes()
    refused(path, CardLimitError, "footer of at most")
    assert pa.total_allocated_bytes() - before < 1 << 20


def test_a_schema_message_that_claims_200_mib_is_refused(path: Path) -> None:
    data = bytearray(write(path, small_card()).read_bytes())
    data[12:16] = struct.pack("<i", 200 << 20)
    path.write_bytes(data)
    refused(path, CardLimitError, "schema of at most")


def test_a_footer_with_another_manifest_is_refused(path: Path) -> None:
    one = write(path, small_card(description="one")).read_bytes()
    two = write(path, small_card(description="two")).read_bytes()
    mixed = one[: footer_of(one)[0]] + two[footer_of(two)[0] :]
    path.write_bytes(mixed)
    as_file = pa.ipc.open_file(pa.py_buffer(mixed)).schema.metadata
    as_stream = pa.ipc.open_stream(pa.py_buffer(mixed[8:])).schema.metadata
    assert as_file != as_stream
    refused(path, CardFormatError, "would see different cards")


def test_a_footer_with_other_columns_is_refused(path: Path) -> None:
    data = write(path, small_card()).read_bytes()
    start, _ = footer_of(data)
    path.write_bytes(data[:start] + replaced_once(data[start:], b"role\0", b"rope\0"))
    assert pa.ipc.open_file(path).schema.names[1] == "rope"
    refused(path, CardFormatError, "got others")


class Bait(pa.ExtensionType):  # type: ignore[misc]
    """An extension type whose reader runs code chosen by the file, as pickled types once did (CVE-2023-47248)."""

    woken = 0

    def __init__(self) -> None:
        super().__init__(pa.string(), "arrowmoe.test.bait")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: Any, serialized: bytes) -> Bait:
        cls.woken += 1
        return cls()


def test_an_extension_type_is_refused_before_it_is_built(path: Path) -> None:
    bait = Bait()
    pa.register_extension_type(bait)
    try:
        [batch] = card_batches(small_card())
        schema = pa.schema([pa.field("name", bait, nullable=False), *list(SCHEMA)[1:]])
        names = pa.ExtensionArray.from_storage(bait, batch.column(0))
        hostile = pa.RecordBatch.from_arrays([names, *batch.columns[1:]], schema=schema)
        write(path, small_card(), schema=schema, batches=[hostile])
        _ = pa.ipc.open_file(path).schema
        woken = Bait.woken
        assert woken > 0
        refused(path, CardFormatError, "extension type")
        assert Bait.woken == woken
    finally:
        pa.unregister_extension_type("arrowmoe.test.bait")


def with_column(name: str, values: pa.Array) -> tuple[pa.Schema, list[pa.RecordBatch]]:
    [batch] = card_batches(small_card())
    schema = SCHEMA.append(pa.field(name, values.type))
    return schema, [pa.RecordBatch.from_arrays([*batch.columns, values], schema=schema)]


def test_an_extra_column_is_refused(path: Path) -> None:
    schema, batches = with_column("code", pa.array(["import os"] * 4))
    write(path, small_card(), schema=schema, batches=batches)
    refused(path, CardFormatError, "at most 5 entries")


@pytest.mark.parametrize(
    ("index", "field"),
    [
        (0, pa.field("name", pa.large_string(), nullable=False)),
        (0, pa.field("name", pa.dictionary(pa.int32(), pa.string()), nullable=False)),
        (3, pa.field("shape", pa.list_(pa.field("item", pa.int32(), nullable=False)), nullable=False)),
        (3, pa.field("shape", pa.list_(pa.field("item", pa.uint64(), nullable=False)), nullable=False)),
        (3, pa.field("shape", pa.list_(pa.field("item", pa.int64())), nullable=False)),
        (4, pa.field("data", pa.binary(), nullable=False)),
        (4, pa.field("data", pa.large_binary())),
    ],
    ids=str,
)
def test_a_column_of_another_type_is_refused(path: Path, index: int, field: pa.Field) -> None:
    [batch] = card_batches(small_card())
    columns = list(batch.columns)
    columns[index] = (
        columns[index].cast(field.type)
        if index != 0 or "dict" not in str(field.type)
        else (columns[index].dictionary_encode())
    )
    schema = SCHEMA.set(index, field)
    write(path, small_card(), schema=schema, batches=[pa.RecordBatch.from_arrays(columns, schema=schema)])
    refused(path, CardFormatError, "expected")


def test_a_row_of_nulls_is_refused(path: Path) -> None:
    [batch] = card_batches(small_card())
    rows = batch.to_pylist()
    rows[1]["data"] = None
    nulls = pa.array([row["data"] for row in rows], pa.large_binary())
    hostile = pa.RecordBatch.from_arrays([*batch.columns[:4], nulls], schema=SCHEMA)
    write(path, small_card(), batches=[hostile])
    refused(path, CardFormatError, "null")


def test_bytes_hidden_behind_the_last_tensor_are_refused(path: Path) -> None:
    [batch] = card_batches(small_card())
    _, offsets, data = batch.column(4).buffers()
    longer = pa.py_buffer(bytes(data) + b"hidden payload..")
    column = pa.Array.from_buffers(pa.large_binary(), len(batch), [None, offsets, longer])
    # pyarrow's writer cuts what no offset reaches, so the bytes go in as a last tensor whose offset is taken back.
    wider = pa.Array.from_buffers(
        pa.large_binary(), len(batch), [None, pa.py_buffer(moved_end(bytes(offsets), 16)), longer]
    )
    assert column.to_pylist() == batch.column(4).to_pylist()
    honest, hidden = bytes(offsets), moved_end(bytes(offsets), 16)
    write(path, small_card(), batches=[pa.RecordBatch.from_arrays([*batch.columns[:4], wider], schema=SCHEMA)])
    path.write_bytes(replaced_once(path.read_bytes(), hidden, honest))
    assert pa.ipc.open_file(path).read_all().column("data").to_pylist() == batch.column(4).to_pylist()
    refused(path, CardFormatError, "belong to no tensor")


def moved_end(offsets: bytes, by_bytes: int) -> bytes:
    ends = np.frombuffer(offsets, "<i8").copy()
    ends[-1] += by_bytes
    return ends.tobytes()


READ_PLAINLY = """
import sys, pyarrow as pa
batch = pa.ipc.open_file(pa.memory_map(sys.argv[1])).get_batch(0)
batch.validate()
batch.column(4)[0].as_py(); batch.column(4)[1].as_py(); batch.column(4)[2].as_py()
"""


def test_corrupt_offsets_kill_a_plain_reader_and_are_refused_here(path: Path) -> None:
    card = small_card()
    ends = offsets_of(card.tensors)
    corrupt = [ends[0], 1 << 42, *ends[2:]]
    data = write(path, card).read_bytes()
    old, new = (struct.pack(f"<{len(ends)}q", *values) for values in (ends, corrupt))
    path.write_bytes(replaced_once(data, old, new))
    plain = subprocess.run([sys.executable, "-c", READ_PLAINLY, str(path)], capture_output=True, check=False)
    assert plain.returncode != 0, "a plain read was expected to die"
    refused(path, CardFormatError, "Arrow refuses")


def two_batches() -> LoRACard:
    card = small_card(modules=module_shapes(2, 100_000, 100_000), rank=8)
    assert len(list(card_batches(card))) > 1
    return card


def test_batches_that_overlap_are_refused(path: Path) -> None:
    data = write(path, two_batches()).read_bytes()
    first, second = blocks_of(data)[:2]
    start, _ = footer_of(data)
    path.write_bytes(data[:start] + replaced_once(data[start:], BLOCK.pack(*second), BLOCK.pack(*first)))
    assert pa.ipc.open_file(path).get_batch(1).equals(pa.ipc.open_file(path).get_batch(0))
    refused(path, CardFormatError, "a hole or an overlap")


def test_batches_in_another_order_than_the_file_are_refused(path: Path) -> None:
    data = write(path, two_batches()).read_bytes()
    first, second = (BLOCK.pack(*block) for block in blocks_of(data)[:2])
    start, _ = footer_of(data)
    path.write_bytes(data[:start] + replaced_once(data[start:], first + second, second + first))
    refused(path, CardFormatError, "a hole or an overlap")


def test_a_batch_that_the_footer_keeps_quiet_about_is_refused(path: Path) -> None:
    one, two = small_card(modules=1), small_card(modules=1, seed=2)
    [batch], [other] = card_batches(one), card_batches(two)
    data = write(path, one, batches=[batch, other]).read_bytes()
    start, _ = footer_of(data)
    _, second = blocks_of(data)
    at = data.index(BLOCK.pack(*second), start)
    shortened = bytearray(data)
    shortened[at - 28 : at - 24] = struct.pack("<I", 1)
    path.write_bytes(shortened)
    assert pa.ipc.open_file(path).num_record_batches == 1
    refused(path, CardFormatError, "bytes that no batch holds")


@pytest.mark.parametrize("where", ["before the footer", "at the end", "at the start"])
def test_bytes_between_the_parts_are_refused(path: Path, where: str) -> None:
    data = write(path, small_card()).read_bytes()
    start, end = footer_of(data)
    path.write_bytes(
        {
            "before the footer": data[:start] + bytes(64) + data[start:],
            "at the end": data + bytes(64),
            "at the start": data[:8] + bytes(64) + data[8:],
        }[where]
    )
    assert start < end
    refused(path, CardFormatError, "expected|begin")


def test_rows_beyond_the_manifest_are_refused(path: Path) -> None:
    one = small_card(modules=1)
    [batch] = card_batches(one)
    write(path, one, batches=[batch, batch])
    refused(path, CardFormatError, "more tensors, got 2")


def test_an_empty_batch_is_refused(path: Path) -> None:
    [batch] = card_batches(small_card())
    write(path, small_card(), batches=[batch, batch.slice(0, 0)])
    refused(path, CardFormatError, "holds no tensor")


@pytest.mark.parametrize(
    "content",
    [b"", b"ARROW1", b"PAR1" * 100, b"\x93NUMPY" * 100, b"ARROW1\0\0" + bytes(80) + b"ARROW1"],
    ids=["empty", "magic", "parquet", "numpy", "zeros"],
)
def test_other_files_are_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    refused(path, CardError, "expected|damaged")


# Weights and signatures.


def saved(card: LoRACard, path: Path) -> Path:
    LoRAFormat.save(card, path)
    return path


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused_even_with_a_fitting_digest(path: Path, value: float) -> None:
    card = small_card()
    weights = card.tensors[0].float32().copy()
    weights[0, 0] = value
    saved(with_first_tensor(card, weights.tobytes(), digest=True), path)
    with pytest.raises(CardIntegrityError, match="NaN or infinite"):
        LoRAFormat.load(path)


def test_a_changed_weight_is_refused_by_its_digest(path: Path) -> None:
    card = small_card()
    data = bytearray(card.tensors[0].data)
    data[0] ^= 1
    saved(with_first_tensor(card, bytes(data), digest=False), path)
    with pytest.raises(CardIntegrityError, match=r"expected blake3:\w+, got blake3:"):
        LoRAFormat.load(path)


def test_a_signature_over_another_card_is_refused(path: Path) -> None:
    identity = Identity.generate()
    mine, other = small_card(seed=1).signed(identity), small_card(seed=2).signed(identity)
    saved(replace(mine, signature=other.signature), path)
    refused(path, CardIntegrityError, "does not fit the manifest")


def test_a_forged_publisher_is_refused(path: Path) -> None:
    victim, thief = Identity.generate(), Identity.generate()
    card = small_card().describe(publisher=victim.id)
    saved(replace(card, signature=thief.sign(card.manifest_bytes)), path)
    refused(path, CardIntegrityError, f"names publisher {victim.id}, but {thief.id} signed it")


def test_a_stripped_signature_is_refused(path: Path) -> None:
    saved(replace(small_card().signed(Identity.generate()), signature=None), path)
    refused(path, CardIntegrityError, "nobody signed it")


@pytest.mark.parametrize("signature", ["", "ed25519", "rsa:00:00", "ed25519:zz:zz", "ed25519:" + "0" * 64 + ":00"])
def test_a_signature_of_another_form_is_refused(path: Path, signature: str) -> None:
    write(path, small_card(), metadata={b"arrowmoe.signature": signature.encode()})
    refused(path, CardIntegrityError, "signature")


def test_a_tensor_without_elements_is_no_trap(path: Path) -> None:
    empty = Tensor.from_numpy("none", Role.STATS, np.zeros((0, 7), np.float32))
    card = LoRACard.build(name="empty", adapter=small_card().manifest.adapter, tensors=[*small_card().tensors, empty])
    assert LoRAFormat.load(saved(card, path)) == card


# The path.


def test_a_missing_file_is_named(path: Path) -> None:
    refused(path, CardFormatError, "no such file")


def test_a_symbolic_link_is_refused(path: Path) -> None:
    path.symlink_to(saved(small_card(), path.with_name("real.lora.arrow")))
    refused(path, CardFormatError, "symbolic link")


def test_a_directory_is_refused(path: Path) -> None:
    path.mkdir()
    refused(path, CardFormatError, "not a regular file")


@pytest.mark.timeout(10)
def test_a_pipe_is_refused_without_waiting(path: Path) -> None:
    os.mkfifo(path)
    refused(path, CardFormatError, "not a regular file")


def test_a_device_is_refused() -> None:
    refused(Path("/dev/zero"), CardFormatError, "not a regular file")


def test_an_oversize_path_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / ("x" * 300), CardFormatError, "too long")
