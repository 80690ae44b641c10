from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from registry.format import LoRAFormat
from registry.identity import Identity
from tests.registry.cards import small_card

MAX_GROWTH_BYTES = 64 << 20


def run_worker(path: Path, mode: str, count: int = 0) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.registry.corruption_worker", str(path), mode, str(count)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, f"the loader died with {result.returncode}: {result.stderr[-2000:]}"
    report: dict[str, Any] = json.loads(result.stdout)
    return report


@pytest.fixture
def signed(tmp_path: Path) -> Path:
    path = tmp_path / "card.lora.arrow"
    card = small_card(rank=8, modules={"a": (30, 20), "b": (50, 7)}, dtype="bfloat16", description="small")
    LoRAFormat.save(card.signed(Identity.generate()), path)
    return path


def test_a_thousand_corruptions_are_refused_or_harmless(signed: Path) -> None:
    report = run_worker(signed, "corruptions", 1000)
    outcomes = report["outcomes"]
    assert sum(outcomes.values()) == 1000
    assert report["growth_bytes"] < MAX_GROWTH_BYTES
    # Damage of every kind was met, so the run says something: structure, manifest, weights and signature, padding.
    assert outcomes["CardFormatError"] > 300
    assert outcomes["ManifestError"] > 20
    assert outcomes["CardIntegrityError"] > 40
    assert 0 < outcomes["equal"] < 200


def test_every_truncation_is_refused(signed: Path) -> None:
    report = run_worker(signed, "truncations")
    assert sum(report["outcomes"].values()) == signed.stat().st_size
    assert set(report["outcomes"]) <= {"CardFormatError", "CardLimitError"}
    assert report["growth_bytes"] < MAX_GROWTH_BYTES
