"""`router …` on tiny models: cards fitted to a dataset, shown, judged against plain routing, and routers trained."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import pytest

from arrowmoe.engine import ArrowEngine
from arrowmoe.routing.heads import load
from registry.card import LoRACard
from registry.store import Registry
from registry.tensor import Role
from tests.arrowmoe.cli.conftest import Cli
from tests.arrowmoe.nodes import HEAVY, modules_after
from tests.arrowmoe.tiny import card_for, llama_engine

# The tiny tokenizer knows the words w3 … w63 only, so cards are called so; "none" is its unknown word.
WORDS = {"w60": range(3, 15), "w61": range(30, 42)}
ANSWERS = {"w60": "w20", "w61": "w50"}
Row = Mapping[str, str | None]


@pytest.fixture(autouse=True)
def models(tiny_models: tuple[Path, Path], clean_environment: pytest.MonkeyPatch, cli: Cli, tmp_path: Path) -> None:
    clean_environment.setenv("ARROWMOE_BASES", str(tiny_models[0]))
    clean_environment.setenv("ARROWMOE_EMBEDDER", str(tiny_models[1]))
    clean_environment.setenv("ARROWMOE_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def cards(home: Path, tmp_path: Path) -> None:
    with Registry.open(home) as registry:
        for seed, name in enumerate(WORDS):
            registry.publish(card_for(llama_engine(), tmp_path, name, seed=seed))


def prompts(shift: int) -> list[Row]:
    """Prompts of three neighbouring words of a card's own; different shifts give different prompts."""
    return [
        {"text": f"w{word} w{word + shift} w{word + 1}", "card": name, "answer": ANSWERS[name]}
        for name, words in WORDS.items()
        for word in words
    ]


OUT_OF_SCOPE: list[Row] = [{"text": f"w{word} w{word - 20} w2", "card": None} for word in range(54, 60)]


def dataset(path: Path, *rows: Row) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@pytest.fixture
def train(tmp_path: Path) -> Path:
    return dataset(tmp_path / "train.jsonl", *prompts(1), *OUT_OF_SCOPE)


@pytest.fixture
def judged(tmp_path: Path) -> Path:
    return dataset(tmp_path / "eval.jsonl", *prompts(2), *OUT_OF_SCOPE[:2])


@pytest.mark.usefixtures("cards")
def test_fit_describes_every_card_of_the_dataset(cli: Cli, train: Path, tmp_path: Path) -> None:
    told = cli("router", "fit", train, "--json").json
    assert [(one["name"], one["version"], one["prompts"]) for one in told] == [("w60", "2", 12), ("w61", "2", 12)]
    assert [one["statistics"]["calibrated"] for one in told] == [12, 12]
    held = dataset(tmp_path / "held.jsonl", *prompts(2)[:12])
    again = cli("router", "fit", train, "--calibration", held, "--json").json
    assert [(one["version"], one["held_out"]) for one in again] == [("3", 12), ("3", 0)]
    assert "kept as w61@4" in cli("router", "fit", train).out


@pytest.mark.usefixtures("cards")
def test_a_dataset_with_an_unknown_card_changes_nothing(cli: Cli, train: Path, tmp_path: Path) -> None:
    before = cli("skills", "ls", "-q").out
    for rows in ([*prompts(1), {"text": "w5", "card": "nobody"}], OUT_OF_SCOPE, []):
        done = cli("router", "fit", dataset(tmp_path / "x.jsonl", *rows))
        assert (done.code, done.err.startswith("error: ")) == (1, True)
    foreign = dataset(tmp_path / "y.jsonl", {"text": "w5", "card": "nobody"})
    assert "got ['nobody'] too" in cli("router", "fit", train, "--calibration", foreign).err
    assert cli("skills", "ls", "-q").out == before


@pytest.mark.usefixtures("cards")
def test_show_says_what_each_card_is_known_by(
    cli: Cli, train: Path, clean_environment: pytest.MonkeyPatch, tiny_models: tuple[Path, Path]
) -> None:
    one_card = dataset(train.with_name("one.jsonl"), *prompts(1)[:12])
    cli("router", "fit", one_card)
    found = cli("router", "show", "--json").json
    assert (found["mode"], found["alpha"], found["embedder"]) == ("top1", 0.05, "tiny-encoder")
    known = {card["name"]: (card["version"], card["evidence"]) for card in found["cards"]}
    assert known == {"w60": ("2", "statistics"), "w61": ("1", "name")}
    statistics = {card["name"]: card["statistics"] for card in found["cards"]}
    assert (statistics["w60"]["prompts"], statistics["w60"]["calibrated"], statistics["w61"]) == (12, 12, None)
    assert "w60@2" in cli("router", "show").out
    assert cli("router", "show", "--base", "another", "-q").out == ""
    assert cli("router", "show", "--base", tiny_models[0], "-q").out.split() == ["w60", "w61"]
    clean_environment.setenv("ARROWMOE_EMBEDDER", "nowhere/to-be-found")
    elsewhere = cli("router", "show", "--json").json
    assert {card["evidence"] for card in elsewhere["cards"]} == {"name"}, "statistics of another embedder do not count"


