"""`arrowmoe router`: describe cards for the router, look at what it goes by, judge routers and train them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import arrowmoe
from arrowmoe.cli.answering import DEFAULT_BASE
from arrowmoe.cli.app import App, app_of, group
from arrowmoe.cli.describing import MAX_STATISTICS_BYTES, MIN_PROMPTS, Budget, MinPrompts, show_described
from arrowmoe.cli.output import size
from registry.errors import ArrowMoEError

app = group()
NOT_MEASURED = "–"

Data = Annotated[
    Path, typer.Argument(metavar="DATA.jsonl", help='Rows {"text", "card", "label"?, "answer"?}; card null: none.')
]
Base = Annotated[str | None, typer.Option(help="Only cards made for this base model.")]
Report = Annotated[Path | None, typer.Option(metavar="FILE", help="Write a report that opens without a network.")]


@app.callback()
def _router() -> None:
    """Describe cards for the router, judge and train routers; with or without a node, this process does the work."""


@app.command()
def fit(
    context: typer.Context,
    data: Data,
    calibration: Annotated[
        Path | None, typer.Option(metavar="DATA2.jsonl", help="Other rows, which p-values go by.")
    ] = None,
    min_prompts: MinPrompts = MIN_PROMPTS,
    budget: Budget = MAX_STATISTICS_BYTES,
) -> None:
    """Describe every card that a routing dataset names: one new version of each, with statistics of its rows."""
    invocation = app_of(context)
    commands = arrowmoe.router_commands
    how = commands.Description(calibration=calibration, min_prompts=min_prompts, budget_bytes=budget)
    with invocation.registry() as registry, invocation.out.progress("describing") as advance:
        told = commands.fit(commands.Workbench(registry, invocation.settings, advance), data, how)

    def human() -> None:
        for one in told:
            show_described(invocation.out, one)
            invocation.out.line()

    invocation.out.result(told, human, quiet=[one["digest"] for one in told])


@app.command()
def show(context: typer.Context, base: Base = None) -> None:
    """Show how the router is set and what it goes by for each card; loads no model."""
    invocation = app_of(context)
    with invocation.registry() as registry:
        found = arrowmoe.router_view.show(registry, invocation.settings, base=base)
    invocation.out.result(
        found, lambda: _show_index(invocation, found), quiet=[card["name"] for card in found["cards"]]
    )


@app.command("eval")
def evaluate(
    context: typer.Context,
    data: Data,
    base: Base = None,
    mode: Annotated[
        Literal["top1", "top2", "soft", "threshold"] | None, typer.Option(help="Instead of the settings' mode.")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(min=0.0, max=0.99, help="Share of its own prompts that a card may refuse.")
    ] = None,
    html: Report = None,
) -> None:
    """Judge the router of this home on labelled prompts."""
    invocation = app_of(context)
    _check_target(html)
    with invocation.registry() as registry, invocation.out.progress("judging") as advance:
        bench = arrowmoe.router_commands.Workbench(registry, invocation.settings, advance)
        found = arrowmoe.router_trials.evaluate(bench, data, base=base, mode=mode, alpha=alpha, report=html)
    _say_unknown(invocation, found["unknown"])

    def human() -> None:
        invocation.out.line(f"{found['router']}: {found['rows']} prompts, {len(found['names'])} cards")
        invocation.out.fields([(name, value) for name, value in _figures(found).items()])
        _say_report(invocation, html)

    invocation.out.result(found, human, quiet=[_share(found["accuracy"])])


@app.command()
def compare(
    context: typer.Context,
    data: Data,
    base: Base = None,
    head: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="A trained head too; may be repeated.")
    ] = None,
    generative: Annotated[
        list[str] | None, typer.Option(metavar="CARD", help="A router's card too; may be repeated.")
    ] = None,
    html: Report = None,
) -> None:
    """Judge modes, levels, ablations and trained routers on the same labelled prompts."""
    invocation = app_of(context)
    _check_target(html)
    with invocation.registry() as registry, invocation.out.progress("comparing") as advance:
        bench = arrowmoe.router_commands.Workbench(registry, invocation.settings, advance)
        found = arrowmoe.router_trials.compare(
            bench,
            data,
            base=base,
            causal=_causal(invocation, base),
            trained=head or [],
            generative=generative or [],
            report=html,
        )
    _say_unknown(invocation, found["unknown"])
    figures = [(one["router"], _figures(one)) for one in found["routers"]]

    def human() -> None:
        columns = ("router", *(f"{name}>" for name in figures[0][1]))
        invocation.out.table(columns, [(name, *of_one.values()) for name, of_one in figures], "no routers")
        _say_report(invocation, html)

    invocation.out.result(found, human, quiet=[f"{name}\t{next(iter(of_one.values()))}" for name, of_one in figures])


@app.command()
def train(
    context: typer.Context,
    data: Data,
    kind: Annotated[Literal["mlp", "generative"], typer.Option(help="A head on features, or a router LoRA.")] = "mlp",
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Where the head is written (mlp).")] = None,
    name: Annotated[str, typer.Option(help="Name of the router's card (generative).")] = "router",
    base: Annotated[str | None, typer.Option(help="Base model of a router LoRA, and of stages 2 and 3.")] = None,
    stage: Annotated[
        int, typer.Option(min=1, max=3, help="1: labels. 2: through the base, on answers. 3: with the adapters.")
    ] = 1,
    layer: Annotated[int, typer.Option(min=0, help="Whose hidden states stages 2 and 3 read.")] = 4,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of the last stage.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same router.")] = 0,
) -> None:
    """Train a router on a routing dataset."""
    if (kind == "mlp") != (out is not None):
        raise typer.BadParameter("--out FILE says where an mlp is written; a generative router becomes a card")
    invocation = app_of(context)
    _check_target(out)
    model = _causal(invocation, base)
    training = arrowmoe.router_training
    with invocation.registry() as registry, invocation.out.progress("training") as advance:
        bench = arrowmoe.router_commands.Workbench(registry, invocation.settings, advance)
        if out is not None:
            how = training.HeadTraining(stage=stage, base=model, layer=layer, steps=steps, seed=seed)
            told = training.train_head(bench, data, how, out)
        else:
            told = training.train_generative(bench, data, base=model, name=name, steps=steps, seed=seed)
    invocation.out.result(
        told, lambda: _show_trained(invocation, told), quiet=[told["path"] if kind == "mlp" else told["digest"]]
    )


def _causal(invocation: App, base: str | None) -> str:
    """The base model that is loaded where one must be."""
    return base or next(iter(invocation.settings.bases), DEFAULT_BASE)


def _check_target(path: Path | None) -> None:
    """Said before the work, not after it."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise ArrowMoEError(f"expected a file in a directory that exists, got {path}")


