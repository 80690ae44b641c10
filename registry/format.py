"""`.lora.arrow`, format version 1: a card as an Arrow IPC file, and the same batches on the wire.

Loading is in three walls, each of which trusts only the one before: `ipc_guard` looks at the bytes, Arrow validates the
batches in full, and every row is compared with the manifest. What is left over is views of the file, not copies.

Rules: a file is written whole or not at all and never changed; metadata, limits and schema are checked before Arrow
reads; nothing is believed about a tensor but what the manifest promises, and digests say whether it keeps its promise.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa

from registry.card import LoRACard
from registry.errors import CardError, CardFormatError, CardLimitError
from registry.files import opened_regular, written_whole
from registry.identity import Signature
from registry.ipc_guard import HEAD_BYTES, METADATA_KEYS, MIN_FILE_BYTES, TAIL_BYTES, CardLimits, check, check_ends
from registry.manifest import FORMAT_VERSION, Manifest, TensorSpec
from registry.tensor import Tensor

SUFFIX = ".lora.arrow"
Row = TypeVar("Row", Tensor, TensorSpec)
MAX_BATCH_BYTES = 4 << 20

SCHEMA = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("role", pa.string(), nullable=False),
        pa.field("dtype", pa.string(), nullable=False),
        pa.field("shape", pa.list_(pa.field("item", pa.int64(), nullable=False)), nullable=False),
        pa.field("data", pa.large_binary(), nullable=False),
    ]
)

_FORMAT, _MANIFEST, _SIGNATURE = b"arrowmoe.format", b"arrowmoe.manifest", b"arrowmoe.signature"
_ROW_OVERHEAD_BYTES = 128
_BATCH_OVERHEAD_BYTES = 4096
_ALIGNMENT = 8
_DEFAULT_LIMITS = CardLimits()


class LoRAFormat:
    """Cards as files."""

    @staticmethod
    def save(card: LoRACard, path: Path | str) -> None:
        """Write `card` to `path`, whole or not at all. A card that is there already is replaced, never changed.

        Raises `CardLimitError` for a manifest that is too large, and `OSError`.
        """
        schema = card_schema(card)
        with written_whole(Path(path)) as file, pa.ipc.new_file(file, schema) as writer:
            for batch in card_batches(card):
                writer.write_batch(batch)

    @staticmethod
    def load(
        path: Path | str, *, verify: bool = True, memory_map: bool = True, limits: CardLimits = _DEFAULT_LIMITS
    ) -> LoRACard:
        """Read the card at `path`; tensors are views of the mapped file, or of one copy with `memory_map=False`.

        Structure, manifest and signature are always checked, digests and finiteness with `verify`. Use
        `memory_map=False` for a file that others may change: a mapped file that shrinks kills its reader.

        Raises `CardFormatError`, `CardLimitError`, `CardIntegrityError` or `ManifestError`.
        """
        data = _contents(Path(path), memory_map, limits)
        count = check(memoryview(data), limits)
        with _arrow_errors():
            reader = pa.ipc.open_file(data)
            batches = (reader.get_batch(index) for index in range(count))
            return card_from_batches(reader.schema.metadata or {}, batches, verify=verify, limits=limits)


def card_schema(card: LoRACard) -> pa.Schema:
    """`SCHEMA` with the card's manifest and signature as metadata. Raises `CardLimitError` if they are too large."""
    metadata = {_FORMAT: b"%d" % FORMAT_VERSION, _MANIFEST: card.manifest_bytes}
    if card.signature is not None:
        metadata[_SIGNATURE] = str(card.signature).encode()
    _check_metadata(metadata, _DEFAULT_LIMITS)
    return SCHEMA.with_metadata(metadata)


def card_batches(card: LoRACard) -> Iterator[pa.RecordBatch]:
    """The card's tensors, in order, in the batches of `batch_rows`; one that has its batch for itself is not copied."""
    for tensors in batch_rows(card.tensors):
        data = tensors[0].data if len(tensors) == 1 else b"".join(tensor.data for tensor in tensors)
        yield batch_of(tensors, pa.py_buffer(data))


def batch_rows(tensors: Iterable[Row]) -> Iterator[list[Row]]:
    """The tensors, in order, as they share batches: of at most 4 MiB, unless one tensor alone is larger."""
    group: list[Row] = []
    total_bytes = data_bytes = 0
    for tensor in tensors:
        row_bytes = tensor.nbytes + len(tensor.name.encode()) + _ROW_OVERHEAD_BYTES
        too_large = total_bytes + row_bytes > MAX_BATCH_BYTES - _BATCH_OVERHEAD_BYTES
        if group and (too_large or data_bytes % tensor.dtype.itemsize):
            yield group
            group, total_bytes, data_bytes = [], 0, 0
        group.append(tensor)
        total_bytes, data_bytes = total_bytes + row_bytes, data_bytes + tensor.nbytes
    if group:
        yield group


