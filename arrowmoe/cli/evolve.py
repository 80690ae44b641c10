"""`arrowmoe evolve`: what no card fits, the nights that grow cards for it, and what came of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

import arrowmoe
from arrowmoe import control
from arrowmoe.cli import evolve_nested
from arrowmoe.cli.answering import DEFAULT_BASE, has_models
from arrowmoe.cli.app import App, app_of, given, group
from arrowmoe.cli.evolving import moment, show_calls, show_gap, show_gaps, show_night, show_status
from arrowmoe.cli.output import Advance

app = group()
app.add_typer(evolve_nested.app, name="nested")
WATCH_TIMEOUT_S = 120.0

Base = Annotated[str | None, typer.Option(help="Only those of this base model, by its logical name.")]
Limit = Annotated[int, typer.Option(min=1, help="Most rows.")]


@app.callback()
def _evolve() -> None:
    """Notice what no card fits, and grow cards for it at night; docs/evolution.md tells how."""


@app.command()
def signals(context: typer.Context, base: Base = None, limit: Limit = 20) -> None:
    """List the requests that are kept for the night, with how surely each was answered badly."""
    invocation = app_of(context)
    with invocation.registry() as registry:
        found = arrowmoe.signal_view.signals(registry, invocation.settings, base=base, limit=limit)

    def human() -> None:
        counts = ("total", "abstained", "good", "bad", "queued", "mean_dissonance")
        rows = [(one["base"], *(one[name] for name in counts)) for one in found["bases"]]
        columns = ("base", "requests>", "no card>", "good>", "bad>", "queued>", "mean dissonance>")
        empty = "no requests are kept" if found["kept"] else "no requests are kept: evolution.signals is off"
        invocation.out.table(columns, rows, empty)
        if not found["recent"]:
            return
        invocation.out.line()
        recent = [
            (
                one["id"][:8],
                f"{one['dissonance']:.2f}",
                "" if one["p_value"] is None else f"{one['p_value']:.3f}",
                "card" if one["accepted"] else "no card",
                one["feedback"] or "",
                one["gap"] or "",
                _one_line(one["prompt"]),
            )
            for one in found["recent"]
        ]
        columns = ("request", "dissonance>", "p>", "answered by", "feedback", "gap", "prompt")
        invocation.out.table(columns, recent, "")

    invocation.out.result(found, human, quiet=[one["id"] for one in found["recent"]])


@app.command()
def gaps(
    context: typer.Context,
    base: Base = None,
    state: Annotated[str | None, typer.Option(help="Only those of this state, such as published.")] = None,
    limit: Limit = 100,
) -> None:
    """List the gaps that were found, and what became of each."""
    invocation = app_of(context)
    with invocation.registry() as registry:
        found = arrowmoe.evolution_view.gaps(registry, base=base, state=state, limit=limit)
    invocation.out.result(found, lambda: show_gaps(invocation.out, found), quiet=[one["gap"] for one in found])


@app.command()
def run(
    context: typer.Context,
    now: Annotated[bool, typer.Option("--now", help="A new night, even if one was left unfinished.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell which gaps it would grow cards for.")] = False,
) -> None:
    """Run a night, in the running node if it has models; exit code 1 if anything of it failed."""
    invocation = app_of(context)
    params = given(fresh=now, dry_run=dry_run)
    record = invocation.node()
    if record is not None and not has_models(record):
        invocation.out.note("the running node has loaded no base model, so this command loads one itself")
        record = None
    with invocation.out.progress("looking") as advance:
        if record is not None:
            told = control.call(record, "evolve_run", params, on_progress=lambda done: _tell(advance, done))
        else:
            told = _run_here(invocation, params, advance)
    if dry_run:
        invocation.out.result(told, lambda: _show_preview(invocation, told["gaps"]), quiet=_names(told["gaps"]))
        return

    def human() -> None:
        for night in told["nights"]:
            show_night(invocation.out, night)

    published = [label for night in told["nights"] for label in night["published"]]
    invocation.out.result(told, human, quiet=published)
    if not told["ok"]:
        raise typer.Exit(1)


@app.command()
def status(context: typer.Context) -> None:
    """Show the night under way, the next one, and what it may cost."""
    invocation = app_of(context)
    with invocation.registry() as registry:
        found = arrowmoe.evolution_view.status(registry, invocation.settings) | {"node": invocation.node() is not None}
    quiet = [one["job"] for one in found["training"]]
    invocation.out.result(found, lambda: show_status(invocation.out, found), quiet=quiet)


@app.command()
def history(context: typer.Context, limit: Limit = 20) -> None:
    """List the nights."""
    invocation = app_of(context)
    with invocation.registry() as registry:
        found = arrowmoe.evolution_view.history(registry, limit=limit)
    rows = [
        (
            one["night"],
            moment(one["planned_at"]),
            one["state"],
            "" if one["seconds"] is None else f"{one['seconds']:.0f} s",
            ", ".join(one["published"]),
            len(one["rejected"]),
            len(one["failed"]) + len(one["unfinished"]),
        )
        for one in found
    ]
    columns = ("night", "planned for", "state", "took>", "published", "rejected>", "failed or unfinished>")
    empty = "no nights yet; `arrowmoe evolve run` begins one"
    invocation.out.result(
        found, lambda: invocation.out.table(columns, rows, empty), quiet=[one["night"] for one in found]
    )


@app.command()
def show(
    context: typer.Context,
    ref: Annotated[str, typer.Argument(metavar="NIGHT|GAP", help="night-NUMBER, gap-NUMBER, or a gap's name.")],
    calls: Annotated[bool, typer.Option("--calls", help="What left for the teacher, word for word.")] = False,
) -> None:
    """Show a night or a gap: the gate's evidence, the losses, what the teacher was asked and what it cost."""
    invocation = app_of(context)
    with invocation.registry() as registry:
        found = arrowmoe.evolution_view.show(registry, ref, calls=calls)

    def human() -> None:
        (show_night if found["kind"] == "night" else show_gap)(invocation.out, found)
        if calls and found["teacher"]:
            show_calls(invocation.out, found["teacher"]["exchanges"])

    invocation.out.result(found, human, quiet=[found["state"]])


