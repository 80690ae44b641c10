"""The entry point: a table of commands, each imported when it is used, and what becomes of errors.

Exit codes: 0 done, 1 an error with its hint, 2 wrong usage, 130 interrupted. `ARROWMOE_DEBUG=1` shows tracebacks.
"""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup
from typer.main import get_command

import arrowmoe
from arrowmoe.cli.examples import show_in_help
from arrowmoe.cli.invocation import Invocation
from arrowmoe.cli.output import Output
from arrowmoe.threads import set_threads
from registry.errors import ArrowMoEError


@dataclass(frozen=True, kw_only=True)
class Command:
    """A row of the table: the module that holds a Typer `app`, and its line in `arrowmoe --help`."""

    module: str
    help: str


COMMANDS = {
    "node": Command(module="arrowmoe.cli.node", help="Start, stop and look at the node of this home."),
    "skills": Command(module="arrowmoe.cli.skills", help="Import, list, share and check cards."),
    "peers": Command(module="arrowmoe.cli.peers", help="See which other nodes there are."),
    "router": Command(module="arrowmoe.cli.router", help="Describe cards for the router, judge and train routers."),
    "route": Command(module="arrowmoe.cli.route", help="Say which card fits a text, and why."),
    "evolve": Command(module="arrowmoe.cli.evolve", help="Grow experts at night for what no card fits."),
    "ask": Command(module="arrowmoe.cli.ask", help="Answer a prompt with the card that fits it."),
    "feedback": Command(module="arrowmoe.cli.feedback", help="Say whether an answer was good."),
    "encode": Command(module="arrowmoe.cli.encode", help="Turn texts into vectors."),
    "bench": Command(module="arrowmoe.cli.bench", help="Measure this machine, so that the engine computes well on it."),
    "demo": Command(module="arrowmoe.cli.demo", help="Show the main job on two nodes and real models."),
    "doctor": Command(module="arrowmoe.cli.doctor", help="Check this machine and this home."),
    "conformance": Command(module="arrowmoe.cli.conformance", help="Check another server against the protocol."),
    "config": Command(module="arrowmoe.cli.config", help="Show settings and where each comes from."),
}
SWITCHES = frozenset({"--json", "--quiet", "-q"})
VALUED = frozenset({"--home", "--config"})


class LazyGroup(TyperGroup):
    """A group whose commands are stand-ins with a help text until one is called, or completed, by name."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The real command for a name of the table."""
        if args and args[0] in COMMANDS:
            command = get_command(import_module(COMMANDS[args[0]].module).app)
            command.name = args[0]
            show_in_help(command, args[0])
            return args[0], command, args[1:]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=LazyGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="arrowmoe: nodes that share LoRA adapters, and answer each prompt with the one that fits.",
    epilog="--home, --config, --json and --quiet may also stand behind the command.",
)


def _stand_in() -> None:
    """Never called: `LazyGroup` puts the real command in its place."""


for _name, _row in COMMANDS.items():
    app.command(_name, help=_row.help)(_stand_in)


def _show_version(wanted: bool) -> None:
    if wanted:
        Output().line(f"arrowmoe {arrowmoe.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    home: Annotated[str | None, typer.Option(metavar="DIR", help="Directory of identity, cards and catalog.")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML or YAML file with settings.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print results as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print bare values only.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True)] = False,
) -> None:
    chosen: Invocation = context.obj
    chosen.out.mode = "json" if json else "quiet" if quiet else "human"
    chosen.home, chosen.config = home, config


def hoisted(args: Sequence[str]) -> list[str]:
    """`args` with the global options moved to the front, from wherever they stand before a `--`."""
    end = list(args).index("--") if "--" in args else len(args)
    front: list[str] = []
    rest: list[str] = []
    words = iter(args[:end])
    for word in words:
        if word in SWITCHES or word.partition("=")[0] in VALUED:
            front.append(word)
            if word in VALUED:
                front.extend([value] if (value := next(words, None)) is not None else [])
        else:
            rest.append(word)
    return [*front, *rest, *args[end:]]


def run(args: Sequence[str]) -> int:
    """Run one command line; returns the exit code."""
    invocation = Invocation()
    try:
        get_command(app).main(args=hoisted(args), prog_name="arrowmoe", obj=invocation)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        return 130
    except ArrowMoEError as error:
        _explain(invocation.out, str(error), error.hint)
        return 1
    except UnicodeEncodeError as error:
        if not any(_is_not_utf8(word) for word in args):
            return _explain_bug(invocation.out, error)
        _explain(invocation.out, "expected words in UTF-8 on the command line, got other bytes", None)
        return 1
    except Exception as error:  # noqa: BLE001 - the last resort: said to be a bug, its traceback kept
        return _explain_bug(invocation.out, error)
    return 0


def main() -> NoReturn:
    """The console script."""
    set_threads()
    sys.exit(run(sys.argv[1:]))


def _explain(out: Output, message: str, hint: str | None) -> None:
    if os.environ.get("ARROWMOE_DEBUG") == "1":
        out.traceback()
    out.error(message, hint)


def _explain_bug(out: Output, error: Exception) -> int:
    _explain(out, f"{type(error).__name__}: {error}", f"this is a bug in arrowmoe; report it with {_keep_traceback()}")
    return 1


def _is_not_utf8(word: str) -> bool:
    """Whether Python put surrogates for bytes that it could not decode."""
    return any("\ud800" <= character <= "\udfff" for character in word)


def _keep_traceback() -> Path:
    """Write the traceback where the user can find it; the home may be what failed, so it is not used."""
    descriptor, path = tempfile.mkstemp(prefix="arrowmoe-crash-", suffix=".log")
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(traceback.format_exc())
    return Path(path)
