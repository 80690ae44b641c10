"""How `arrowmoe demo` tells its events: as JSON, and as an exit code."""

from __future__ import annotations

import json
from collections.abc import Generator

import pytest

from arrowmoe import demo
from arrowmoe.cli.main import run
from arrowmoe.demo.scores import share
from arrowmoe.demo.shipped import Example, spread

ANSWERED = demo.Answered(
    number=1,
    prompt="p",
    base_name="base",
    expected="card",
    card="card",
    nearest="card",
    fit=0.5,
    asked=0.05,
    bare="before",
    answer="after",
)
SCORED = demo.Scored(name="card", metric="exact_match", examples=4, bare=0.25, with_card=0.75)


def ended(*problems: str) -> demo.Ended:
    return demo.Ended(seconds=12.34, phases={"start": 1.0}, kept=None, problems=problems)


def told(monkeypatch: pytest.MonkeyPatch, *events: demo.Event) -> list[bool]:
    """Let the demo be these events; the list is filled when it is closed."""
    closed: list[bool] = []

    def fake(*, fast: bool, keep: bool) -> Generator[demo.Event, None, None]:
        try:
            yield from events
        finally:
            closed.append(True)

    monkeypatch.setattr(demo, "run", fake)
    return closed


def test_json_holds_every_event(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    told(monkeypatch, demo.Waiting(text="…"), ANSWERED, SCORED, ended())
    assert run(["demo", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["answers"][0]["answer"] == "after"
    assert report["scores"] == [
        {"name": "card", "metric": "exact_match", "examples": 4, "bare": 0.25, "with_card": 0.75}
    ]
    assert report["ended"]["problems"] == []


def test_a_problem_is_an_error_after_the_whole_story(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told(monkeypatch, ANSWERED, SCORED, ended("card does not help (0.75 → 0.25)"))
    assert run(["demo"]) == 1
    said = capsys.readouterr()
    assert "Done in 12.3 s" in said.out
    assert "error: card does not help" in said.err


def test_an_answer_cannot_steer_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = demo.Answered(**{**vars(ANSWERED), "answer": "a\x1b[2Jb\n\nc"})
    told(monkeypatch, hostile, ended())
    run(["demo"])
    assert "with     a�[2Jb c" in capsys.readouterr().out


def test_scores_ask_for_the_whole_answer() -> None:
    assert share(["a ", "a b", "b"], ["a", "a", "b"]) == pytest.approx(2 / 3)


def test_examples_are_spread_over_the_set() -> None:
    examples = tuple(Example(text=str(index), wanted="") for index in range(60))
    chosen = [int(example.text) for example in spread(examples, 16)]
    assert len(set(chosen)) == 16
    assert chosen[0] == 0
    assert chosen[-1] >= 56
    assert spread(examples[:3], 16) == examples[:3]