@app.command()
def schedule(
    context: typer.Context,
    expression: Annotated[
        str | None, typer.Argument(metavar='["0 2 * * *"|off]', help="Minute, hour, day, month, weekday; local time.")
    ] = None,
) -> None:
    """Set when nights begin by themselves, or show it."""
    invocation = app_of(context)
    with invocation.registry() as registry:
        if expression is None:
            found = arrowmoe.evolution_view.schedule(registry, invocation.settings)
        else:
            wanted = "" if expression == "off" else expression
            found = arrowmoe.evolution_commands.set_schedule(registry, invocation.settings, wanted)
    if expression is not None and found["expression"] is not None:
        _have_node_watch(invocation)

    def human() -> None:
        invocation.out.line(found["expression"] or "off: nights begin only when they are asked for")
        invocation.out.fields([("next", found["next"] and moment(found["next"])), ("set by", found["set_by"])])

    invocation.out.result(found, human, quiet=[found["next"] or ""])


@app.command()
def train(
    context: typer.Context,
    spec: Annotated[Path, typer.Argument(metavar="SPEC.json", help="A training job.")],
) -> None:
    """Do one training, as the night does in a process of its own; one that was ended goes on where it stood."""
    invocation = app_of(context)
    with invocation.logging(), invocation.out.progress("loading") as advance:
        trained = arrowmoe.training.train_from_file(
            spec, lambda step: advance(f"{step.phase}, loss {step.loss_nats:.3f}", step.step, step.steps)
        )
    found = {
        "adapter": str(trained.adapter_dir),
        "steps": trained.steps,
        "stopped_why": trained.stopped_why,
        "best_validation_nats": trained.best_validation_nats,
        "last_loss_nats": trained.losses_nats[-1] if trained.losses_nats else None,
        "seconds": round(trained.seconds, 1),
    }

    def human() -> None:
        invocation.out.line(f"wrote {found['adapter']}")
        invocation.out.fields([(name, value) for name, value in found.items() if name != "adapter"])

    invocation.out.result(found, human, quiet=[found["adapter"]])


