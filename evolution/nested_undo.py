"""The way back from the last consolidation: the pairs of before it, beside the state on disk.

Only the last one is kept, for an earlier one would take back the tasks that were learnt since.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

from evolution.checkpoint import Checkpoint, read_checkpoint
from evolution.errors import TrainingError
from evolution.nested_model import NestedModel, state_of

_BEFORE: Final = "before-*.safetensors"


def keep_before(output: Path, task: int, before: Checkpoint) -> None:
    """Keep what was there before the fast pair of `task` was consolidated, in place of what was kept so before."""
    path = output / _BEFORE.replace("*", f"{task:03d}")
    before.write(path)
    for other in output.glob(_BEFORE):
        if other != path:
            other.unlink()


def undo(output: Path, learnt: NestedModel) -> int:
    """Put pairs and who holds them back as they were before the last consolidation, bit for bit; its task.

    Raises `TrainingError` where there was none, or where another task was learnt since.
    """
    path = next(iter(output.glob(_BEFORE)), None)
    kept = None if path is None else read_checkpoint(path)
    if path is None or kept is None:
        raise TrainingError(f"expected a consolidation in {output} to roll back, got none")
    task, before = int(path.stem.rpartition("-")[2]), state_of(kept.notes)
    if len(learnt.state.tasks) != max(len(before.tasks), task + 1):
        raise TrainingError(
            "expected a consolidation that was the last thing learnt, got one before another task, so it stays",
            hint="train again with fewer tasks, to another directory",
        )
    learnt.state = replace(learnt.state, held=before.held)
    learnt.restore_pairs(kept.tensors)  # a head does not change with a consolidation
    return task


def forget_before(output: Path) -> None:
    """Delete what `keep_before` kept."""
    for path in output.glob(_BEFORE):
        path.unlink()


__all__ = ["forget_before", "keep_before", "undo"]
