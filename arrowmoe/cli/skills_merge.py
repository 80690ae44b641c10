"""`arrowmoe skills merge`: several cards as one."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

import arrowmoe
from arrowmoe.cli.app import app_of, given
from arrowmoe.cli.output import Output, short, size


def merge(
    context: typer.Context,
    refs: Annotated[list[str], typer.Argument(metavar="CARD...", help="The cards to merge.")],
    name: Annotated[str, typer.Option(help="Name of the merged card.")],
    weights: Annotated[
        str | None, typer.Option(metavar="W,W,...", help="What each card counts; 1 each, unless given.")
    ] = None,
    method: Annotated[
        Literal["concat", "svd", "ties", "dare", "linear"],
        typer.Option(help="concat is exact; svd, ties and dare need --rank or --energy."),
    ] = "concat",
    rank: Annotated[int | None, typer.Option(min=1, help="Rank at which it is cut off.")] = None,
    energy: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of the squared singular values that is kept.")
    ] = None,
    density: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of elements that ties and dare leave of each card.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="What dare draws by.")] = 0,
    version: Annotated[str | None, typer.Option(help="Version; 1, unless given.")] = None,
    description: Annotated[str | None, typer.Option(help="What it is good at; the cards' own, unless given.")] = None,
) -> None:
    """Add up cards of one base model, and publish the sum as one card."""
    invocation = app_of(context)
    factors = [1.0] * len(refs) if weights is None else _numbers(weights, len(refs))
    how = arrowmoe.Merge(method=method, rank=rank, energy=energy, density=density, seed=seed)
    with invocation.registry() as registry:
        parents = [registry.get(ref, verify=True) for ref in refs]
        about = given(version=version, description=description)
        card = arrowmoe.merge(list(zip(parents, factors, strict=True)), how, name=name, **about)
        entry = registry.publish(card)
    made = {"parents": list(card.manifest.parents), "merge": card.manifest.training["merge"]}
    told = arrowmoe.views.card(entry) | made
    invocation.out.result(told, lambda: _show(invocation.out, told), quiet=[entry.digest])
    if any(parent.statistics for parent in parents):
        invocation.out.note(f"statistics for the router do not merge; `arrowmoe skills describe {name}` makes new ones")


def _numbers(text: str, count: int) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"expected numbers with commas between, got {text!r}") from error
    if len(numbers) != count:
        raise typer.BadParameter(f"expected a weight for each of {count} cards, got {len(numbers)}")
    return numbers


def _show(out: Output, told: dict[str, Any]) -> None:
    label = f"{told['name']}@{told['version']} {short(told['digest'])}"
    out.line(f"merged {len(told['parents'])} into {label} (rank {told['rank']}, {size(told['nbytes'])})")
    out.line(f"relative error {told['merge']['error']:.2g} by {told['merge']['method']}")


__all__ = ["merge"]
