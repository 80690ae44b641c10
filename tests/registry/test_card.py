from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.card import LoRACard
from registry.digest import digest_of, hex_of, is_digest
from registry.errors import CardFormatError, CardIntegrityError, ManifestError
from registry.identity import Identity
from registry.tensor import DType, Role, Tensor
from tests.registry.cards import CREATED, PLAIN, cards, module_shapes, small_card

TORCH = {DType.FLOAT32: torch.float32, DType.FLOAT16: torch.float16, DType.BFLOAT16: torch.bfloat16}


def test_identity_is_the_hash_of_the_manifest_and_of_nothing_else() -> None:
    card = small_card()
    assert card.digest == "blake3:" + blake3(card.manifest_bytes).hexdigest()
    assert is_digest(card.digest)
    assert hex_of(card.digest) == card.digest[7:]
    assert card == small_card()
    assert hash(card) == hash(small_card())
    assert card.signed(Identity.generate()).tensors is card.tensors


@pytest.mark.parametrize("other", [{"seed": 1}, {"rank": 2}, {"alpha": 9.0}, {"description": "x"}, {"version": "2"}])
def test_any_difference_is_another_card(other: dict[str, object]) -> None:
    assert small_card(**other) != small_card()  # type: ignore[arg-type]


def test_equal_tensors_in_any_order_build_an_equal_card() -> None:
    card = small_card(modules=5, dora=True)
    again = LoRACard.build(
        name="sample",
        adapter=card.manifest.adapter,
        tensors=reversed(card.tensors),
        base_name="tiny-llama",
        base_architecture="LlamaForCausalLM",
        created=CREATED,
    )
    assert again == card


