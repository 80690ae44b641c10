"""Where a training adapts, as it was decided in its process: `plan.json` beside the checkpoint. Nothing heavy here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from evolution.errors import TrainingError
from evolution.training_job import FineTuning, Targets, same_job
from registry.digest import Digest, digest_of
from registry.files import written_whole

PLAN: Final = "plan.json"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which modules to adapt, by their whole path, and at which rank each."""

    name: Targets
    ranks: Mapping[str, int]
    parameters: int

    def tuning(self, tuning: FineTuning) -> FineTuning:
        """`tuning` for these modules; its scale, alpha / rank, stays. Goes with `rank_pattern`."""
        return replace(tuning, targets=tuple(self.ranks), layers=None)

    def rank_pattern(self, tuning: FineTuning) -> dict[str, int]:
        """The modules of another rank than `tuning` gives."""
        return {module: rank for module, rank in self.ranks.items() if rank != tuning.rank}

    def digest(self) -> Digest:
        """What a checkpoint must agree with."""
        return digest_of(json.dumps(asdict(self), sort_keys=True).encode())


def write_plan(plan: Plan, output: Path, fingerprint: Digest) -> None:
    """Keep the plan of a job in its output directory."""
    with written_whole(output / PLAN) as file:
        file.write(json.dumps(asdict(plan) | {"job": fingerprint}, indent=2).encode() + b"\n")


def read_plan(output: Path, fingerprint: Digest) -> Plan | None:
    """The plan that was made for the same job, if there is one. Raises `TrainingError` for another job."""
    path = output / PLAN
    if not path.exists():
        return None
    try:
        said = json.loads(path.read_bytes())
        job, plan = said.pop("job"), Plan(**said)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrainingError(f"{path.name} is damaged: {error}", hint=f"delete {path.parent} to begin again") from error
    same_job(job, fingerprint, path)
    return plan


__all__ = ["PLAN", "Plan", "read_plan", "write_plan"]
