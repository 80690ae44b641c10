from __future__ import annotations

import json
import math

import pytest
from blake3 import blake3

from registry.errors import ManifestError
from registry.manifest import MAX_MANIFEST_BYTES, AdapterSpec, Manifest, base_fingerprint, manifest_bytes, module_shapes
from tests.registry.cards import small_card


def test_scaling_follows_the_papers() -> None:
    spec = AdapterSpec(rank=16, alpha=32.0, target_modules=("a", "b"), rank_pattern={"b": 4}, alpha_pattern={"b": 1.0})
    assert [spec.scaling_of(module) for module in "ab"] == [2.0, 0.25]
    stabilised = spec.model_copy(update={"scaling": "rslora"})
    assert [stabilised.scaling_of(module) for module in "ab"] == [32 / math.sqrt(16), 1 / math.sqrt(4)]


def test_the_fingerprint_is_that_of_the_documented_json() -> None:
    shapes = {"b.ü": (3, 4), "a": (1, 2)}
    assert base_fingerprint(shapes) == "blake3:" + blake3('[["a",1,2],["b.ü",3,4]]'.encode()).hexdigest()
    assert base_fingerprint(dict(reversed(shapes.items()))) == base_fingerprint(shapes)


def test_the_fingerprint_depends_on_the_targets_and_not_on_rank_or_weights() -> None:
    card = small_card()
    assert small_card(rank=2, seed=9, dtype="float16").manifest.base.fingerprint == card.manifest.base.fingerprint
    assert small_card(modules=3).manifest.base.fingerprint != card.manifest.base.fingerprint
    assert module_shapes(card.tensors) == {f"model.layers.{i}.mlp.up_proj": (8, 6) for i in range(2)}


def test_unknown_fields_are_kept_at_every_level() -> None:
    fields = json.loads(small_card().manifest_bytes)
    fields["later"], fields["adapter"]["later"], fields["tensors"][0]["later"] = 1, 2, 3
    manifest = Manifest.parse(manifest_bytes(fields))
    assert manifest.model_extra == {"later": 1}
    assert manifest.adapter.model_extra == {"later": 2}
    assert manifest.tensors[0].model_extra == {"later": 3}


@pytest.mark.parametrize("name", ["a", "A-1", "x" * 96, "a.b_c-d", "0"])
def test_names_that_are_taken(name: str) -> None:
    assert small_card(name).name == name


@pytest.mark.parametrize("name", ["", ".", "..", "-a", "a-", ".a", "a/b", "a\\b", "a b", "é", "a\n", "a\0", "x" * 97])
def test_names_that_are_refused(name: str) -> None:
    with pytest.raises(ManifestError, match="name") as caught:
        small_card(name)
    assert "letters, digits" in (caught.value.hint or "")


def test_a_manifest_over_the_limit_is_refused_unparsed() -> None:
    with pytest.raises(ManifestError, match="at most"):
        Manifest.parse(b"[" * (MAX_MANIFEST_BYTES + 1))


def test_a_missing_field_is_named_and_the_rest_counted() -> None:
    with pytest.raises(ManifestError, match=r"name: Field required \(and \d+ more\)"):
        Manifest.parse(b"{}")


@pytest.mark.parametrize(
    ("path", "value"),
    [("rank", "4"), ("rank", True), ("rank", 4.0), ("rank", 0), ("alpha", "8"), ("dora", 1), ("scaling", "other")],
)
def test_types_are_not_guessed(path: str, value: object) -> None:
    fields = json.loads(small_card().manifest_bytes)
    fields["adapter"][path] = value
    with pytest.raises(ManifestError, match=f"adapter.{path}"):
        Manifest.parse(manifest_bytes(fields))


def test_a_target_that_stands_twice_is_refused() -> None:
    fields = json.loads(small_card().manifest_bytes)
    fields["adapter"]["target_modules"] *= 2
    with pytest.raises(ManifestError, match="twice"):
        Manifest.parse(manifest_bytes(fields))


def test_too_many_patterns_are_refused() -> None:
    fields = json.loads(small_card().manifest_bytes)
    fields["adapter"]["rank_pattern"] = {f"m{index}": 1 for index in range(16_385)}
    with pytest.raises(ManifestError, match="at most 16384 patterns"):
        Manifest.parse(manifest_bytes(fields))