def test_a_card_cannot_be_changed() -> None:
    card = small_card()
    with pytest.raises(FrozenInstanceError):
        card.manifest_bytes = b""  # type: ignore[misc]
    with pytest.raises(TypeError):
        card.tensors[0].data[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        card.tensors[0].float32()[0] = 1


def test_modules_are_reached_by_path_and_role() -> None:
    card = small_card(modules={"a.b": (3, 5)}, rank=2, dora=True)
    assert {role: tensor.shape for role, tensor in card.modules["a.b"].items()} == {
        Role.A: (2, 3),
        Role.B: (5, 2),
        Role.MAGNITUDE: (5,),
    }
    assert card.nbytes == 4 * (6 + 10 + 5)


def test_describe_shares_the_tensors_and_drops_the_signature() -> None:
    card = small_card().signed(Identity.generate())
    described = card.describe(description="new", version="2")
    assert described.tensors is card.tensors
    assert (described.manifest.description, described.version) == ("new", "2")
    assert described.signature is None
    assert described.manifest.publisher is None
    assert described.digest != card.digest
    described.verify()


@pytest.mark.parametrize("field", ["tensors", "adapter", "format", "base"])
def test_describe_does_not_change_the_adapter(field: str) -> None:
    with pytest.raises(ManifestError, match=field):
        small_card().describe(**{field: None})


def test_describe_keeps_the_rules_of_a_manifest() -> None:
    with pytest.raises(ManifestError, match="name"):
        small_card().describe(name="../x")
    with pytest.raises(ManifestError, match="what JSON can"):
        small_card().describe(training={"loss": float("nan")})
    with pytest.raises(ManifestError, match="what JSON can"):
        small_card().describe(training={"loss": object()})


def test_a_signed_card_verifies_and_names_its_publisher() -> None:
    identity = Identity.generate()
    card = small_card().signed(identity)
    card.verify()
    assert card.manifest.publisher == identity.id


def test_verify_names_the_tensor_that_changed() -> None:
    card = small_card()
    changed = replace(card.tensors[2], data=memoryview(bytes(card.tensors[2].nbytes)))
    with pytest.raises(CardIntegrityError, match=card.tensors[2].name):
        replace(card, tensors=(*card.tensors[:2], changed, *card.tensors[3:])).verify()


@pytest.mark.parametrize("dtype", PLAIN)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_building_from_weights_that_are_not_finite_is_refused(dtype: DType, value: float) -> None:
    card = small_card(dtype=dtype)
    values = torch.zeros(card.tensors[0].shape, dtype=TORCH[dtype])
    values[-1, -1] = value
    data = values.view(torch.uint8).numpy()
    bad = Tensor.of(card.tensors[0].name, card.tensors[0].role, dtype, values.shape, data)
    with pytest.raises(CardIntegrityError, match="NaN or infinite"):
        LoRACard.build(name="bad", adapter=card.manifest.adapter, tensors=[bad, *card.tensors[1:]])


def test_tensors_that_do_not_fit_the_adapter_are_refused() -> None:
    card = small_card(modules=2)
    adapter = card.manifest.adapter
    with pytest.raises(ManifestError, match="target_modules and the B tensors differ"):
        LoRACard.build(
            name="x", adapter=adapter, tensors=[t for t in card.tensors if t.role is Role.A or "0" in t.name]
        )
    with pytest.raises(ManifestError, match="listed twice"):
        LoRACard.build(name="x", adapter=adapter, tensors=[*card.tensors, card.tensors[0]])
    with pytest.raises(ManifestError, match="for rank 3"):
        LoRACard.build(name="x", adapter=adapter.model_copy(update={"rank": 3}), tensors=card.tensors)
    with pytest.raises(ManifestError, match="magnitude"):
        LoRACard.build(name="x", adapter=adapter.model_copy(update={"dora": True}), tensors=card.tensors)


def test_larger_elements_come_first_so_that_all_are_aligned() -> None:
    card = small_card(dtype=DType.BFLOAT16, modules=module_shapes(3))
    stats = Tensor.from_numpy("zz", Role.STATS, np.ones(3, np.float32))
    built = LoRACard.build(name="x", adapter=card.manifest.adapter, tensors=[*card.tensors, stats])
    assert [tensor.dtype.itemsize for tensor in built.tensors] == [4, 2, 2, 2, 2, 2, 2]


@pytest.mark.parametrize("dtype", PLAIN)
@given(data=st.binary(max_size=64))
def test_float32_and_is_finite_agree_with_torch_on_all_bits(dtype: DType, data: bytes) -> None:
    data = data[: len(data) // dtype.itemsize * dtype.itemsize]
    tensor = Tensor.of("x", Role.STATS, dtype, (len(data) // dtype.itemsize,), data)
    reference = torch.frombuffer(bytearray(data), dtype=TORCH[dtype]) if data else torch.zeros(0, dtype=TORCH[dtype])
    np.testing.assert_array_equal(tensor.float32(), reference.float().numpy())
    assert tensor.is_finite() == bool(torch.isfinite(reference).all())


@pytest.mark.parametrize("at", [0, 65_535, 65_536, 131_071, 199_999])
def test_is_finite_looks_at_every_element_of_a_large_tensor(at: int) -> None:
    values = np.zeros(200_000, np.float32)
    assert Tensor.from_numpy("x", Role.STATS, values).is_finite()
    values[at] = np.nan
    assert not Tensor.from_numpy("x", Role.STATS, values).is_finite()


def test_a_tensor_whose_bytes_do_not_fit_its_shape_is_refused() -> None:
    with pytest.raises(CardFormatError, match="expected 24 bytes"):
        Tensor.of("x", Role.A, DType.FLOAT32, (2, 3), bytes(23))


def test_a_tensor_of_a_strided_array_holds_its_values() -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4).T
    assert Tensor.from_numpy("x", Role.A, array).float32().tolist() == array.tolist()


def test_a_digest_covers_all_bytes_also_of_large_data() -> None:
    data = bytes(range(256)) * 8192
    assert digest_of(data) == "blake3:" + blake3(data).hexdigest()
    assert not is_digest(digest_of(data) + "\n")
    assert not is_digest(digest_of(data).upper())


@settings(max_examples=40)
@given(card=cards())
def test_a_manifest_is_json_with_sorted_keys_that_any_reader_understands(card: LoRACard) -> None:
    fields = json.loads(card.manifest_bytes)
    assert list(fields) == sorted(fields)
    assert fields["tensors"][0]["digest"] == digest_of(card.tensors[0].data)
    assert sum(tensor["nbytes"] for tensor in fields["tensors"]) == card.nbytes
