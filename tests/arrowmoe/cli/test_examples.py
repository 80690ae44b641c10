"""Every command shows an example, and every example is a line that the program understands."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
from typer.main import get_command

from arrowmoe.cli.examples import EXAMPLES, lines
from arrowmoe.cli.main import COMMANDS, hoisted
from tests.arrowmoe.cli.conftest import Cli

GLOBAL = {"--json", "--quiet"}


def leaves(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    below = getattr(command, "commands", None)
    if below is None:
        yield name, command
    for verb, one in (below or {}).items():
        yield from leaves(one, f"{name} {verb}")


ALL = {
    name: command
    for noun, row in COMMANDS.items()
    for name, command in leaves(get_command(import_module(row.module).app), noun)
}


def test_every_command_has_an_example_and_there_is_none_of_another() -> None:
    assert {name for name in EXAMPLES if lines(name)} == set(ALL)


@pytest.mark.parametrize(("name", "line"), [(name, line) for name in EXAMPLES for line in lines(name)])
def test_an_example_can_be_typed_as_it_is(name: str, line: str) -> None:
    program, *words = shlex.split(line)
    assert program == "arrowmoe"
    own = [word for word in hoisted(words) if word not in GLOBAL][len(name.split()) :]
    context = ALL[name].make_context(name, own)  # raises what the command line would say of wrong words
    assert context.args == []


@pytest.mark.parametrize("name", ["skills merge", "route", "node start"])
def test_examples_end_the_help(cli: Cli, name: str) -> None:
    said = " ".join(cli(*name.split(), "--help").out.split())
    assert all(line in said for line in lines(name))


def test_a_group_shows_none(cli: Cli) -> None:
    assert "Examples:" not in cli("skills", "--help").out
