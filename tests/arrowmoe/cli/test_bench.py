"""`arrowmoe bench tune` with a tiny model: measured, kept, and used by the next engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from arrowmoe.bench_commands import sizes_of
from arrowmoe.lora.costs import default_prices, prices_of
from tests.arrowmoe.cli.conftest import Cli
from tests.peft_models import HIDDEN, tiny_llama


def test_prices_are_measured_and_kept(
    cli: Cli, tiny_models: tuple[Path, Path], tmp_path: Path, clean_environment: pytest.MonkeyPatch
) -> None:
    clean_environment.setenv("ARROWMOE_CACHE_DIR", str(tmp_path / "cache"))
    clean_environment.setattr("arrowmoe.lora.tuning.MAX_MODULES", 2)
    found = cli("bench", "tune", "--base", str(tiny_models[0]), "--json").json
    kept = prices_of(tmp_path / "cache", torch.device("cpu"), torch.float32)
    assert found["prices"] == vars(kept)
    assert kept != default_prices(torch.device("cpu"))
    assert min(vars(kept).values()) >= 0
    assert Path(found["path"]).is_relative_to(tmp_path / "cache")
    assert found["dtype"] == "float32"


def test_the_maps_inside_a_model_are_measured() -> None:
    assert sizes_of(tiny_llama()) == [(HIDDEN, HIDDEN // 2), (HIDDEN, 2 * HIDDEN)]
