from __future__ import annotations

import sys
from pathlib import Path

import pytest

from arrowmoe.cli import config
from arrowmoe.cli.main import COMMANDS, hoisted, run
from tests.arrowmoe.cli.conftest import Cli


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ("skills ls --json", "--json skills ls"),
        ("skills ls --home /x -q", "--home /x -q skills ls"),
        ("--home=/x skills ls --config=y", "--home=/x --config=y skills ls"),
        ("ask -- --json", "ask -- --json"),
        ("ask --json -- --home", "--json ask -- --home"),
        ("skills import d --version 2", "skills import d --version 2"),
        ("skills ls --home", "--home skills ls"),
    ],
)
def test_global_options_may_stand_anywhere(args: str, expected: str) -> None:
    assert hoisted(args.split()) == expected.split()


def test_an_error_is_one_line_and_a_hint(cli: Cli) -> None:
    done = cli("skills", "show", "nothing", "--json")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error: ")
    assert "\nhint: " in done.err
    assert "Traceback" not in done.err


def test_a_traceback_comes_when_it_is_asked_for(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARROWMOE_DEBUG", "1")
    assert "UnknownCardError" in cli("skills", "show", "nothing").err


def test_a_bug_is_said_to_be_one_and_its_traceback_is_kept(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "app_of", lambda context: 1 / 0)
    done = cli("config", "show")
    assert done.code == 1
    assert "error: ZeroDivisionError: division by zero" in done.err
    kept = Path(done.err.strip().rpartition(" ")[2])
    assert "this is a bug" in done.err
    assert "Traceback" not in done.err
    assert "ZeroDivisionError" in kept.read_text()
    kept.unlink()


def test_bytes_that_are_no_text_are_no_bug(cli: Cli) -> None:
    done = cli("skills", "search", "\udcff")
    assert (done.code, done.out) == (1, "")
    assert done.err == "error: expected words in UTF-8 on the command line, got other bytes\n"


def test_an_interrupt_is_130(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(context: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(config, "app_of", interrupted)
    assert cli("config", "show").code == 130


@pytest.mark.parametrize("args", [["skills", "ls", "--bogus"], ["bogus"], ["skills", "bogus"], ["skills", "show"]])
def test_wrong_usage_is_2(cli: Cli, args: list[str]) -> None:
    done = cli(*args)
    assert (done.code, done.out) == (2, "")


@pytest.mark.parametrize("noun", [noun for noun in COMMANDS if noun != "demo"])
def test_every_command_explains_itself(cli: Cli, noun: str) -> None:
    done = cli(noun, "--help")
    assert done.code == 0
    assert f"arrowmoe {noun}" in done.out


def test_the_flag_for_the_home_wins(cli: Cli, tmp_path: Path) -> None:
    shown = {row["name"]: row for row in cli("config", "show", "--home", tmp_path / "other", "--json").json}
    assert (shown["home"]["value"], shown["home"]["source"]) == (str(tmp_path / "other"), "flag")
    assert (shown["discovery"]["value"], shown["discovery"]["source"]) == (False, "environment")
    assert shown["dtype"] == {
        "name": "dtype",
        "value": "float32",
        "source": "default",
        "meaning": "element type of base models",
    }


def test_an_empty_home_is_not_the_working_directory(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    done = cli("skills", "ls", "--home", "")
    assert (done.code, "--home: expected a directory, got an empty word" in done.err) == (1, True)
    assert list(Path.cwd().iterdir()) == []


def test_wrong_settings_are_an_error_with_all_of_them(cli: Cli, home: Path) -> None:
    (home / "config.toml").write_text('dtype = "int3"\nnome = 1\n')
    done = cli("config", "show")
    assert done.code == 1
    assert "2 settings are wrong" in done.err


def test_run_takes_no_arguments_from_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["arrowmoe", "bogus"])
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("arrowmoe ")