def _show_index(invocation: App, found: Mapping[str, Any]) -> None:
    invocation.out.fields(
        [(name, found[name]) for name in ("mode", "alpha", "threshold", "temperature", "embedder")]
        + [("probes", ", ".join(sorted({one["statistics"]["probe"] for one in found["cards"] if one["statistics"]})))]
    )
    invocation.out.line()
    rows = [
        (
            f"{card['name']}@{card['version']}",
            card["base_name"] or "?",
            card["evidence"],
            *(_statistics_row(card["statistics"]) if card["evidence"] == "statistics" else [""] * 5),
        )
        for card in found["cards"]
    ]
    columns = ("card", "base", "goes by", "prompts>", "prototypes>", "sketch>", "calibrated on>", "size>")
    invocation.out.table(columns, rows, "no cards; `arrowmoe skills import` or `skills sync` brings some")


def _statistics_row(found: Mapping[str, Any]) -> list[object]:
    counts = [found[name] for name in ("prompts", "prototypes", "sketch_rank", "calibrated")]
    return [*counts, size(found["nbytes"])]


def _figures(found: Mapping[str, Any]) -> dict[str, str]:
    """The figures of one evaluation, by what they are called in a table."""
    seconds = found["seconds_per_decision"]
    recall = [one["recall"] for one in found["rejections"] if one["rate"] == 0.05]
    return {
        "best card right": _share(found["accuracy"]),
        "routed right": _share(found["routed_accuracy"]),
        "false rejection": _share(found["false_rejection"]),
        "out of scope rejected": _share(found["out_of_scope_rejection"]),
        "AUROC": _percent(found["auroc"]),
        "recall at 5 %": _percent(recall[0] if recall else None),
        "AURC": f"{found['risk_coverage']['aurc']:.3f}",
        "gate entropy": f"{found['gate_entropy_nats']:.3f}",
        "ms": NOT_MEASURED if seconds is None else f"{1000 * seconds:.2f}",
    }


def _share(share: Mapping[str, Any] | None) -> str:
    return _percent(None if share is None else share["value"])


def _percent(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{100 * value:.1f} %"


def _say_unknown(invocation: App, unknown: Sequence[str]) -> None:
    if unknown:
        invocation.out.note(f"no card here can be chosen for {', '.join(unknown)}, so its prompts count as errors")


def _say_report(invocation: App, path: Path | None) -> None:
    if path is not None:
        invocation.out.line(f"report: {path}", style="dim")


def _show_trained(invocation: App, told: Mapping[str, Any]) -> None:
    out = invocation.out
    if told["kind"] == "generative":
        out.line(f"kept as {told['name']}@{told['version']}, which names {', '.join(told['names'])}")
        out.line(f"{told['steps']} steps, {told['seconds']:.0f} s", style="dim")
        return
    rows = [
        (
            one["stage"],
            one["steps"],
            f"{one['losses'][0]:.3f}",
            f"{one['losses'][-1]:.3f}",
            f"{min(one['validation']):.3f}" if one["validation"] else NOT_MEASURED,
            one["stopped_why"],
        )
        for one in told["stages"]
    ]
    out.table(("stage>", "steps>", "first loss>", "last loss>", "best validation>", "ended by"), rows, "no stages")
    out.line(f"wrote {told['path']}, which names {', '.join(told['names'])}{' or none' if told['null'] else ''}")
    for one in told["published"]:
        out.line(f"kept as {one['name']}@{one['version']}")
