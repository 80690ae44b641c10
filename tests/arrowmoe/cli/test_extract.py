from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from tests.arrowmoe.cli.conftest import Cli
from tests.peft_models import load_peft, outputs, tiny_llama

MODULE = "model.layers.0.mlp.up_proj"


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    base = tiny_llama()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.get_parameter(f"{MODULE}.weight")[:3] += 0.2
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    return tmp_path / "base", tmp_path / "tuned"


def test_a_tuned_model_becomes_a_card_that_peft_turns_back_into_it(
    cli: Cli, models: tuple[Path, Path], tmp_path: Path
) -> None:
    base, tuned = models
    done = cli(
        "skills", "extract", "--base", base, "--tuned", tuned, "--error", "1e-4", "--name", "taken", "--json"
    ).json
    assert done["modules"] == [{"module": MODULE, "rank": 1, "error": pytest.approx(0, abs=1e-4)}]
    assert done["whole"] == []
    assert [card["digest"] for card in cli("skills", "ls", "--json").json] == [done["card"]["digest"]]
    assert done["card"]["publisher"] is not None
    assert cli("skills", "export", "taken", tmp_path / "out").code == 0
    after = outputs(type(tiny_llama()).from_pretrained(tuned))
    torch.testing.assert_close(outputs(load_peft(tiny_llama(), tmp_path / "out")), after, rtol=1e-4, atol=1e-5)


def test_one_bound_is_wanted_and_a_sensible_one(cli: Cli, models: tuple[Path, Path]) -> None:
    base, tuned = models
    command = ("skills", "extract", "--base", base, "--tuned", tuned, "--name", "taken")
    assert cli(*command, "--rank", "4", "--energy", "0.9").code == 2
    failed = cli(*command, "--energy", "1.5")
    assert failed.code == 1
    assert "above 0 and at most 1" in failed.err


def test_what_cannot_be_extracted_is_said_with_what_to_do(cli: Cli, models: tuple[Path, Path]) -> None:
    base, _ = models
    failed = cli("skills", "extract", "--base", base, "--tuned", base, "--name", "taken")
    assert failed.code == 1
    assert "same model" in failed.err
    assert cli("skills", "ls", "--json").json == []
