"""Every card that cannot be served is an error that says why, and the engine answers afterwards as it did before."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from arrowmoe.engine import ArrowEngine
from arrowmoe.errors import AdapterMemoryError, AdapterMismatchError, UnknownAdapterError, UnsupportedCardError
from arrowmoe.lora.slots import Slot
from registry.card import LoRACard
from registry.errors import CardFormatError, CardIntegrityError, ManifestError, UnsupportedAdapterError
from registry.format import LoRAFormat
from registry.manifest import AdapterSpec, Manifest, manifest_bytes
from registry.tensor import DType, Role, Tensor
from tests.arrowmoe.tiny import base, card_for
from tests.peft_models import HIDDEN, VOCABULARY, make_peft, tiny_llama

UP = "model.layers.0.mlp.up_proj"
EMBEDDING = "model.embed_tokens"


@dataclass(frozen=True, kw_only=True)
class Bench:
    """An engine that serves one good card, with room for two, and a directory for bad ones."""

    engine: ArrowEngine
    good: LoRACard
    directory: Path

    def answer(self) -> tuple[int, ...]:
        """What the good card says."""
        return self.engine.generate(["w5 w9"], adapter="good", max_new_tokens=6)[0].tokens

    @contextmanager
    def still_serving(self) -> Iterator[None]:
        """Whatever fails inside leaves answers, adapters, and the bare base as they were."""
        before, held, bare = self.answer(), self.engine.list_loras(), self.bare()
        yield
        assert self.answer() == before
        assert self.engine.list_loras() == held
        assert self.bare() == bare

    def bare(self) -> tuple[int, ...]:
        """What the base model says by itself."""
        return self.engine.generate(["w5 w9"], max_new_tokens=6)[0].tokens


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    good = card_for(ArrowEngine(base(tiny_llama())), tmp_path, "good", seed=1)
    weights = sum(tensor.nbytes for tensor in good.manifest.tensors if tensor.role in (Role.A, Role.B))
    engine = ArrowEngine(base(tiny_llama()), budget_bytes=2 * weights)
    engine.load_lora(good)
    return Bench(engine=engine, good=good, directory=tmp_path)


def card(
    shapes: dict[str, tuple[int, int]],
    *,
    rank: int = 2,
    base_name: str = "tiny",
    leave_out: Role | None = None,
    embeddings: tuple[str, ...] = (),
    magnitude: bool = False,
    value: float = 1.0,
) -> LoRACard:
    """A card of one value for modules path → (d_in, d_out)."""
    parts = [
        (path, role, size)
        for path, (d_in, d_out) in shapes.items()
        for role, size in ((Role.A, (rank, d_in)), (Role.B, (d_out, rank)), (Role.MAGNITUDE, (d_out,)))
        if role is not leave_out and (magnitude or role is not Role.MAGNITUDE)
    ]
    return LoRACard.build(
        name="bad",
        adapter=AdapterSpec(rank=rank, alpha=2.0, target_modules=tuple(shapes), embeddings=embeddings, dora=magnitude),
        tensors=[Tensor.from_numpy(path, role, np.full(size, value, np.float32)) for path, role, size in parts],
        base_name=base_name,
    )


def file_with(bench: Bench, change: Callable[[bytearray], bytes]) -> Path:
    """The good card's file, damaged."""
    path = bench.directory / "bad.lora.arrow"
    LoRAFormat.save(bench.good, path)
    path.write_bytes(change(bytearray(path.read_bytes())))
    return path


def with_nan(data: bytearray) -> bytes:
    """One weight in the middle of the file is NaN."""
    at = len(data) // 2 // 64 * 64
    data[at : at + 4] = np.float32("nan").tobytes()
    return bytes(data)


def manifest_of_rank(card: LoRACard, rank: int) -> bytes:
    """The card's manifest, claiming another rank."""
    fields = json.loads(card.manifest_bytes)
    fields["adapter"]["rank"] = rank
    return manifest_bytes(fields)