@app.command()
def forget(
    context: typer.Context,
    everything: Annotated[
        bool, typer.Option("--files", help="Also the examples that finished nights have left in this home.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete every request that was kept; cards stay, and so does the record of what teachers were told."""
    invocation = app_of(context)
    what = "every kept request" + (" and the files of finished nights" if everything else "")
    invocation.confirm(f"delete {what} of {invocation.settings.home}", yes=yes)
    with invocation.registry() as registry:
        done = arrowmoe.evolution_commands.forget(registry, invocation.settings, files=everything)

    def human() -> None:
        files = f" and the files of {done['jobs']} jobs" if everything else ""
        invocation.out.line(f"deleted {done['signals']} requests{files}")

    invocation.out.result(done, human, quiet=[done["signals"]])


@app.command()
def rollback(
    context: typer.Context,
    base: Annotated[
        str | None,
        typer.Argument(metavar="[BASE]", help="Logical name; default: the only base with a slow card."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Take back the last expert that went into a base's slow card: the slow card before it is used again."""
    invocation = app_of(context)
    invocation.confirm(f"remove the newest slow card of {base or 'the base that has one'}, here and at peers", yes=yes)
    with invocation.registry() as registry:
        done = arrowmoe.evolution_commands.roll_back(registry, base)

    def human() -> None:
        invocation.out.line(f"removed {done['removed']}; {done['expert']} is a card of its own, as before")
        invocation.out.fields([("in use again", done["restored"])])

    invocation.out.result(done, human, quiet=[done["restored"] or ""])


def _run_here(invocation: App, params: Mapping[str, Any], advance: Advance) -> Any:
    """A night in this process; a dry run needs the embedder only."""
    bases = () if params.get("dry_run") else invocation.settings.bases or (DEFAULT_BASE,)
    commands = arrowmoe.evolution_commands

    def on_model(model: str) -> None:
        advance(f"loading {model}", 0, 0)

    with (
        invocation.registry() as registry,
        commands.evolution_here(registry, invocation.settings, bases=bases, on_model=on_model) as evolution,
    ):
        advance("surveying", 0, 0)
        return commands.run(evolution, invocation.settings, params, lambda done: _tell(advance, done))


def _tell(advance: Advance, done: Mapping[str, Any]) -> None:
    loss = "" if done["loss_nats"] is None else f", loss {done['loss_nats']:.3f}"
    advance(f"{done['gap'] or done['base']}: {done['stage']}{loss}", done["step"], done["steps"])


def _have_node_watch(invocation: App) -> None:
    """A schedule is kept by a node with models; one that runs is told at once."""
    record = invocation.node()
    if record is not None and has_models(record):
        control.call(record, "evolve_watch", timeout_s=WATCH_TIMEOUT_S)
    else:
        invocation.out.note("nights begin by themselves only while a node with a base model runs on this home")


def _show_preview(invocation: App, found: Sequence[Mapping[str, Any]]) -> None:
    rows = [
        (
            one["name"],
            one["base"],
            one["prompts"],
            f"{one['worth']:.3g}",
            "grown" if one["grows"] else one["state"],
            one["why"],
            _one_line(one["samples"][0]),
        )
        for one in found
    ]
    columns = ("gap", "base", "prompts>", "worth>", "would be", "why", "for example")
    invocation.out.table(columns, rows, "no gaps: nothing that no card fits is asked often enough")


def _names(found: Sequence[Mapping[str, Any]]) -> list[str]:
    return [one["name"] for one in found if one["grows"]]


def _one_line(text: str, most: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"
