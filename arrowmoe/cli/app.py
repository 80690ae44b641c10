"""What every command starts from: the output, the settings, the registry, and the running node if there is one."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import typer

import arrowmoe
from arrowmoe import control, logs, settings
from arrowmoe.cli.invocation import Invocation
from arrowmoe.home import NodeRecord, running_node

if TYPE_CHECKING:
    from arrowmoe.settings import Loaded, Settings
    from registry.store import Registry

GLOBAL_OPTIONS = "--home DIR, --config FILE, --json and --quiet may stand anywhere on the line."


class App:
    """One invocation, with settings that are read when the command first asks for them."""

    def __init__(self, invocation: Invocation) -> None:
        self.out = invocation.out
        self._invocation = invocation

    @cached_property
    def loaded(self) -> Loaded:
        """Settings from the global flags and all other layers, with their sources."""
        return self.load()

    def load(self, **flags: Any) -> Loaded:
        """The same with a command's own flags, those that are None left out."""
        return settings.load({"home": self._invocation.home} | flags, self._invocation.config)

    @property
    def settings(self) -> Settings:
        """The settings."""
        return self.loaded.settings

    @contextmanager
    def logging(self) -> Iterator[None]:
        """A command's result says what failed, so it logs errors only, to stderr; all with `ARROWMOE_DEBUG=1`."""
        level = "debug" if os.environ.get(settings.DEBUG_VARIABLE) == "1" else "error"
        with logs.logging_to(self.settings.log, console_level=level):
            yield

    @contextmanager
    def registry(self) -> Iterator[Registry]:
        """The home's registry, open."""
        with self.logging(), arrowmoe.Registry.open(self.settings.home, **self.settings.stores) as registry:
            yield registry

    def node(self) -> NodeRecord | None:
        """The node that runs on this home, if one does."""
        return running_node(self.settings.home)

    def confirm(self, what: str, *, yes: bool) -> None:
        """Ask whether to do `what`, unless `yes`; where nobody can be asked, refuse to do it."""
        if yes:
            return
        if not sys.stdin.isatty():
            raise typer.BadParameter(f"expected --yes to {what}, for nobody is there to be asked")
        typer.confirm(f"{what}?", abort=True, err=True)

    def need_node(self) -> NodeRecord:
        """The node that runs on this home. Raises `NodeNotRunningError`."""
        record = self.node()
        if record is None:
            raise control.NodeNotRunningError(
                f"no node runs on {self.settings.home}", hint="start one with `arrowmoe node start`"
            )
        return record


def app_of(context: typer.Context) -> App:
    """The invocation that a command belongs to."""
    invocation = context.find_root().obj
    if not isinstance(invocation, Invocation):
        raise TypeError(f"expected an Invocation, got {type(invocation).__name__}")
    return App(invocation)


def group(**options: Any) -> typer.Typer:
    """A command group, or the module of a single command."""
    return typer.Typer(no_args_is_help=True, add_completion=False, epilog=GLOBAL_OPTIONS, **options)


def given(**values: Any) -> dict[str, Any]:
    """The options that were given: not None, not an empty list, not False."""
    return {name: value for name, value in values.items() if value not in (None, [], False)}


__all__ = ["App", "app_of", "given", "group"]
