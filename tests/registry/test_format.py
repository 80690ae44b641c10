from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings

from registry.card import LoRACard
from registry.errors import CardFormatError, CardIntegrityError, CardLimitError
from registry.files import DRAFT_SUFFIX
from registry.format import (
    MAX_BATCH_BYTES,
    SCHEMA,
    CardLimits,
    LoRAFormat,
    card_batches,
    card_from_batches,
    card_schema,
)
from registry.identity import Identity
from registry.tensor import DType, Role, Tensor
from tests.registry.cards import cards, module_shapes, small_card


def assert_same(loaded: LoRACard, card: LoRACard) -> None:
    """Equal to the bit, not only by identity."""
    assert loaded.manifest_bytes == card.manifest_bytes
    assert loaded.signature == card.signature
    for found, expected in zip(loaded.tensors, card.tensors, strict=True):
        assert (found.name, found.role, found.dtype, found.shape) == (
            expected.name,
            expected.role,
            expected.dtype,
            expected.shape,
        )
        assert bytes(found.data) == bytes(expected.data)


@settings(max_examples=120, suppress_health_check=[HealthCheck.too_slow])
@given(card=cards())
def test_any_card_comes_back_bit_for_bit(card: LoRACard) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "card.lora.arrow"
        LoRAFormat.save(card, path)
        assert_same(LoRAFormat.load(path), card)
        assert_same(LoRAFormat.load(path, memory_map=False), card)
        assert_same(card_from_batches(card_schema(card).metadata, card_batches(card)), card)


def test_every_dtype_role_and_special_value_keeps_its_bits(tmp_path: Path) -> None:
    values = np.array([0.0, -0.0, 1e-45, -1e-40, 6e-8, 3.4e38, 1 / 3, -2.5], np.float32)
    extra = [
        Tensor.from_numpy("embed.weight", Role.FULL, values),
        Tensor.from_numpy("stats", Role.STATS, values.clip(-6e4, 6e4).astype(np.float16)),
        Tensor.of("router", Role.STATS, DType.BFLOAT16, (2, 2), b"\x01\x00\x80\x00\x7f\x7f\x00\x80"),
        Tensor.from_numpy("scalar", Role.STATS, np.array(2.5, np.float32)),
        Tensor.from_numpy("nothing", Role.STATS, np.zeros((0, 3), np.float32)),
    ]
    small = small_card(dtype="float16")
    card = LoRACard.build(name="all", adapter=small.manifest.adapter, tensors=[*small.tensors, *extra])
    LoRAFormat.save(card, tmp_path / "all.lora.arrow")
    assert_same(LoRAFormat.load(tmp_path / "all.lora.arrow"), card)


def test_fields_of_a_later_version_survive(tmp_path: Path) -> None:
    card = small_card(description="", **{"x-later": {"ключ": [1, 2.5, None, "\u0000\U0001f600"]}})
    LoRAFormat.save(card.signed(Identity.generate()), tmp_path / "card.lora.arrow")
    loaded = LoRAFormat.load(tmp_path / "card.lora.arrow")
    assert loaded.manifest.model_extra == {"x-later": {"ключ": [1, 2.5, None, "\u0000\U0001f600"]}}
    assert loaded.describe(description="new").manifest.model_extra == loaded.manifest.model_extra


def test_a_plain_arrow_reader_sees_the_table_of_the_design(tmp_path: Path) -> None:
    card = small_card(modules=2).signed(Identity.generate())
    LoRAFormat.save(card, tmp_path / "card.lora.arrow")
    with pa.ipc.open_file(tmp_path / "card.lora.arrow") as reader:
        table = reader.read_all()
    assert {key: str(table.schema.field(key).type) for key in table.column_names} == {
        "name": "string",
        "role": "string",
        "dtype": "string",
        "shape": "list<item: int64 not null>",
        "data": "large_binary",
    }
    assert not any(field.nullable for field in table.schema)
    assert table.schema.metadata == {
        b"arrowmoe.format": b"1",
        b"arrowmoe.manifest": card.manifest_bytes,
        b"arrowmoe.signature": str(card.signature).encode(),
    }
    first = card.manifest.tensors[0]
    assert table.slice(0, 1).to_pylist() == [
        {
            "name": first.name,
            "role": first.role,
            "dtype": first.dtype,
            "shape": list(first.shape),
            "data": bytes(card.tensors[0].data),
        }
    ]


