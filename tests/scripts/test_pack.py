"""The cards that ship are what `pack` makes of their adapters and of `cards.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from arrowmoe.demo import shipped
from registry.format import LoRAFormat
from registry.tensor import Role
from scripts.demo_cards import pack

ENTRIES: dict[str, dict[str, Any]] = {
    entry["name"]: entry for entry in json.loads((shipped.DATA / "cards.json").read_text(encoding="utf-8"))
}
SHIPPED_BYTES = 4_000_000


def test_one_file_per_card_under_4_mb_in_all() -> None:
    files = list(shipped.CARDS.iterdir())
    assert sorted(file.name for file in files) == sorted(f"{name}.lora.arrow" for name in ENTRIES)
    assert sum(file.stat().st_size for file in files) < SHIPPED_BYTES


@pytest.mark.parametrize("name", ENTRIES)
def test_a_shipped_card_is_sound_and_says_what_cards_json_says(name: str) -> None:
    card, entry = LoRAFormat.load(shipped.CARDS / f"{name}.lora.arrow", verify=True), ENTRIES[name]
    said = card.manifest.model_dump(mode="json")
    assert {field: said[field] for field in pack.ABOUT} == {field: entry[field] for field in pack.ABOUT}
    assert (card.name, card.manifest.base.name) == (name, entry["base"])
    assert {tensor.dtype for tensor in card.tensors if tensor.role is not Role.STATS} == {"bfloat16"}
    assert card.manifest.routing is not None
    assert card.manifest.routing.calibration >= 30
    assert card.signature is None


@pytest.mark.parametrize("name", ENTRIES)
def test_packing_again_gives_the_same_card(name: str, tmp_path: Path) -> None:
    before = LoRAFormat.load(shipped.CARDS / f"{name}.lora.arrow")
    before.to_peft(tmp_path / "adapters" / name)
    (tmp_path / "out").mkdir()
    path = pack.pack(ENTRIES[name], adapters=tmp_path / "adapters", out=tmp_path / "out")
    then = json.loads(before.manifest_bytes)["created"]
    without = before.with_routing(None, ())  # statistics depend on an embedder's last bits
    assert LoRAFormat.load(path).with_routing(None, ()).describe(created=then) == without.describe(created=then)