REFUSED: dict[str, tuple[Callable[[Bench], Any], type[Exception], str]] = {
    "wrong base": (
        lambda bench: card({UP: (16, 32)}, base_name="someone/else"),
        AdapterMismatchError,
        "trained on someone/else, the engine runs tiny",
    ),
    "wrong shape": (lambda bench: card({UP: (16, 48)}), AdapterMismatchError, f"{UP}.*16 → 48.*Linear 16 → 32"),
    "extra module": (
        lambda bench: card({UP: (16, 32), "model.layers.9.mlp.up_proj": (16, 32)}),
        AdapterMismatchError,
        r"1 of 2 modules that the base model lacks, first 'model\.layers\.9",
    ),
    "no linear module": (lambda bench: card({"model.layers.0.mlp": (16, 32)}), AdapterMismatchError, "LlamaMLP"),
    "missing key": (lambda bench: card({UP: (16, 32)}, leave_out=Role.B), ManifestError, UP),
    "rank over limit": (lambda bench: Manifest.parse(manifest_of_rank(bench.good, 65_537)), ManifestError, "65536"),
    "DoRA of an embedding": (
        lambda bench: card({EMBEDDING: (VOCABULARY, HIDDEN)}, embeddings=(EMBEDDING,), magnitude=True),
        UnsupportedCardError,
        "DoRA.*Embedding",
    ),
    "truncated file": (
        lambda bench: file_with(bench, lambda data: bytes(data[: len(data) // 2])),
        CardFormatError,
        "Arrow",
    ),
    "damaged weights": (lambda bench: file_with(bench, with_nan), CardIntegrityError, "expected blake3:"),
    "not a number": (lambda bench: card({UP: (16, 32)}, value=np.nan), CardIntegrityError, "NaN"),
    "whole parameters": (
        lambda bench: LoRACard.from_peft(
            make_peft(tiny_llama(), bench.directory / "full", seed=0, modules_to_save=["lm_head"]), base_name="tiny"
        ),
        UnsupportedCardError,
        "lm_head",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_card_that_cannot_be_served_is_refused_by_name(bench: Bench, case: str) -> None:
    make, error, words = REFUSED[case]
    with bench.still_serving(), pytest.raises(error, match=words):
        bench.engine.load_lora(make(bench))


def test_a_wrong_dtype_is_refused_where_the_adapter_comes_in(bench: Bench) -> None:
    path = make_peft(tiny_llama(), bench.directory / "wide", seed=0, dtype=torch.float64)
    with bench.still_serving(), pytest.raises(UnsupportedAdapterError, match=r"(?i)f(loat)?64"):
        bench.engine.load_lora(LoRACard.from_peft(path, base_name="tiny"))
    assert "float64" not in set(DType)


def test_an_adapter_that_was_removed_is_unknown_and_what_is_in_flight_is_finished(bench: Bench) -> None:
    expected = bench.answer()
    stream = bench.engine.generate(["w5 w9"], adapter="good", max_new_tokens=6, stream=True)
    next(stream)
    bench.engine.remove_lora("good")
    with pytest.raises(UnknownAdapterError, match="good"):
        bench.answer()
    assert [chunk.generation.tokens for chunk in stream if chunk.generation] == [expected]
    bench.engine.load_lora(bench.good)
    assert bench.answer() == expected


def test_a_card_larger_than_the_budget_is_an_error(bench: Bench) -> None:
    large = card_for(bench.engine, bench.directory, "large", seed=2, r=12)
    with bench.still_serving(), pytest.raises(AdapterMemoryError, match=r"'large'.*room for") as refused:
        bench.engine.load_lora(large)
    assert not refused.value.later


def test_a_row_whose_cards_have_no_room_together_is_an_error(bench: Bench) -> None:
    for seed in (2, 3):
        bench.engine.load_lora(card_for(bench.engine, bench.directory, f"c{seed}", seed=seed))
    with bench.still_serving(), pytest.raises(AdapterMemoryError, match=r"room for .* are pinned and") as refused:
        bench.engine.generate(["w5"], adapter={"good": 0.4, "c2": 0.3, "c3": 0.3}, max_new_tokens=2)
    assert not refused.value.later


def test_rows_whose_cards_have_no_room_together_are_answered_in_turns(bench: Bench) -> None:
    names = ["good", "c2", "c3"]
    for seed in (2, 3):
        bench.engine.load_lora(card_for(bench.engine, bench.directory, f"c{seed}", seed=seed))
    alone = [bench.engine.generate(["w5 w9"], adapter=name, max_new_tokens=4)[0].tokens for name in names]
    together = bench.engine.generate(["w5 w9"] * 3, adapter=names, max_new_tokens=4)
    assert [made.tokens for made in together] == alone
    memory = bench.engine.memory()
    assert memory.budget is not None
    assert memory.slots <= memory.budget


def test_a_device_without_memory_for_slots_is_an_error(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    other = card_for(bench.engine, bench.directory, "other", seed=4)
    with bench.still_serving(), monkeypatch.context() as patched:
        patched.setattr(Slot, "to", out_of_memory)
        with pytest.raises(AdapterMemoryError, match=r"'other'.*CUDA out of memory"):
            bench.engine.load_lora(other)
        patched.undo()


def test_a_forward_pass_without_memory_is_an_error(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator's own error, as torch words it on the CPU."""
    with bench.still_serving(), monkeypatch.context() as patched:
        patched.setattr(bench.engine.base.model, "forward", lambda past_key_values, **_: torch.empty(1 << 60))
        with pytest.raises(AdapterMemoryError, match="forward pass: out of memory"):
            bench.answer()
        patched.undo()


def out_of_memory(slot: Slot, device: torch.device) -> Slot:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