def test_a_batch_ends_where_the_next_tensor_would_be_misaligned() -> None:
    card = small_card(modules=2)
    odd = Tensor.of("stats", Role.STATS, DType.BFLOAT16, (3,), bytes(6))
    built = LoRACard.build(name="odd", adapter=card.manifest.adapter, tensors=[*card.tensors, odd])
    assert built.tensors[-1].name == "stats"
    # Another implementation may put it first: each batch still begins aligned.
    other = replace(built, tensors=(built.tensors[-1], *built.tensors[:-1]))
    assert [batch.num_rows for batch in card_batches(other)] == [1, 4]


@pytest.mark.parametrize("dtype", list(DType))
def test_loading_maps_and_copies_nothing(tmp_path: Path, dtype: DType) -> None:
    card = small_card(modules=module_shapes(40, 300, 200), rank=8, dtype=dtype)
    LoRAFormat.save(card, tmp_path / "card.lora.arrow")
    before = pa.total_allocated_bytes()
    loaded = LoRAFormat.load(tmp_path / "card.lora.arrow", verify=False)
    assert pa.total_allocated_bytes() - before < card.nbytes / 50
    begin, end = mapping_of(tmp_path / "card.lora.arrow")
    for tensor in loaded.tensors:
        address = np.frombuffer(tensor.data, np.uint8).__array_interface__["data"][0]
        assert begin <= address < end
        assert address % tensor.dtype.itemsize == 0
        assert tensor.data.readonly


def test_reading_into_memory_keeps_no_mapping(tmp_path: Path) -> None:
    path = tmp_path / "card.lora.arrow"
    LoRAFormat.save(small_card(), path)
    loaded = LoRAFormat.load(path, memory_map=False)
    os.truncate(path, 10)
    assert_same(loaded, small_card())


def mapping_of(path: Path) -> tuple[int, int]:
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    begin, end = lines[0].split()[0].split("-")
    return int(begin, 16), int(end, 16)


def test_many_cards_hold_no_descriptor(tmp_path: Path) -> None:
    LoRAFormat.save(small_card(), tmp_path / "card.lora.arrow")
    before = len(list(Path("/proc/self/fd").iterdir()))
    held = [LoRAFormat.load(tmp_path / "card.lora.arrow") for _ in range(20)]
    assert len(held) == 20
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_batches_stay_under_4_mib_unless_one_tensor_is_larger(tmp_path: Path) -> None:
    shapes = module_shapes(5, 40_000, 50_000) | {"lm_head": (5_000_000, 8)}
    card = small_card(modules=shapes, rank=4, dtype="bfloat16")
    batches = list(card_batches(card))
    sizes = [pa.ipc.get_record_batch_size(batch) for batch in batches]
    assert [batch.num_rows for batch, size in zip(batches, sizes, strict=True) if size > MAX_BATCH_BYTES] == [1]
    assert any(batch.num_rows > 1 for batch in batches)
    LoRAFormat.save(card, tmp_path / "card.lora.arrow")
    assert_same(LoRAFormat.load(tmp_path / "card.lora.arrow"), card)


def test_a_large_tensor_is_written_without_a_copy() -> None:
    card = small_card(modules={"lm_head": (600_000, 8)}, rank=4)
    large = max(card.tensors, key=lambda tensor: tensor.nbytes)
    addresses = {batch.column(4).buffers()[2].address for batch in card_batches(card)}
    assert np.frombuffer(large.data, np.uint8).__array_interface__["data"][0] in addresses


def test_the_mode_does_not_depend_on_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o077)
    try:
        LoRAFormat.save(small_card(), tmp_path / "card.lora.arrow")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "card.lora.arrow").stat().st_mode) == 0o644


