from __future__ import annotations

import json
from pathlib import Path

import pytest

from registry.digest import digest_of
from registry.format import LoRAFormat

GOLDEN = Path(__file__).parents[1] / "golden"
EXPECTED = {
    path.parent / name: facts
    for path in sorted(GOLDEN.glob("v*/expected.json"))
    for name, facts in json.loads(path.read_text()).items()
}


def test_every_golden_file_is_described() -> None:
    assert set(GOLDEN.glob("v*/*.lora.arrow")) == set(EXPECTED)
    assert len(EXPECTED) >= 3


@pytest.mark.parametrize("path", EXPECTED, ids=lambda path: path.stem)
def test_a_golden_card_loads_as_it_did_when_it_was_written(path: Path, tmp_path: Path) -> None:
    facts = EXPECTED[path]
    assert path.stat().st_size == facts["file_bytes"]
    card = LoRAFormat.load(path)
    assert (card.digest, card.nbytes, card.manifest.publisher) == (facts["digest"], facts["nbytes"], facts["publisher"])
    assert card.digest == digest_of(card.manifest_bytes)
    assert card.tensors[0].float32().reshape(-1)[:3].tolist() == facts["first_values"]
    LoRAFormat.save(card, tmp_path / "again.lora.arrow")
    again = LoRAFormat.load(tmp_path / "again.lora.arrow")
    assert (again.digest, again.signature) == (card.digest, card.signature)
