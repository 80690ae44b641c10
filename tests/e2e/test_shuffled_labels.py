"""Twenty nights whose teacher answers by chance: an expert that learned nothing but the form must not be published."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from arrowmoe.settings import EvolutionSettings
from arrowmoe.signalling import signal_store
from arrowmoe.training import train_from_file
from evolution.executors import InProcess
from evolution.protocols import Example
from registry.store import Registry
from tests.arrowmoe.nodes import save_tiny_models
from tests.e2e.night_home import GOLD, evolution_of, traffic

NIGHTS, LABELS = 20, 10


def shuffled(seed: int) -> list[Example]:
    """The prompts of `GOLD`, each with one of ten answers that nothing in it decides."""
    rng = random.Random(seed)
    return [Example(prompt=one.prompt, answer=f"w{40 + rng.randrange(LABELS)}") for one in GOLD]


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_shuffled_answers_are_rejected_in_nineteen_nights_of_twenty(tmp_path: Path, empty_home: Path) -> None:
    model, _ = save_tiny_models(tmp_path)
    rejected, tested = 0, 0
    for seed in range(NIGHTS):
        home, gold = tmp_path / f"home-{seed}", shuffled(seed)
        shutil.copytree(empty_home, home)
        with Registry.open(home) as registry:
            signal_store(registry.database, EvolutionSettings()).record_all(traffic(gold))
            evolution = evolution_of(registry, model, gold=gold, executor=InProcess(train_from_file))
            found = evolution.run()
            evolution.close()
            assert found is not None
            said = found.to_json()
            assert not said["failed"], said
            rejected += not said["published"]
            tested += len([*home.glob("nights/*/verdict.json")])
    assert tested == NIGHTS, "each was trained and judged"
    assert rejected >= 19
