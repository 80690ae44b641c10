"""Cards in 8 and 4 bits: the error that they state is the true one, they travel like others, and lies are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from registry.card import LoRACard
from registry.errors import CardFormatError, CardIntegrityError, ManifestError, QuantisingError
from registry.format import LoRAFormat
from registry.identity import Identity
from registry.manifest import Manifest, manifest_bytes
from registry.quantising import Bits, quantise
from registry.tensor import DType, Role, Tensor
from tests.registry.cards import small_card, statistics

SHAPES = {"model.layers.0.mlp.up_proj": (96, 150), "model.layers.1.mlp.up_proj": (64, 33)}
WITHIN: dict[Bits, tuple[float, float]] = {8: (0.002, 0.012), 4: (0.05, 0.2)}
"""Of standard normal weights: less is not to be had, more is a mistake."""


def original(**settings: Any) -> LoRACard:
    return small_card(modules=SHAPES, rank=6, **settings)


def change(card: LoRACard, module: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    a, b = (card.modules[module][role].float32().astype(np.float64) for role in (Role.A, Role.B))
    return card.manifest.adapter.scaling_of(module) * b @ a


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_stated_error_is_that_of_the_dense_matrices(bits: Bits, dtype: str) -> None:
    card = original(dtype=dtype)
    made = quantise(card, bits, name="small")
    wanted = {module: change(card, module) for module in SHAPES}
    missed = {module: np.linalg.norm(change(made, module) - wanted[module]) for module in SHAPES}
    relative = {module: missed[module] / np.linalg.norm(wanted[module]) for module in SHAPES}
    worst = max(SHAPES, key=lambda module: relative[module])
    whole = np.sqrt(sum(norm**2 for norm in missed.values()) / sum(np.linalg.norm(one) ** 2 for one in wanted.values()))
    told = made.manifest.training["quantise"]
    assert told["bits"] == bits
    assert told["error"] == pytest.approx(whole, rel=1e-5)
    assert told["worst"] == {"module": worst, "error": pytest.approx(relative[worst], rel=1e-5)}
    assert WITHIN[bits][0] < told["error"] < WITHIN[bits][1]


@pytest.mark.parametrize("bits", [8, 4])
def test_it_is_smaller_descends_from_the_other_and_says_what_for(bits: Bits) -> None:
    card = original().describe(description="dates", examples=["when?"], evaluation={"accuracy": 1.0})
    made = quantise(card, bits, name="small", version="2")
    assert made.manifest.parents == (card.digest,)
    assert (made.name, made.version, made.description, made.examples) == ("small", "2", "dates", ("when?",))
    assert made.manifest.base == card.manifest.base
    assert made.manifest.adapter == card.manifest.adapter
    assert made.manifest.evaluation == {}
    assert made.nbytes < card.nbytes * (0.3 if bits == 8 else 0.2)
    dtypes = {(tensor.name, tensor.role): tensor.dtype for tensor in made.tensors}
    odd = dtypes.pop(("model.layers.1.mlp.up_proj", Role.B))
    assert odd is DType.INT8  # a vector of 33 numbers
    assert set(dtypes.values()) == {DType.INT8 if bits == 8 else DType.NF4}


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_card_is_a_file_like_others(tmp_path: Path, bits: Bits) -> None:
    made = quantise(original(dora=True, bias=True), bits, name="small").signed(Identity.generate())
    LoRAFormat.save(made, tmp_path / "a.lora.arrow")
    loaded = LoRAFormat.load(tmp_path / "a.lora.arrow")
    assert loaded == made
    assert [bytes(tensor.data) for tensor in loaded.tensors] == [bytes(tensor.data) for tensor in made.tensors]
    kept = {tensor.role: tensor.dtype for tensor in loaded.tensors if tensor.role in (Role.MAGNITUDE, Role.BIAS)}
    assert kept == {Role.MAGNITUDE: DType.FLOAT32, Role.BIAS: DType.FLOAT32}


def test_statistics_for_the_router_stay() -> None:
    card = original().with_routing(*statistics())
    made = quantise(card, 8, name="small")
    assert made.manifest.routing == statistics()[0]
    assert {name: bytes(one.data) for name, one in made.statistics.items()} == {
        name: bytes(one.data) for name, one in card.statistics.items()
    }


@pytest.mark.parametrize("bits", [8, 4])
def test_peft_gets_it_in_float32(tmp_path: Path, bits: Bits) -> None:
    made = quantise(original(), bits, name="small")
    made.to_peft(tmp_path / "peft")
    again = LoRACard.from_peft(tmp_path / "peft")
    for tensor in again.tensors:
        assert tensor.dtype is DType.FLOAT32
        np.testing.assert_array_equal(tensor.float32(), made.modules[tensor.name][tensor.role].float32())


def test_what_is_quantised_already_is_refused() -> None:
    card = original()
    made = quantise(card, 8, name="small")
    with pytest.raises(QuantisingError, match="quantised already") as caught:
        quantise(made, 4, name="smaller")
    assert card.digest in str(caught.value.hint)


def test_other_numbers_of_bits_are_refused() -> None:
    with pytest.raises(QuantisingError, match="expected 8 or 4 bits, got 3"):
        quantise(original(), 3, name="small")  # type: ignore[arg-type]


def test_a_zero_card_has_no_error() -> None:
    card = original()
    zeros = [Tensor.from_numpy(one.name, one.role, np.zeros(one.shape, np.float32)) for one in card.tensors]
    zero = LoRACard.build(name="zero", adapter=card.manifest.adapter, tensors=zeros)
    assert quantise(zero, 4, name="small").manifest.training["quantise"]["error"] == 0


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("scale", [np.nan, np.inf, 3e38])
def test_a_scale_that_is_no_number_is_refused(bits: Bits, scale: float) -> None:
    made = quantise(original(), bits, name="small")
    first = made.tensors[0]
    bad = Tensor.of(first.name, first.role, first.dtype, first.shape, np.float32(scale).tobytes() + first.data[4:])
    with pytest.raises(CardIntegrityError, match="NaN or infinite"):
        LoRACard.build(name="bad", adapter=made.manifest.adapter, tensors=[bad, *made.tensors[1:]])


Change = Callable[[dict[str, Any]], None]


def _more_bytes(row: dict[str, Any]) -> None:
    row["nbytes"] += 1


def _magnitude(row: dict[str, Any]) -> None:
    row["role"] = "magnitude"


def _cube(row: dict[str, Any]) -> None:
    row["shape"] = [*row["shape"], 1]


def _odd(row: dict[str, Any]) -> None:
    row["shape"][1] += 1


@pytest.mark.parametrize(
    ("lie", "why"),
    [(_more_bytes, "expected nbytes"), (_magnitude, "A and B alone"), (_cube, "as matrices"), (_odd, "even length")],
)
def test_a_manifest_that_lies_about_packed_tensors_is_refused(lie: Change, why: str) -> None:
    fields = json.loads(quantise(original(), 4, name="small").manifest_bytes)
    lie(next(row for row in fields["tensors"] if row["role"] == "A"))
    with pytest.raises(ManifestError, match=why):
        Manifest.parse(manifest_bytes(fields))


def test_shapes_are_refused_before_anything_is_allocated() -> None:
    with pytest.raises(CardFormatError, match="expected 1168231104512 bytes"):
        Tensor.of("x", Role.A, DType.INT8, (1, 1 << 40), b"")
    with pytest.raises(CardFormatError, match="A and B alone"):
        Tensor.of("x", Role.FULL, DType.INT8, (4, 4), bytes(32))
