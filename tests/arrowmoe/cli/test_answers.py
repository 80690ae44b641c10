"""`ask`, `route` and `encode` with tiny models: in the command itself, and through a running node."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from arrowmoe.cli.answering import adapter_of
from arrowmoe.home import NodeError
from arrowmoe.node import Node
from arrowmoe.settings import Settings
from registry.store import Registry
from tests.arrowmoe.cli.conftest import Cli
from tests.arrowmoe.tiny import card_for, llama_engine

ANSWER_KEYS = {
    *("text", "base", "adapters", "fetched", "prompt_tokens", "new_tokens", "logprob_nats", "finish_reason", "signal"),
    "timing",
    *("mode", "abstained", "alpha", "threshold", "p_value", "why", "candidates"),
}


@pytest.fixture(autouse=True)
def models(tiny_models: tuple[Path, Path], clean_environment: pytest.MonkeyPatch, cli: Cli) -> None:
    clean_environment.setenv("ARROWMOE_BASES", str(tiny_models[0]))
    clean_environment.setenv("ARROWMOE_EMBEDDER", str(tiny_models[1]))


@pytest.fixture
def card(home: Path, tmp_path: Path) -> None:
    card = card_for(llama_engine(), tmp_path, "dates", seed=3)
    with Registry.open(home) as registry:
        registry.publish(card.describe(description="w3 w4", examples=["w5 w6"]))


@pytest.fixture
def node(home: Path, tiny_models: tuple[Path, Path]) -> Iterator[Node]:
    settings = Settings(home=home, discovery=False, bases=(str(tiny_models[0]),), embedder=str(tiny_models[1]))
    with Node(settings) as running:
        yield running


def check_answers(cli: Cli) -> None:
    routed = cli("ask", "w5 w6", "--max-new-tokens", "4", "--json").json
    assert set(routed) == ANSWER_KEYS
    assert (routed["adapters"], routed["base"], routed["abstained"]) == ({"dates": 1.0}, "tiny", False)
    named = cli("ask", "w5 w6", "--adapter", "dates", "--max-new-tokens", "4", "--json").json
    assert (named["text"], named["mode"]) == (routed["text"], "manual")
    mixed = cli("ask", "w5 w6", "--adapter", "dates=0.5", "--max-new-tokens", "4", "--json").json
    assert mixed["adapters"] == {"dates": 0.5}
    bare = cli("ask", "w5 w6", "--adapter", "none", "--max-new-tokens", "4", "--json").json
    assert (bare["adapters"], bare["why"]) == ({}, "no card was asked for")
    where = cli("route", "w5 w6", "--json").json
    assert (where["adapters"], where["candidates"][0]["nearest"]) == ({"dates": 1.0}, "w5 w6")
    vectors = cli("encode", "w5", "w6", "--json").json
    assert [(one["text"], one["base"], len(one["vector"])) for one in vectors] == [
        ("w5", "tiny-encoder", 16),
        ("w6", "tiny-encoder", 16),
    ]


@pytest.mark.usefixtures("card")
def test_a_command_answers_by_itself(cli: Cli) -> None:
    check_answers(cli)


@pytest.mark.usefixtures("card")
def test_a_running_node_answers(cli: Cli, node: Node) -> None:
    check_answers(cli)
    assert node.status()["models"][0]["adapters"] == ["dates"]


@pytest.mark.usefixtures("card")
def test_an_answer_says_which_cards_made_it(cli: Cli, node: Node) -> None:
    shown = cli("ask", "w5 w6", "--max-new-tokens", "4").out
    assert "by dates 1.00 (" in shown
    assert "base tiny, " in shown
    assert "by no card (no card was asked for)" in cli("ask", "w5 w6", "--adapter", "none", "--max-new-tokens", "4").out
    assert "dates" in cli("route", "w5 w6", "--explain").out
    assert len(cli("encode", "w5", "-q").out.split()) == 16


@pytest.mark.parametrize("served", [False, True], ids=["command", "node"])
def test_a_text_that_is_longer_than_the_encoder_reads_is_said_to_be_cut(
    cli: Cli, served: bool, request: pytest.FixtureRequest
) -> None:
    if served:
        request.getfixturevalue("node")
    whole, long = " ".join(["w5"] * 64), " ".join(["w5"] * 64 + ["w6"])  # tiny models have 64 positions
    done = cli("encode", whole, long, "--json")
    assert [one["cut"] for one in done.json] == [False, True]
    assert done.json[0]["vector"] == pytest.approx(done.json[1]["vector"], abs=1e-5)
    assert "1 of 2 texts are longer than tiny-encoder reads" in cli("encode", whole, long).err
    assert cli("encode", whole).err == ""


def test_without_cards_the_answer_says_why_none_was_used(cli: Cli, node: Node) -> None:
    shown = cli("ask", "w5 w6", "--max-new-tokens", "4").out
    assert "by no card (no card is known for this base model): the bare base model answered" in shown


def test_a_node_without_models_leaves_the_work_to_the_command(cli: Cli, home: Path) -> None:
    with Node(Settings(home=home, discovery=False)):
        done = cli("ask", "w5", "--max-new-tokens", "2")
        assert done.code == 0
        assert "has loaded no base model" in done.err


def test_errors_come_through_the_node(cli: Cli, node: Node) -> None:
    for args in (["--adapter", "nobody"], ["--adapter", "a=x"], ["--base", "nothing"]):
        done = cli("ask", "w5", *args)
        assert (done.code, done.out) == (1, "")
        assert done.err.startswith("error: ")
    assert "nobody" in cli("ask", "w5", "--adapter", "nobody").err


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (["auto", "dates"], "expected --adapter auto alone"),
        (["dates", "none"], "expected --adapter none alone"),
        (["dates=0.2", "dates=0.5"], "expected each card once"),
        (["dates=much"], "with a number"),
    ],
)
def test_a_mixture_that_says_two_things_is_refused(values: list[str], said: str) -> None:
    with pytest.raises(NodeError, match=said):
        adapter_of(values)