def test_saving_replaces_the_file_and_leaves_a_mapped_one_alone(tmp_path: Path) -> None:
    path = tmp_path / "card.lora.arrow"
    first, second = small_card(seed=1), small_card(seed=2)
    LoRAFormat.save(first, path)
    mapped = LoRAFormat.load(path)
    LoRAFormat.save(second, path)
    assert_same(mapped, first)
    assert_same(LoRAFormat.load(path), second)
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "card.lora.arrow"
    LoRAFormat.save(small_card(), path)
    broken = replace(small_card(seed=1), tensors=(small_card().tensors[0], "no tensor"))  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        LoRAFormat.save(broken, path)
    assert_same(LoRAFormat.load(path), small_card())
    assert list(tmp_path.iterdir()) == [path]


def test_saving_never_follows_a_link(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"precious")
    (tmp_path / "card.lora.arrow").symlink_to(outside)
    LoRAFormat.save(small_card(), tmp_path / "card.lora.arrow")
    assert outside.read_bytes() == b"precious"
    assert not (tmp_path / "card.lora.arrow").is_symlink()


KILLED_WRITER = """
import os, signal, sys
import registry.format
from tests.registry.cards import small_card

def dies(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def dies_after_one(card, batches=registry.format.card_batches):
    yield next(batches(card))
    dies()

place, path = sys.argv[1:]
target, name, deadly = {
    "write": (registry.format, "card_batches", dies_after_one),
    "flush": (os, "fsync", dies),
    "rename": (os, "replace", dies),
    "after": (registry.files, "_flush_directory", dies),
}[place]
setattr(target, name, deadly)
registry.format.LoRAFormat.save(small_card(seed=2), path)
"""


@pytest.mark.parametrize("place", ["write", "flush", "rename", "after"])
@pytest.mark.parametrize("replacing", [False, True])
def test_a_killed_writer_shows_a_whole_card_or_none(tmp_path: Path, place: str, replacing: bool) -> None:
    path = tmp_path / "card.lora.arrow"
    if replacing:
        LoRAFormat.save(small_card(seed=1), path)
    writer = subprocess.run([sys.executable, "-c", KILLED_WRITER, place, str(path)], check=False)
    assert writer.returncode == -signal.SIGKILL
    if place == "after":
        assert_same(LoRAFormat.load(path), small_card(seed=2))
    elif replacing:
        assert_same(LoRAFormat.load(path), small_card(seed=1))
    else:
        assert not path.exists()
    left_over = [file for file in tmp_path.iterdir() if file != path]
    assert all(file.name.startswith(".") and file.name.endswith(DRAFT_SUFFIX) for file in left_over)


def test_a_manifest_that_no_reader_would_take_is_not_written(tmp_path: Path) -> None:
    card = small_card(examples=["x" * 1000] * 1040)
    grown = replace(card, manifest_bytes=card.manifest_bytes + b" " * (1 << 20))
    with pytest.raises(CardLimitError, match="at most 1048576 bytes"):
        LoRAFormat.save(grown, tmp_path / "card.lora.arrow")
    assert list(tmp_path.iterdir()) == []


def test_a_signed_card_with_the_largest_manifest_still_fits(tmp_path: Path) -> None:
    card = small_card().signed(Identity.generate())
    room = (1 << 20) - 1024 - len(card.manifest_bytes) - len('"x":"",')
    signed = card.describe(x="y" * room).signed(Identity.generate())
    LoRAFormat.save(signed, tmp_path / "card.lora.arrow")
    assert_same(LoRAFormat.load(tmp_path / "card.lora.arrow"), signed)


@pytest.mark.parametrize("memory_map", [True, False])
def test_limits_are_kept_before_parsing(tmp_path: Path, memory_map: bool) -> None:
    path = tmp_path / "card.lora.arrow"
    LoRAFormat.save(small_card(), path)
    size = path.stat().st_size
    for limits in (
        CardLimits(max_file_bytes=size - 1),
        CardLimits(max_metadata_bytes=500),
        CardLimits(max_footer_bytes=100),
        CardLimits(max_tensors=3),
    ):
        with pytest.raises(CardLimitError):
            LoRAFormat.load(path, memory_map=memory_map, limits=limits)
    assert LoRAFormat.load(path, memory_map=memory_map, limits=CardLimits(max_file_bytes=size, max_tensors=4))