def batch_of(tensors: Sequence[Row], data: pa.Buffer) -> pa.RecordBatch:
    """One batch of `tensors`, whose bytes follow one another in `data`."""
    ends = np.cumsum([0, *(tensor.nbytes for tensor in tensors)], dtype=np.int64)
    columns = [
        pa.array([tensor.name for tensor in tensors], pa.string()),
        pa.array([str(tensor.role) for tensor in tensors], pa.string()),
        pa.array([str(tensor.dtype) for tensor in tensors], pa.string()),
        pa.array([tensor.shape for tensor in tensors], SCHEMA.field("shape").type),
        pa.Array.from_buffers(pa.large_binary(), len(tensors), [None, pa.py_buffer(ends), data]),
    ]
    return pa.record_batch(columns, schema=SCHEMA)


def card_from_batches(
    metadata: Mapping[bytes, bytes],
    batches: Iterable[pa.RecordBatch],
    *,
    verify: bool = True,
    limits: CardLimits = _DEFAULT_LIMITS,
) -> LoRACard:
    """The card that a file or a peer gives as schema `metadata` and `batches`, which nobody has checked yet.

    Batches are drawn one by one, and none after the first that breaks the manifest's promise. Tensors are views of
    the batches. Raises as `LoRAFormat.load` does.
    """
    manifest, signature = described(metadata, limits)
    tensors: list[Tensor] = []
    for batch in batches:
        specs = manifest.tensors[len(tensors) : len(tensors) + batch.num_rows]
        tensors.extend(_tensors(batch, specs))
    if len(tensors) != len(manifest.tensors):
        raise CardFormatError(f"expected {len(manifest.tensors)} tensors, got {len(tensors)}, so the card is not whole")
    card = LoRACard(manifest_bytes=metadata[_MANIFEST], manifest=manifest, tensors=tuple(tensors), signature=signature)
    if verify:
        card.verify()
    else:
        card.verify_signature()
    return card


def _contents(path: Path, memory_map: bool, limits: CardLimits) -> pa.Buffer:
    try:
        with opened_regular(path) as descriptor:
            size = os.fstat(descriptor).st_size
            if not MIN_FILE_BYTES <= size <= limits.max_file_bytes:
                raise CardLimitError(
                    f"expected a file of {MIN_FILE_BYTES} to {limits.max_file_bytes} bytes, got {size}: {path}"
                )
            head, tail = os.pread(descriptor, HEAD_BYTES, 0), os.pread(descriptor, TAIL_BYTES, size - TAIL_BYTES)
            check_ends(head, tail, limits)
            return _mapped(descriptor) if memory_map else _read(descriptor, size)
    except OSError as error:
        raise CardFormatError(
            _unreadable(path, error), hint="a card is a regular file that ends in .lora.arrow"
        ) from error


def _mapped(descriptor: int) -> pa.Buffer:
    # By descriptor, for the path may lead elsewhere by now. The mapping outlives both descriptors.
    with pa.memory_map(f"/dev/fd/{descriptor}") as source:
        return source.read_buffer()


def _read(descriptor: int, size: int) -> pa.Buffer:
    buffer = pa.allocate_buffer(size)
    with open(descriptor, "rb", buffering=0, closefd=False) as file:
        view, filled = memoryview(buffer).cast("B"), 0
        while filled < size and (count := file.readinto(view[filled:])):
            filled += count
    if filled < size:
        raise CardFormatError(f"expected {size} bytes, got {filled}, so the file shrank while it was read")
    return buffer


def _unreadable(path: Path, error: OSError) -> str:
    reasons = {errno.ENOENT: "no such file", errno.ELOOP: "it is a symbolic link", errno.EISDIR: "it is a directory"}
    return f"cannot read the card {path}: {reasons.get(error.errno or 0) or error.strerror or error}"


@contextmanager
def _arrow_errors() -> Iterator[None]:
    """Arrow's own refusals as `CardFormatError`; its I/O errors are plain `OSError`, its UTF-8 errors `ValueError`."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).partition("\n")[0][:300]
        raise CardFormatError(f"Arrow refuses the card: {reason}") from error


def _check_metadata(metadata: Mapping[bytes, bytes], limits: CardLimits) -> None:
    size = sum(len(key) + len(value) for key, value in metadata.items())
    if size > limits.max_metadata_bytes:
        raise CardLimitError(
            f"expected schema metadata of at most {limits.max_metadata_bytes} bytes, got {size}",
            hint="shorten description, examples or training figures",
        )


def described(
    metadata: Mapping[bytes, bytes], limits: CardLimits = _DEFAULT_LIMITS
) -> tuple[Manifest, Signature | None]:
    """The manifest and the signature that a schema's metadata hold; raises as `LoRAFormat.load` does."""
    _check_metadata(metadata, limits)
    if not metadata.keys() <= METADATA_KEYS or _MANIFEST not in metadata:
        raise CardFormatError(
            f"expected metadata {sorted(METADATA_KEYS)}, got {sorted(metadata)[:5]}, so this is no card"
        )
    if metadata.get(_FORMAT) != b"%d" % FORMAT_VERSION:
        raise CardFormatError(
            f"expected card format {FORMAT_VERSION}, got {metadata.get(_FORMAT, b'none')[:20]!r}",
            hint="a newer arrowmoe may be able to read it",
        )
    manifest = Manifest.parse(metadata[_MANIFEST])
    if len(manifest.tensors) > limits.max_tensors:
        raise CardLimitError(f"expected at most {limits.max_tensors} tensors, got {len(manifest.tensors)}")
    if manifest.tensor_bytes > limits.max_file_bytes:
        raise CardLimitError(f"expected tensors of at most {limits.max_file_bytes} bytes, got {manifest.tensor_bytes}")
    signature = metadata.get(_SIGNATURE)
    return manifest, None if signature is None else Signature.parse(signature.decode("ascii", "replace"))


