"""What `arrowmoe evolve nested show` tells, without anything heavy."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from evolution.nested_state import read_state


def show(output: Path) -> dict[str, Any]:
    """What an output directory says. Raises `TrainingError`."""
    state = read_state(output)
    measures = {name: asdict(one) for name, one in state.measures.items()}
    return asdict(state) | {"output": str(output), "measures": measures}


__all__ = ["show"]