def test_verify_false_still_checks_the_signature_but_reads_no_weight(tmp_path: Path) -> None:
    card = small_card().signed(Identity.generate())
    wrong_weights = replace(card, tensors=tuple(replace(t, data=memoryview(bytes(t.nbytes))) for t in card.tensors))
    LoRAFormat.save(wrong_weights, tmp_path / "weights.lora.arrow")
    assert LoRAFormat.load(tmp_path / "weights.lora.arrow", verify=False) == card
    with pytest.raises(CardIntegrityError, match="expected blake3:"):
        LoRAFormat.load(tmp_path / "weights.lora.arrow")
    unsigned = replace(card, signature=None)
    LoRAFormat.save(unsigned, tmp_path / "unsigned.lora.arrow")
    with pytest.raises(CardIntegrityError, match="nobody signed"):
        LoRAFormat.load(tmp_path / "unsigned.lora.arrow", verify=False)


# The wire: the same checks on batches that came from a peer.


def wire(card: LoRACard) -> tuple[dict[bytes, bytes], list[pa.RecordBatch]]:
    return card_schema(card).metadata, list(card_batches(card))


def test_no_batch_is_drawn_after_the_promise_is_broken() -> None:
    card = small_card(modules=1)
    metadata, batches = wire(card)
    drawn = 0

    def endless() -> object:
        nonlocal drawn
        while True:
            drawn += 1
            yield batches[0]

    with pytest.raises(CardFormatError, match="more tensors"):
        card_from_batches(metadata, endless())  # type: ignore[arg-type]
    assert drawn == 2


def test_more_tensor_bytes_than_the_limit_draw_no_batch() -> None:
    def unreachable() -> object:
        pytest.fail("a batch was drawn")
        yield

    metadata, _ = wire(small_card())
    with pytest.raises(CardLimitError, match="tensors of at most"):
        card_from_batches(metadata, unreachable(), limits=CardLimits(max_file_bytes=100))  # type: ignore[arg-type]


def test_a_missing_batch_is_noticed() -> None:
    metadata, batches = wire(small_card())
    with pytest.raises(CardFormatError, match="expected 4 tensors, got 0"):
        card_from_batches(metadata, [])
    assert len(batches) == 1


def test_rows_in_another_order_are_refused() -> None:
    metadata, [batch] = wire(small_card())
    with pytest.raises(CardFormatError, match="as the manifest says"):
        card_from_batches(metadata, [batch.take(pa.array([1, 0, 2, 3]))])


def test_slices_are_refused_for_their_hidden_bytes() -> None:
    metadata, [batch] = wire(small_card())
    with pytest.raises(CardFormatError, match="belong to no tensor"):
        card_from_batches(metadata, [batch.slice(0, 2), batch.slice(2, 2)])


def test_a_line_that_fails_is_not_called_a_bad_card() -> None:
    def broken() -> object:
        yield from wire(small_card(modules=1))[1]
        raise ConnectionResetError("the line failed")

    with pytest.raises(ConnectionResetError):
        card_from_batches(wire(small_card(modules=1))[0], broken())  # type: ignore[arg-type]


def test_buffers_at_odd_addresses_are_copied_not_misread() -> None:
    card = small_card()
    metadata, [batch] = wire(card)
    data = batch.column(4).buffers()
    shifted = pa.py_buffer(b"\0" + bytes(data[2])).slice(1)
    column = pa.Array.from_buffers(pa.large_binary(), len(batch), [None, data[1], shifted])
    loaded = card_from_batches(metadata, [pa.RecordBatch.from_arrays([*batch.columns[:4], column], schema=SCHEMA)])
    assert_same(loaded, card)
    assert all(np.frombuffer(t.data, np.uint8).__array_interface__["data"][0] % 4 == 0 for t in loaded.tensors)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (b"arrowmoe.format", b"2", "expected card format 1"),
        (b"arrowmoe.format", None, "expected card format 1"),
        (b"arrowmoe.manifest", None, "this is no card"),
        (b"pandas", b"{}", "this is no card"),
        (b"arrowmoe.signature", b"\xff\xfe", "expected a signature"),
    ],
)
def test_other_metadata_is_refused(key: bytes, value: bytes | None, message: str) -> None:
    metadata, batches = wire(small_card())
    changed = {k: v for k, v in {**metadata, key: value}.items() if v is not None}
    with pytest.raises((CardFormatError, CardIntegrityError), match=message):
        card_from_batches(changed, batches)
