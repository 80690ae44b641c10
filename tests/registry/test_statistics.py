"""Statistics for the router in a card: what describes them, what they may weigh, and how they come in and go out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from registry.card import LoRACard
from registry.errors import CardIntegrityError, ManifestError
from registry.format import LoRAFormat
from registry.identity import Identity
from registry.manifest import Manifest, manifest_bytes
from registry.tensor import Role, Tensor
from tests.registry.cards import small_card, statistics

GOLDEN = sorted((Path(__file__).parents[1] / "golden" / "v1").glob("*.lora.arrow"))


def described(**changes: Any) -> LoRACard:
    spec, tensors = statistics(**changes)
    return small_card().with_routing(spec, tensors)


def stats(name: str, *shape: int, dtype: str = "float32") -> Tensor:
    return Tensor.from_numpy(name, Role.STATS, np.zeros(shape, dtype))


def test_statistics_go_into_a_file_and_come_back(tmp_path: Path) -> None:
    spec, tensors = statistics()
    LoRAFormat.save(small_card().with_routing(spec, tensors), tmp_path / "card.lora.arrow")
    loaded = LoRAFormat.load(tmp_path / "card.lora.arrow")
    assert loaded.manifest.routing == spec
    assert {name: bytes(tensor.data) for name, tensor in loaded.statistics.items()} == {
        tensor.name: bytes(tensor.data) for tensor in tensors
    }


def test_statistics_change_neither_weights_nor_base_and_nobody_signed_them() -> None:
    signed = small_card(dora=True).signed(Identity.generate())
    card = signed.with_routing(*statistics())
    card.verify()
    assert (card.signature, card.manifest.publisher) == (None, None)
    assert card.digest != signed.digest
    assert (card.manifest.base, card.manifest.adapter) == (signed.manifest.base, signed.manifest.adapter)
    assert {tensor for tensor in card.tensors if tensor.role is not Role.STATS} == set(signed.tensors)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.name)
def test_a_card_from_before_takes_statistics_in_replaces_them_and_lets_them_go(path: Path) -> None:
    card = LoRAFormat.load(path)
    assert (card.manifest.routing, card.statistics) == (None, {})
    first = card.with_routing(*statistics(seed=1))
    second = first.with_routing(*statistics(seed=2, sketch=0, calibration=0))
    assert second.statistics.keys() == {"routing.prototypes", "routing.counts"}
    assert second.manifest.model_extra == card.manifest.model_extra
    bare = second.with_routing(None)
    assert (bare.manifest.routing, bare.statistics) == (None, {})
    expected = json.loads(card.manifest_bytes) | {"publisher": None, "routing": None}
    assert json.loads(bare.manifest_bytes) == expected


def test_unknown_fields_of_a_tensor_survive() -> None:
    fields = json.loads(small_card().manifest_bytes)
    fields["tensors"][1]["later"] = 3
    data = manifest_bytes(fields)
    card = LoRACard(manifest_bytes=data, manifest=Manifest.parse(data), tensors=small_card().tensors)
    specs = card.with_routing(*statistics()).manifest.tensors
    assert [spec.model_extra for spec in specs if spec.name == card.tensors[1].name].count({"later": 3}) == 1


def test_every_tensor_is_aligned_though_weights_are_of_two_bytes() -> None:
    card = small_card(dtype="bfloat16").with_routing(*statistics())
    sizes = [tensor.dtype.itemsize for tensor in card.tensors]
    assert sizes == sorted(sizes, reverse=True)


def test_a_weight_is_no_statistic() -> None:
    spec, tensors = statistics()
    with pytest.raises(ManifestError, match="the adapter would change"):
        small_card().with_routing(spec, [*tensors, small_card().tensors[0]])


def test_statistics_that_are_not_finite_are_refused() -> None:
    spec, (prototypes, *rest) = statistics()
    values = prototypes.float32().astype(np.float16)
    values[1, 2] = np.nan
    bad = Tensor.from_numpy(prototypes.name, Role.STATS, values)
    with pytest.raises(CardIntegrityError, match=r"routing\.prototypes.*NaN"):
        small_card().with_routing(spec, [bad, *rest])


def test_statistics_do_not_change_by_description() -> None:
    with pytest.raises(ManifestError, match="routing"):
        described().describe(routing=None)
    assert described().describe(description="new").manifest.routing == statistics()[0]


def test_statistics_weigh_at_most_64_kib_whoever_named_them() -> None:
    spec, tensors = statistics()
    room = (64 << 10) - sum(tensor.nbytes for tensor in tensors)
    assert room % 4 == 0
    small_card().with_routing(spec, [*tensors, stats("later", room // 4)])
    with pytest.raises(ManifestError, match="at most 65536 bytes, got 65540"):
        small_card().with_routing(spec, [*tensors, stats("later", room // 4 + 1)])
    with pytest.raises(ManifestError, match="at most 65536 bytes"):
        small_card().with_routing(None, [stats("later", 16_385)])


@pytest.mark.parametrize("name", ["routing.prototypes", "routing.counts", "routing.sketch", "routing.calibration"])
def test_statistics_that_nothing_describes_are_refused(name: str) -> None:
    with pytest.raises(ManifestError, match="expected routing to describe"):
        small_card().with_routing(None, [stats(name, 1, 4)])


@pytest.mark.parametrize("missing", ["routing.prototypes", "routing.counts", "routing.calibration"])
def test_a_description_of_what_is_not_there_is_refused(missing: str) -> None:
    spec, tensors = statistics()
    with pytest.raises(ManifestError, match=missing):
        small_card().with_routing(spec, [tensor for tensor in tensors if tensor.name != missing])


@pytest.mark.parametrize(
    "odd",
    [
        stats("routing.prototypes", 3, 5, dtype="float16"),
        stats("routing.prototypes", 2, 4, dtype="float16"),
        stats("routing.prototypes", 0, 4, dtype="float16"),
        stats("routing.prototypes", 4, dtype="float16"),
        stats("routing.prototypes", dtype="float16"),
        stats("routing.prototypes", 3, 4),
        stats("routing.counts", 2),
        stats("routing.counts", 3, 1),
        stats("routing.counts", 3, dtype="float16"),
        stats("routing.sketch", 2, 3, dtype="float16"),
        stats("routing.sketch", 2, 4),
        stats("routing.sketch", dtype="float16"),
        stats("routing.calibration", 5, 1),
        stats("routing.calibration", 0),
        stats("routing.calibration", 5, dtype="float16"),
    ],
    ids=lambda tensor: f"{tensor.name} {tensor.dtype} {tensor.shape}",
)
def test_statistics_of_another_form_are_refused(odd: Tensor) -> None:
    spec, tensors = statistics()
    with pytest.raises(ManifestError, match=r"routing\.\w+.*(expected|must agree)"):
        small_card().with_routing(spec, [odd if tensor.name == odd.name else tensor for tensor in tensors])


def test_calibration_scores_without_their_number_are_refused() -> None:
    spec, tensors = statistics()
    with pytest.raises(ManifestError, match="calibration is 0 prompts"):
        small_card().with_routing(spec.model_copy(update={"calibration": 0}), tensors)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("embedder", ""),
        ("embedder", None),
        ("dimension", 0),
        ("dimension", "4"),
        ("dimension", 1 << 40),
        ("probe", "blake3:" + "A" * 64),
        ("probe", "tiny"),
        ("count", 0),
        ("count", 1.0),
        ("calibration", -1),
        ("min_prompts", 0),
        ("min_prompts", True),
    ],
)
def test_a_description_of_another_form_is_refused(field: str, value: object) -> None:
    fields = json.loads(described().manifest_bytes)
    fields["routing"][field] = value
    with pytest.raises(ManifestError, match=rf"routing\.{field}"):
        Manifest.parse(manifest_bytes(fields))


@pytest.mark.parametrize("field", ["embedder", "dimension", "probe", "count", "min_prompts"])
def test_what_a_description_lacks_is_named(field: str) -> None:
    fields = json.loads(described().manifest_bytes)
    del fields["routing"][field]
    with pytest.raises(ManifestError, match=rf"routing\.{field}: Field required"):
        Manifest.parse(manifest_bytes(fields))
