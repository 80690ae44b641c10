"""What `skills describe` and `router fit` share: their options, and how they tell what went into a card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from arrowmoe.cli.output import Output, short, size

# As in arrowmoe.routing.statistics and registry.manifest, which `--help` must not import.
MIN_PROMPTS = 3
MAX_STATISTICS_BYTES = 64 << 10

MinPrompts = Annotated[
    int, typer.Option(min=1, help="Prompts behind each prototype at least; 1 lets single prompts be seen.")
]
Budget = Annotated[
    int, typer.Option(metavar="BYTES", min=1, max=MAX_STATISTICS_BYTES, help="Most bytes of statistics.")
]


def show_described(out: Output, told: Mapping[str, Any]) -> None:
    """What the new version of a card holds, and what it does not."""
    found = told["statistics"]
    kept = "kept as" if told["digest"] else "not kept (--no-publish); it would be"
    label = f"{told['name']}@{told['version']}" + (f" {short(told['digest'])}" if told["digest"] else "")
    out.line(f"{kept} {label}, with the weights of {short(told['parent'])}")
    if found is None:
        out.line("no statistics: routers go by its examples, its description or its name")
        return
    out.fields(
        [
            ("prompts", told["prompts"]),
            ("prototypes", f"{found['prototypes']}, of {found['min_prompts']} prompts or more, or a text it shows"),
            ("sketch", f"rank {found['sketch_rank']}"),
            ("calibrated on", _calibrated(told)),
            ("size", size(found["nbytes"])),
            ("embedder", found["embedder"]),
        ]
    )
    out.line("in the file: these numbers, the description and the examples; not in it: the prompts", style="dim")


def _calibrated(told: Mapping[str, Any]) -> str:
    count = told["statistics"]["calibrated"]
    if not count:
        return "nothing: too few prompts, so routers ask for a cosine and give no p-value"
    return f"{count} prompts, {'held out' if told['held_out'] else 'by cross-fitting'}"


__all__ = ["MAX_STATISTICS_BYTES", "MIN_PROMPTS", "Budget", "MinPrompts", "show_described"]