def _tensors(batch: pa.RecordBatch, specs: tuple[TensorSpec, ...]) -> Iterator[Tensor]:
    """The tensors of one batch, each of which `specs` announced."""
    # Arrow aborts the process when it reads an offset that full validation would have found.
    with _arrow_errors():
        batch.validate(full=True)
    _check_batch(batch)
    names, roles, dtypes, shapes = (batch.column(index).to_pylist() for index in range(4))
    ends = np.frombuffer(batch.column(4).buffers()[1], dtype="<i8", count=batch.num_rows + 1)
    found = list(zip(names, roles, dtypes, map(tuple, shapes), np.diff(ends).tolist(), strict=True))
    expected = [(spec.name, spec.role, spec.dtype, spec.shape, spec.nbytes) for spec in specs]
    if found != expected:
        raise _unannounced(found, expected)
    data = _aligned(batch.column(4).buffers()[2])
    for spec, start, end in zip(specs, ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        if start % spec.dtype.itemsize:
            raise CardFormatError(f"tensor {spec.name!r} ({spec.role}) is not aligned to its elements of {spec.dtype}")
        yield Tensor(name=spec.name, role=spec.role, dtype=spec.dtype, shape=spec.shape, data=data[start:end])


def _check_batch(batch: pa.RecordBatch) -> None:
    if not batch.schema.remove_metadata().equals(SCHEMA, check_metadata=True):
        raise CardFormatError(f"expected the columns of a card, got {batch.schema.remove_metadata()}")
    if batch.num_rows < 1 or any(column.null_count for column in batch.columns):
        raise CardFormatError("expected batches of at least one tensor and without nulls")
    if batch.num_rows > 1 and batch.column(4).buffers()[2].size > MAX_BATCH_BYTES:
        raise CardFormatError(f"expected batches of at most {MAX_BATCH_BYTES} bytes unless one tensor alone is larger")
    name, role, dtype, shape, data = batch.columns
    for column, width in ((name, 4), (role, 4), (dtype, 4), (data, 8)):
        _check_span(column, width, _size(column.buffers()[2]))
    _check_span(shape, 4, len(shape.values))
    if _size(shape.values.buffers()[1]) != 8 * len(shape.values):
        raise CardFormatError("the shapes hold bytes that belong to no tensor, expected none")


def _check_span(column: pa.Array, width: int, size: int) -> None:
    """Offsets begin at 0, end with the values, and nothing follows: a slice would carry hidden bytes along."""
    buffer, count = column.buffers()[1], len(column) + 1
    ends = np.frombuffer(buffer, dtype=f"<i{width}", count=count)
    if column.offset or ends[0] or ends[-1] != size or buffer.size != width * count:
        raise CardFormatError("a column holds bytes that belong to no tensor, expected none")


def _size(buffer: pa.Buffer | None) -> int:
    return 0 if buffer is None else buffer.size


def _aligned(buffer: pa.Buffer | None) -> memoryview:
    """The buffer's bytes; copied where the wire left them at an odd address."""
    if buffer is None:
        return memoryview(b"")
    view = memoryview(buffer).cast("B").toreadonly()
    return view if buffer.address % _ALIGNMENT == 0 else memoryview(bytes(view))


def _unannounced(found: Sequence[object], expected: Sequence[object]) -> CardError:
    for got, promised in zip(found, expected, strict=False):
        if got != promised:
            return CardFormatError(f"expected tensor {promised}, as the manifest says, got {got}")
    return CardFormatError(f"the manifest announces {len(expected)} more tensors, got {len(found)}")


__all__ = [
    "MAX_BATCH_BYTES",
    "SCHEMA",
    "SUFFIX",
    "CardLimits",
    "LoRAFormat",
    "batch_of",
    "batch_rows",
    "card_batches",
    "card_from_batches",
    "card_schema",
    "described",
]