@pytest.mark.usefixtures("cards")
def test_eval_counts_what_route_says(cli: Cli, train: Path, judged: Path, tmp_path: Path) -> None:
    cli("router", "fit", train)
    rows = [json.loads(line) for line in judged.read_text().splitlines()]
    routed = [cli("route", row["text"], "--json").json for row in rows]
    known = [(row, one) for row, one in zip(rows, routed, strict=True) if row["card"] is not None]
    best = sum(one["candidates"][0]["name"] == row["card"] for row, one in known)
    used = sum(one["adapters"] == {row["card"]: 1.0} for row, one in known)
    report = tmp_path / "report.html"
    found = cli("router", "eval", judged, "--html", report, "--json").json
    assert (found["accuracy"]["count"], found["routed_accuracy"]["count"]) == (best, used)
    assert (found["rows"], found["accuracy"]["total"], found["unknown"]) == (26, 24, [])
    assert best > 18, "the words of the two cards are different"
    text = report.read_text(encoding="utf-8")
    assert all(row["text"] in text for row in rows[::2])
    assert "://" not in text.replace("http://www.w3.org/", "")
    shown = cli("router", "eval", judged, "--alpha", "0.2", "--mode", "soft").out
    assert "soft α 0.2: 26 prompts, 2 cards" in shown


@pytest.mark.usefixtures("cards")
def test_eval_says_which_cards_are_not_here(cli: Cli, train: Path, tmp_path: Path) -> None:
    cli("router", "fit", train)
    data = dataset(tmp_path / "x.jsonl", *prompts(2), {"text": "w5", "card": "nobody"})
    done = cli("router", "eval", data, "--json")
    assert done.json["unknown"] == ["nobody"]
    assert "nobody" in cli("router", "eval", data).err


class FirstOfAll:
    """Judges by no weights: what it was given first fits every prompt."""

    asked: ClassVar[list[str]] = []

    def __init__(self, engine: ArrowEngine) -> None:
        self.asked.append(engine.name)

    def keep(self, cards: Sequence[LoRACard]) -> None:
        self.digest = next(card.digest for card in cards if card.name == "w60")

    def best(self, text: str, mask: Collection[str] | None) -> tuple[str, float]:
        return self.digest, 9.0


@pytest.mark.usefixtures("cards")
def test_eval_judges_cards_that_have_only_a_name_by_their_weights_on_the_base_that_a_node_would_have(
    cli: Cli, judged: Path, tiny_models: tuple[Path, Path], clean_environment: pytest.MonkeyPatch
) -> None:
    clean_environment.setenv("ARROWMOE_ROUTER__THRESHOLD", "1")  # no name is close enough
    clean_environment.setattr("arrowmoe.router_trials.ByWeights", FirstOfAll)

    def right(*args: str | Path) -> int:
        return int(cli("router", "eval", judged, *args, "--json").json["routed_accuracy"]["count"])

    assert right() == right("--base", tiny_models[0]) == 12, "all prompts of w60, and none of w61's"
    assert FirstOfAll.asked == ["tiny", "tiny"]
    clean_environment.setenv("ARROWMOE_BASES", "")
    assert right() == 0
    assert FirstOfAll.asked == ["tiny", "tiny"]


def test_without_cards_or_a_place_for_the_report_nothing_is_judged(cli: Cli, judged: Path, tmp_path: Path) -> None:
    assert "expected cards to choose from" in cli("router", "eval", judged).err
    nowhere = tmp_path / "missing" / "report.html"
    for args in (["eval", judged, "--html", nowhere], ["train", judged, "--out", nowhere]):
        assert "directory that exists" in cli("router", *args).err


