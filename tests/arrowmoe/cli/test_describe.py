"""`skills describe`: what comes into a card, what stays out, and that its weights stay as they are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from arrowmoe.cli import describing
from arrowmoe.routing import statistics
from registry import manifest
from registry.card import LoRACard
from registry.store import Registry
from registry.tensor import Role
from tests.arrowmoe.cli.conftest import Cli
from tests.arrowmoe.tiny import card_for, llama_engine

LABELLED = {"morning": ["w3 w4", "w4 w5", "w5 w3"], "evening": ["w30 w31", "w31 w32", "w32 w30", "w30 w33"]}
PROMPTS = [f"w{number} w{number + 1}" for number in range(3, 27)]


@pytest.fixture(autouse=True)
def models(tiny_models: tuple[Path, Path], clean_environment: pytest.MonkeyPatch, cli: Cli, tmp_path: Path) -> None:
    clean_environment.setenv("ARROWMOE_EMBEDDER", str(tiny_models[1]))
    clean_environment.setenv("ARROWMOE_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def old(home: Path, tmp_path: Path) -> LoRACard:
    card = card_for(llama_engine(), tmp_path, "dates", seed=3).describe(description="Writes dates")
    with Registry.open(home) as registry:
        registry.publish(card, tags=["mine"])
        return registry.get("dates")


def lines(path: Path, prompts: Sequence[str]) -> Path:
    path.write_text("\n\n".join(prompts))
    return path


def rows(path: Path, *values: Mapping[str, str | None]) -> Path:
    path.write_text("".join(f"{json.dumps(value)}\n" for value in values))
    return path


def newest(home: Path) -> LoRACard:
    with Registry.open(home) as registry:
        return registry.get("dates")


def weights(card: LoRACard) -> dict[tuple[str, str], bytes]:
    return {(one.name, one.role): bytes(one.data) for one in card.tensors if one.role is not Role.STATS}


def embedded(cli: Cli, prompts: Sequence[str]) -> np.ndarray:
    vectors = np.array([one["vector"] for one in cli("encode", *prompts, "--json").json])
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def test_each_label_becomes_the_mean_of_its_prompts(cli: Cli, home: Path, old: LoRACard, tmp_path: Path) -> None:
    of_the_card = [
        {"text": text, "card": "dates", "label": label} for label, texts in LABELLED.items() for text in texts
    ]
    examples = rows(tmp_path / "x.jsonl", *of_the_card, {"text": "w60", "card": "other"})
    done = cli("skills", "describe", "dates", "--examples", examples, "--description", "", "--json")
    told = done.json
    assert (told["name"], told["version"], told["parent"], told["prompts"]) == ("dates", "2", old.digest, 7)
    card = newest(home)
    assert told["digest"] == card.digest
    assert weights(card) == weights(old)
    assert card.manifest.parents == (old.digest,)
    prototypes = card.statistics[manifest.PROTOTYPES].float32()
    expected = [embedded(cli, LABELLED[label]).mean(axis=0) for label in ("evening", "morning")]
    np.testing.assert_allclose(prototypes, expected, atol=2e-3)
    assert card.statistics[manifest.COUNTS].float32().tolist() == [4, 3]
    assert told["others"] == 1


def test_people_read_what_is_in_the_file_and_what_is_not(cli: Cli, old: LoRACard, tmp_path: Path) -> None:
    examples = rows(
        tmp_path / "x.jsonl", *({"text": text, "card": "dates"} for text in PROMPTS), {"text": "w9", "card": None}
    )
    done = cli("skills", "describe", "dates", "--examples", examples)
    assert "kept as dates@2" in done.out
    assert "24 prompts, by cross-fitting" in done.out
    assert "not in it: the prompts" in done.out
    assert "1 rows are of other cards" in done.err


def test_the_prompts_are_nowhere_in_the_card(cli: Cli, home: Path, old: LoRACard, tmp_path: Path) -> None:
    secret = [f"{prompt} patient-{number}" for number, prompt in enumerate(PROMPTS)]
    cli("skills", "describe", "dates", "--examples", lines(tmp_path / "x.txt", secret))
    path = Path(cli("skills", "show", "dates", "--json").json["path"])
    assert b"patient" not in path.read_bytes()
    assert b"Writes dates" in path.read_bytes()


def test_held_out_prompts_calibrate(cli: Cli, home: Path, old: LoRACard, tmp_path: Path) -> None:
    examples, held = lines(tmp_path / "x.txt", PROMPTS), lines(tmp_path / "y.txt", PROMPTS[:9])
    told = cli("skills", "describe", "dates", "--examples", examples, "--calibration", held, "--json").json
    assert (told["held_out"], told["statistics"]["calibrated"]) == (9, 9)
    few = lines(tmp_path / "z.txt", PROMPTS[:4])
    assert "nothing: too few prompts" in cli("skills", "describe", "dates", "--examples", few).out


@pytest.mark.parametrize("least", [1, 3, 5])
def test_no_prototype_is_of_fewer_prompts(cli: Cli, home: Path, old: LoRACard, tmp_path: Path, least: int) -> None:
    examples = lines(tmp_path / "x.txt", PROMPTS)
    options = ["--min-prompts", str(least), "--description", ""]
    found = cli("skills", "describe", "dates", "--examples", examples, *options, "--json").json["statistics"]
    counts = newest(home).statistics[manifest.COUNTS].float32()
    assert counts.min() >= least
    assert (counts.sum(), found["min_prompts"], found["prototypes"]) == (len(PROMPTS), least, len(counts))


def test_the_budget_holds_or_is_an_error(cli: Cli, old: LoRACard, tmp_path: Path) -> None:
    examples = lines(tmp_path / "x.txt", PROMPTS)
    told = cli("skills", "describe", "dates", "--examples", examples, "--budget", "1500", "--json").json
    assert told["statistics"]["nbytes"] <= 1500
    refused = cli("skills", "describe", "dates", "--examples", examples, "--budget", "10")
    assert (refused.code, "room for" in refused.err) == (1, True)


def test_without_a_file_the_words_it_shows_describe_it(cli: Cli, home: Path, old: LoRACard) -> None:
    told = cli("skills", "describe", "dates", "--description", "w3 w4, w5 and w6", "--json").json
    assert (told["prompts"], told["statistics"]["prototypes"]) == (0, 4)
    assert newest(home).manifest.description == "w3 w4, w5 and w6"
    expected = embedded(cli, ["w3 w4, w5 and w6", "w3 w4", "w5", "w6"])
    np.testing.assert_allclose(newest(home).statistics[manifest.PROTOTYPES].float32(), expected, atol=2e-3)


def test_statistics_are_taken_out_again(cli: Cli, home: Path, old: LoRACard, tmp_path: Path) -> None:
    cli("skills", "describe", "dates", "--examples", lines(tmp_path / "x.txt", PROMPTS))
    assert newest(home).manifest.routing is not None
    told = cli("skills", "describe", "dates", "--no-stats", "--json").json
    assert (told["version"], told["statistics"]) == ("3", None)
    card = newest(home)
    assert (card.manifest.routing, dict(card.statistics), weights(card)) == (None, {}, weights(old))
    assert cli("skills", "show", "dates", "--json").json["tags"] == ["mine"]


def test_nothing_is_kept_where_that_is_asked(cli: Cli, home: Path, old: LoRACard, tmp_path: Path) -> None:
    examples = lines(tmp_path / "x.txt", PROMPTS)
    told = cli("skills", "describe", "dates", "--examples", examples, "--no-publish", "--json").json
    assert told["digest"] is None
    assert told["statistics"]["prompts"] >= len(PROMPTS)
    assert newest(home).digest == old.digest


def test_what_cannot_be_described_is_an_error(cli: Cli, home: Path, old: LoRACard, tmp_path: Path) -> None:
    other = rows(tmp_path / "other.jsonl", {"text": "w9", "card": "other"})
    bad = rows(tmp_path / "bad.jsonl", {"text": 9}, {"card": "dates"})
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for path, said in [
        (other, "got none in 1 rows"),
        (bad, "2 bad rows"),
        (tmp_path / "binary", "can be read"),
        (tmp_path / "missing", "can be read"),
    ]:
        done = cli("skills", "describe", "dates", "--examples", path)
        assert (done.code, said in done.err) == (1, True), done.err
    assert cli("skills", "describe", "nobody").code == 1
    assert cli("skills", "describe", "dates", "--no-stats", "--examples", other).code == 2
    assert newest(home).digest == old.digest


def test_the_options_know_the_limits_that_hold() -> None:
    assert describing.MIN_PROMPTS == statistics.MIN_PROMPTS
    assert describing.MAX_STATISTICS_BYTES == manifest.MAX_STATISTICS_BYTES
