"""`arrowmoe ask`: answer a prompt, and say which cards answered."""

from __future__ import annotations

from typing import Annotated

import typer

from arrowmoe.cli.answering import (
    DEFAULT_BASE,
    Alpha,
    Confidence,
    Expert,
    Mode,
    Override,
    adapter_of,
    answered,
    made_by,
    routing_of,
)
from arrowmoe.cli.app import app_of, given, group

app = group()


@app.command()
def ask(
    context: typer.Context,
    text: Annotated[str, typer.Argument(help="The prompt.")],
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="auto (default), none, a card, or NAME=WEIGHT; several of these are mixed."),
    ] = None,
    base: Annotated[str | None, typer.Option(help="Base model to answer with.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to write.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="For a temperature above 0.")] = None,
    mode: Mode = None,
    alpha: Alpha = None,
    expert: Expert = None,
    confidence: Confidence = 0.9,
    override: Override = False,
) -> None:
    """Answer a prompt with the card that fits it, or with the bare base model if none does."""
    invocation = app_of(context)
    chosen = adapter_of(adapter or [])
    how = routing_of(mode=mode, alpha=alpha, expert=expert, confidence=confidence, override=override)
    params = (
        given(base=base, seed=seed)
        | how
        | {
            "prompt": text,
            "adapter": chosen,
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
        }
    )
    bases = [base] if base else invocation.settings.bases or [DEFAULT_BASE]
    answer = answered(invocation, "ask", params, bases=bases, route=chosen == "auto")

    def human() -> None:
        invocation.out.line(answer["text"])
        invocation.out.line()
        invocation.out.line(f"by {made_by(answer)}", style="dim")
        signal = f", request {answer['signal'][:8]} (arrowmoe feedback good|bad)" if answer["signal"] else ""
        invocation.out.line(f"base {answer['base']}, {answer['new_tokens']} tokens{signal}", style="dim")
        if answer["fetched"]:
            invocation.out.line(f"fetched from a peer to answer: {', '.join(answer['fetched'])}", style="dim")

    invocation.out.result(answer, human, quiet=[answer["text"]])
