"""A training's state as one safetensors file, which is there whole or not at all; no pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from evolution.errors import TrainingError
from registry.files import written_whole

CHECKPOINT: Final = "checkpoint.safetensors"
_NOTES: Final = "notes"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Groups of tensors by name, and notes: whatever JSON can say, floats to their last bit."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    notes: Mapping[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Replace the checkpoint at `path`."""
        flat = {f"{group}/{name}": tensor for group, kept in self.tensors.items() for name, tensor in kept.items()}
        with written_whole(path) as file:
            file.write(save(flat, metadata={_NOTES: json.dumps(self.notes)}))


def read_checkpoint(path: Path) -> Checkpoint | None:
    """The checkpoint at `path`, if there is one. Raises `TrainingError`."""
    if not path.exists():
        return None
    tensors: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            notes = json.loads(file.metadata()[_NOTES])
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                group, _, name = key.partition("/")
                tensors.setdefault(group, {})[name] = file.get_tensor(key)
    except (SafetensorError, KeyError, ValueError) as error:
        raise TrainingError(f"{path.name} is damaged: {error}", hint=f"delete {path} to begin again") from error
    return Checkpoint(tensors=tensors, notes=notes)


__all__ = ["CHECKPOINT", "Checkpoint", "read_checkpoint"]
