"""`arrowmoe skills extract`: a card out of a model that somebody tuned."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

import arrowmoe
from arrowmoe.cli.app import app_of, given
from arrowmoe.cli.output import Output, short, size

DEFAULT_ENERGY = 0.95


class Others(StrEnum):
    """What becomes of changes that no low-rank pair stands for."""

    REFUSE = "refuse"
    FULL = "full"


def extract(
    context: typer.Context,
    base: Annotated[Path, typer.Option(metavar="DIR", help="The model that it was tuned from.")],
    tuned: Annotated[Path, typer.Option(metavar="DIR", help="The tuned model: config.json and safetensors.")],
    name: Annotated[str, typer.Option(help="The card's name.")],
    rank: Annotated[int | None, typer.Option(min=1, help="Keep so many singular values in each module.")] = None,
    energy: Annotated[
        float | None,
        typer.Option(help=f"Keep this share of the squared singular values; {DEFAULT_ENERGY} if nothing is said."),
    ] = None,
    error: Annotated[float | None, typer.Option(help="Keep what leaves a relative error of at most this.")] = None,
    others: Annotated[
        Others, typer.Option(help="Embeddings, norms and biases that changed: refuse, or keep them in full.")
    ] = Others.REFUSE,
    version: Annotated[str | None, typer.Option(help="Version; 1, unless given.")] = None,
    description: Annotated[str | None, typer.Option(help="What the card is good at; routing reads it.")] = None,
) -> None:
    """Make a card of what a tuned model has learned beyond its base; reads one tensor at a time."""
    bound = given(rank=rank, energy=energy, error=error) or {"energy": DEFAULT_ENERGY}
    if len(bound) > 1:
        raise typer.BadParameter("say one of --rank, --energy and --error")
    invocation = app_of(context)
    about = given(name=name, version=version, description=description)
    with invocation.registry() as registry, invocation.out.progress("extracting") as advance:
        done = arrowmoe.extraction.extract(
            registry, base, tuned, bound, others=others.value, about=about, on_progress=advance
        )
    invocation.out.result(done, lambda: _show(invocation.out, done), quiet=[done["card"]["digest"]])


def _show(out: Output, done: dict[str, Any]) -> None:
    card = done["card"]
    ranks = [module["rank"] for module in done["modules"]]
    out.line(f"extracted {card['name']}@{card['version']} {short(card['digest'])} ({size(card['nbytes'])})")
    out.line(f"{len(ranks)} modules, ranks {min(ranks)} to {max(ranks)}, relative error {done['error']:.2g}")
    if done["whole"]:
        rows = [(one["name"], one["kind"], f"{one['relative']:.2g}") for one in done["whole"]]
        out.table(("kept whole", "kind", "relative change>"), rows, "")
        out.note("PEFT applies what is kept whole; this node's engine refuses such a card")
