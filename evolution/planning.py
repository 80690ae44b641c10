"""Decides where a job adapts: by name, or by a probe of the model on the job's data. Decided once, then read again."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from evolution.errors import TrainingError
from evolution.protocols import Example
from evolution.target_plan import Plan, read_plan, write_plan
from evolution.targets import adaptable, plan_by_name, plan_of
from evolution.training_data import examples_at
from evolution.training_job import Probe, TrainingJob
from evolution.weight_probe import WeightMapProbe, hot_plan
from registry.digest import Digest
from registry.logs import get_logger

log = get_logger(__name__)


def planned(job: TrainingJob, model: Any, tokenizer: Any, fingerprint: Digest) -> Plan | None:
    """The job's plan, from its output directory if it is there; None if its tuning names modules.

    Raises `TrainingError`.
    """
    if not isinstance(job.tuning.targets, str):
        return None
    plan = read_plan(job.output, fingerprint)
    if plan is None:
        began_s = time.perf_counter()
        plan = _by_name(job, model) if job.probe is None else _probed(job, job.probe, model, tokenizer)
        write_plan(plan, job.output, fingerprint)
        log.info(
            "targets_planned",
            plan=plan.name,
            modules=len(plan.ranks),
            parameters=plan.parameters,
            seconds=round(time.perf_counter() - began_s, 1),
        )
    return plan


def _by_name(job: TrainingJob, model: Any) -> Plan:
    plan = plan_by_name(model, job.tuning)
    if odd := sorted(job.rank_pattern.keys() - plan.ranks.keys()):
        raise TrainingError(f"expected rank_pattern to name modules among those of {plan.name!r}, got {odd}")
    return plan_of(plan.name, {**plan.ranks, **job.rank_pattern}, adaptable(model, job.tuning))


def _probed(job: TrainingJob, probe: Probe, model: Any, tokenizer: Any) -> Plan:
    """The hot plan, for what the plan by name would have cost."""
    budget = round(probe.budget * plan_by_name(model, job.tuning).parameters)
    replay_url = job.data_url if job.replay is None else job.replay.data_url  # the job has seen to it that there is one
    gap, replay = (_some(examples_at(url), probe, job.tuning.seed) for url in (job.data_url, replay_url))
    zones = WeightMapProbe(model, tokenizer, seed=job.tuning.seed).zones(gap, replay)
    within = adaptable(model, replace(job.tuning, targets="all"))
    return hot_plan([zone for zone in zones if zone.module in within], budget_parameters=budget, share=probe.share)


def _some(examples: Sequence[Example], probe: Probe, seed: int) -> Sequence[Example]:
    return random.Random(seed).sample(examples, min(probe.examples, len(examples)))


__all__ = ["planned"]