@pytest.mark.usefixtures("cards")
def test_compare_judges_every_router_on_the_same_prompts(cli: Cli, train: Path, judged: Path, tmp_path: Path) -> None:
    cli("router", "fit", train)
    head, report = tmp_path / "head", tmp_path / "report.html"
    cli("router", "train", train, "--out", head)
    cli("router", "train", train, "--kind", "generative", "--steps", "60")
    options = ["--head", head, "--generative", "router"]
    found = cli("router", "compare", judged, *options, "--html", report, "--json").json
    names = [one["router"] for one in found["routers"]]
    assert len(names) == len(set(names)) == 4 * 4 + 4
    assert names[-4:] == ["prototypes alone", "words alone", f"head {head}", "generative router"]
    by_name = {one["router"]: one for one in found["routers"]}
    assert {one["rows"] for one in found["routers"]} == {26}
    evaluated = cli("router", "eval", judged, "--alpha", "0.1", "--json").json
    assert by_name["top1 α 0.1"]["confusion"] == evaluated["confusion"]
    rejections = [by_name[f"top1 α {alpha}"]["false_rejection"]["count"] for alpha in ("0", "0.01", "0.05", "0.1")]
    assert rejections == sorted(rejections)
    assert rejections[0] == 0
    assert by_name["prototypes alone"]["coverage"] == [], "without the sketch there are no p-values"
    assert by_name[f"head {head}"]["accuracy"]["value"] > 0.8
    assert all(name in report.read_text(encoding="utf-8") for name in names)
    assert "router" not in by_name["words alone"]["names"], "a card that routes is not routed to"


@pytest.mark.usefixtures("cards")
def test_a_head_of_stage_1_names_the_cards_and_none(cli: Cli, train: Path, tmp_path: Path) -> None:
    told = cli("router", "train", train, "--out", tmp_path / "head", "--seed", "3", "--json").json
    saved = load(tmp_path / "head")
    assert (saved.names, saved.embedder, saved.head.config.null) == (("w60", "w61"), "tiny-encoder", True)
    (stage,) = told["stages"]
    assert min(stage["validation"]) < stage["validation"][0]
    cli("router", "train", train, "--out", tmp_path / "again", "--seed", "3")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "head").read_bytes()
    assert "or none" in cli("router", "train", train, "--out", tmp_path / "head").out


@pytest.mark.usefixtures("cards")
def test_stage_2_moves_the_head_and_stage_3_the_cards(cli: Cli, home: Path, train: Path, tmp_path: Path) -> None:
    head = tmp_path / "head"
    options = ["--out", head, "--layer", "1", "--steps", "4"]
    second = cli("router", "train", train, *options, "--stage", "2", "--json").json
    assert [(one["stage"], one["steps"]) for one in second["stages"]][1:] == [(2, 4)]
    assert second["published"] == []
    assert second["embedder"] == "tiny#layer1-mean-asked"
    compared = cli("router", "compare", train, "--head", head, "--json").json["routers"][-1]
    assert compared["router"] == f"head {head}"
    assert compared["accuracy"]["value"] > 0.8
    third = cli("router", "train", train, *options, "--stage", "3", "--json").json
    assert [one["stage"] for one in third["stages"]] == [1, 2, 3]
    assert [(one["name"], one["version"]) for one in third["published"]] == [("w60", "2"), ("w61", "2")]
    with Registry.open(home) as registry:
        old, new = registry.get("w60@1"), registry.get("w60")
        assert new.manifest.parents == (old.digest,)
        pairs = list(zip(old.tensors, new.tensors, strict=True))
        assert [one.name for one, _ in pairs] == [other.name for _, other in pairs]
        moved = [bytes(one.data) != bytes(other.data) for one, other in pairs if one.role in (Role.A, Role.B)]
        assert any(moved)


@pytest.mark.usefixtures("cards")
def test_what_cannot_be_trained_is_said(cli: Cli, tmp_path: Path) -> None:
    unanswered = dataset(tmp_path / "x.jsonl", *({"text": row["text"], "card": row["card"]} for row in prompts(1)))
    out = ["--out", tmp_path / "head"]
    assert (
        "rows with a card and an answer" in cli("router", "train", unanswered, *out, "--stage", "2", "--layer", "1").err
    )
    strangers = dataset(
        tmp_path / "y.jsonl", *({**row, "card": "nobody" if row["card"] == "w60" else "w61"} for row in prompts(1))
    )
    assert "none called nobody" in cli("router", "train", strangers, *out, "--stage", "2", "--layer", "1").err
    assert not (tmp_path / "head").exists()
    assert cli("router", "train", unanswered).code == 2
    assert cli("router", "train", unanswered, *out, "--kind", "generative").code == 2


@pytest.mark.usefixtures("cards")
def test_a_head_is_refused_where_it_does_not_fit(cli: Cli, train: Path, tmp_path: Path) -> None:
    (tmp_path / "nonsense").write_text("nonsense")
    done = cli("router", "compare", train, "--head", tmp_path / "nonsense")
    assert (done.code, "expected a router head" in done.err) == (1, True)
    done = cli("router", "compare", train, "--generative", "w60")
    assert (done.code, "expected a router's card" in done.err) == (1, True)


@pytest.mark.parametrize("args", [["router", "--help"], ["router", "eval", "--help"], ["skills", "describe", "--help"]])
def test_help_imports_nothing_heavy(tmp_path: Path, args: list[str]) -> None:
    assert modules_after(tmp_path / "home", *args).isdisjoint({*HEAVY, "scipy"})
