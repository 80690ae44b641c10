"""`arrowmoe evolve nested`: task after task on one slow LoRA and fast ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

import arrowmoe
from arrowmoe.cli.app import app_of, group
from arrowmoe.cli.output import Output, short

app = group(help="Learn task after task, and tell what was forgotten; docs/evolution.md tells how.")

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="The output directory of an experiment.")]


@app.command()
def train(
    context: typer.Context,
    experiment: Annotated[Path, typer.Argument(metavar="FILE.yaml", help="An experiment.")],
) -> None:
    """Learn the tasks of an experiment one after another; one that was ended goes on where it stood."""
    invocation = app_of(context)
    with invocation.logging(), invocation.out.progress("loading") as advance:
        found = arrowmoe.nested_training.train(
            experiment,
            lambda task, step: advance(f"{task}: {step.phase}, loss {step.loss_nats:.3f}", step.step, step.steps),
        )
    invocation.out.result(found, lambda: _show(invocation.out, found), quiet=[found["output"]])


@app.command()
def show(context: typer.Context, directory: Directory) -> None:
    """Show what an experiment has learnt, and what it has forgotten of it."""
    invocation = app_of(context)
    found = arrowmoe.nested_view.show(directory)
    invocation.out.result(found, lambda: _show(invocation.out, found), quiet=[one["name"] for one in found["tasks"]])


@app.command("eval")
def evaluate(context: typer.Context, directory: Directory) -> None:
    """Ask the tests of all learnt tasks again."""
    invocation = app_of(context)
    with invocation.out.progress("asking"):
        found = arrowmoe.nested_training.evaluate(directory)
    rows = [(one["task"], f"{one['untold']:.3f}", f"{one['told']:.3f}") for one in found]
    columns = ("task", "right>", "right, task named>")
    invocation.out.result(
        found,
        lambda: invocation.out.table(columns, rows, "nothing learnt yet"),
        quiet=[f"{one['untold']:.4f}" for one in found],
    )


@app.command()
def consolidate(
    context: typer.Context,
    directory: Directory,
    task: Annotated[str, typer.Argument(help="A task that still has a fast LoRA of its own.")],
    rank: Annotated[int | None, typer.Option(min=1, help="Most rank of the slow LoRA.")] = None,
    energy: Annotated[float | None, typer.Option(help="Share of squared singular values to keep.")] = None,
    tolerance: Annotated[
        float, typer.Option(min=0, max=1, help="What it may cost of what is looked at; else it is rolled back.")
    ] = 0.05,
) -> None:
    """Take a task's fast LoRA into the slow one; exit code 1 if that would cost too much."""
    invocation = app_of(context)
    how = {"rank": rank, "energy": energy, "tolerance": tolerance}
    with invocation.out.progress("consolidating"):
        found = arrowmoe.nested_training.consolidate(directory, task, how)
    said = "kept" if found["kept"] else "rolled back"

    def human() -> None:
        invocation.out.line(f"{task}: {said}")
        invocation.out.fields([(name, value) for name, value in found.items() if name != "kept"])

    invocation.out.result(found, human, quiet=[said])
    if not found["kept"]:
        raise typer.Exit(1)


@app.command()
def rollback(context: typer.Context, directory: Directory) -> None:
    """Undo the last consolidation, bit for bit; only before another task is learnt."""
    invocation = app_of(context)
    with invocation.out.progress("rolling back"):
        found = arrowmoe.nested_training.roll_back(directory)
    said = f"{found['task']} has a fast LoRA of its own again"
    invocation.out.result(found, lambda: invocation.out.line(said), quiet=[found["task"]])


@app.command()
def export(
    context: typer.Context,
    directory: Directory,
    name: Annotated[str, typer.Option(help="Name of the slow LoRA's card; others are NAME-TASK and NAME-all.")],
) -> None:
    """Publish the LoRAs of an experiment as cards."""
    invocation = app_of(context)
    with invocation.registry() as registry:
        found = arrowmoe.nested_training.export(registry, directory, name)

    def human() -> None:
        for one in found:
            invocation.out.line(f"published {one['name']}@{one['version']} {short(one['digest'])}")

    invocation.out.result(found, human, quiet=[one["digest"] for one in found])


def _show(out: Output, found: Mapping[str, Any]) -> None:
    names = [one["name"] for one in found["tasks"]]
    for way, words in (("untold", "right, no task named"), ("told", "right, task named")):
        rows = [(name, *_shares(row, len(names))) for name, row in zip(names, found[way], strict=True)]
        out.line(words)
        out.table(("after", *(f"{name}>" for name in names)), rows, "nothing learnt yet")
        out.fields([(name, f"{value:.3f}") for name, value in found["measures"].get(way, {}).items()])
    for one in found["tasks"]:
        if one["consolidation"] is not None and not one["consolidation"]["kept"]:
            out.line(f"{one['name']}: its consolidation was rolled back, so it has a fast LoRA of its own")


def _shares(row: Sequence[float], count: int) -> list[str]:
    return [f"{share:.3f}" for share in row] + [""] * (count - len(row))


__all__ = ["app"]
