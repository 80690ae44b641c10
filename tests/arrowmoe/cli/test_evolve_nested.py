"""`evolve nested`: train, look, ask again, consolidate, and publish what came of it."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from evolution.nested_experiment import ConsolidationSpec
from registry.store import Registry
from tests.arrowmoe.cli.conftest import Cli
from tests.arrowmoe.tiny import tokenizer
from tests.evolution.nested_experiments import TUNING, image_experiment, text_experiment
from tests.evolution.nested_models import tiny_vit
from tests.peft_models import tiny_llama


def written(directory: Path, kind: str, **changes: object) -> Path:
    """An experiment's file beside its model."""
    model = tiny_vit() if kind == "image" else tiny_llama()
    model.save_pretrained(directory / "model")
    tokenizer().save_pretrained(directory / "model")
    make = image_experiment if kind == "image" else text_experiment
    made = make(directory, tuning=replace(TUNING, steps=4), **changes)
    said = made.model_dump(mode="json") | {"tuning": asdict(made.tuning) | {"targets": "all"}}
    said["base"]["model"] = str(directory / "model")
    path = directory / "experiment.yaml"
    path.write_text(yaml.safe_dump(said))
    return path


def test_images_are_learnt_shown_and_asked_again(cli: Cli, tmp_path: Path) -> None:
    trained = cli("evolve", "nested", "train", written(tmp_path, "image"), "--json").json
    assert [one["name"] for one in trained["tasks"]] == ["digits-01", "digits-23"]
    assert cli("evolve", "nested", "show", tmp_path / "out", "--json").json == trained
    shown = cli("evolve", "nested", "show", tmp_path / "out")
    assert "forgetting" in shown.out
    assert "digits-23" in shown.out
    asked = cli("evolve", "nested", "eval", tmp_path / "out", "--json").json
    assert [one["untold"] for one in asked] == trained["untold"][-1]
    assert [one["told"] for one in asked] == trained["told"][-1]


def test_cards_come_of_it_with_their_parents(cli: Cli, home: Path, tmp_path: Path) -> None:
    path = written(tmp_path, "text", consolidation=None)
    assert cli("evolve", "nested", "train", path).code == 0
    made = cli("evolve", "nested", "export", tmp_path / "out", "--name", "words", "--json").json
    assert [one["name"] for one in made] == ["words", "words-words-0", "words-words-1", "words-all"]
    with Registry.open(home) as registry:
        slow, *own, whole = (registry.get(one["name"], verify=True) for one in made)
    assert all(card.manifest.parents == (slow.digest,) for card in own)
    assert whole.manifest.parents == (slow.digest, *(card.digest for card in own))
    assert slow.manifest.base.name == "maker/tiny"
    assert slow.manifest.training["learnt"] == ["words-0", "words-1"]

    done = cli("evolve", "nested", "consolidate", tmp_path / "out", "words-0", "--json").json
    assert done["kept"]
    again = cli("evolve", "nested", "consolidate", tmp_path / "out", "words-0")
    assert again.code != 0
    assert "has none" in again.err
    less = cli("evolve", "nested", "export", tmp_path / "out", "--name", "fewer", "--json").json
    assert [one["name"] for one in less] == ["fewer", "fewer-words-1", "fewer-all"]


def test_the_last_consolidation_can_be_rolled_back(cli: Cli, tmp_path: Path) -> None:
    path = written(tmp_path, "text", consolidation=ConsolidationSpec(tolerance=None))
    trained = cli("evolve", "nested", "train", path, "--json").json
    assert trained["held"] == [None]
    done = cli("evolve", "nested", "rollback", tmp_path / "out")
    assert (done.code, "words-1 has a fast LoRA of its own again" in done.out) == (0, True)
    assert "words-1: its consolidation was rolled back" in cli("evolve", "nested", "show", tmp_path / "out").out
    assert cli("evolve", "nested", "show", tmp_path / "out", "--json").json["held"] == [1]
    again = cli("evolve", "nested", "rollback", tmp_path / "out")
    assert (again.code, "to roll back, got none" in again.err) == (1, True)


@pytest.mark.parametrize("verb", ["show", "eval"])
def test_a_directory_without_an_experiment_says_so(cli: Cli, tmp_path: Path, verb: str) -> None:
    done = cli("evolve", "nested", verb, tmp_path)
    assert done.code != 0
    assert "expected" in done.err


def test_a_share_that_is_none_is_refused(cli: Cli, tmp_path: Path) -> None:
    done = cli("evolve", "nested", "consolidate", tmp_path, "words-0", "--energy", "2")
    assert done.code != 0
    assert "expected a consolidation" in done.err
