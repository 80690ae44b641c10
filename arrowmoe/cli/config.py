"""`arrowmoe config`: settings and their sources."""

from __future__ import annotations

import json

import typer

from arrowmoe.cli.app import app_of, group

app = group()


@app.callback()
def _config() -> None:
    """Settings: flags > ARROWMOE_* variables > a TOML or YAML file > defaults."""


@app.command()
def show(context: typer.Context) -> None:
    """Show every setting and where it comes from."""
    invocation = app_of(context)
    loaded = invocation.loaded
    rows = [
        {"name": name, "value": value, "source": source, "meaning": loaded.settings.meaning(name)}
        for name, value, source in loaded.rows()
    ]
    invocation.out.result(
        rows,
        lambda: invocation.out.table(
            ("setting", "value", "from", "meaning"),
            [(row["name"], json.dumps(row["value"]), row["source"], row["meaning"]) for row in rows],
            "no settings",
        ),
        quiet=[f"{row['name']}={json.dumps(row['value'])}" for row in rows],
    )
