"""`arrowmoe skills quantise`: a card in 8 or 4 bits."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

import arrowmoe
from arrowmoe.cli.app import app_of, given
from arrowmoe.cli.output import Output, short, size


class Bits(StrEnum):
    """How many bits a weight takes."""

    EIGHT = "8"
    FOUR = "4"


def quantise(
    context: typer.Context,
    ref: Annotated[str, typer.Argument(metavar="CARD", help="The card that is to become smaller; it stays.")],
    name: Annotated[str, typer.Option(help="Name of the smaller card.")],
    bits: Annotated[Bits, typer.Option(help="8 cost little; 4 are half of that, and cost far more.")] = Bits.EIGHT,
    version: Annotated[str | None, typer.Option(help="Version; the card's own, unless given.")] = None,
    description: Annotated[str | None, typer.Option(help="What it is good at; the card's own, unless given.")] = None,
) -> None:
    """Publish a card again in 8 or 4 bits, and say what that cost."""
    invocation = app_of(context)
    about = given(version=version, description=description)
    with invocation.registry() as registry:
        parent = registry.get(ref, verify=True)
        card = arrowmoe.quantise(parent, 8 if bits is Bits.EIGHT else 4, name=name, **about)
        entry = registry.publish(card)
    told = arrowmoe.views.card(entry) | {"parent": parent.digest, "quantise": card.manifest.training["quantise"]}
    invocation.out.result(told, lambda: _show(invocation.out, told, parent.nbytes), quiet=[entry.digest])


def _show(out: Output, told: dict[str, Any], before: int) -> None:
    label = f"{told['name']}@{told['version']} {short(told['digest'])}"
    lost = told["quantise"]
    out.line(f"quantised into {label} ({size(before)} → {size(told['nbytes'])})")
    worst = lost["worst"]
    out.line(
        f"relative error {lost['error']:.2g}"
        + (f", at most {worst['error']:.2g} at {worst['module']}" if worst else "")
    )


__all__ = ["quantise"]
