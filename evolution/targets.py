"""Which linear layers of a model are meant by "mlp" and "all": those of its numbered blocks, told apart by their paths.

Neither embeddings nor heads are ever meant. A layer is attention's if its path says so; else it is the MLP's, where
its path in the block is one that is known for that.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

import torch
from transformers.pytorch_utils import Conv1D

from evolution.errors import TrainingError
from evolution.target_plan import Plan
from evolution.training_job import FineTuning, Targets
from registry.logs import get_logger

Shape = tuple[int, int]
"""(d_out, d_in) of a linear layer."""

_IN_A_BLOCK: Final = re.compile(r"\.(\d+)\.(.+)")
_ATTENTION: Final = re.compile(r"attn|attention", re.IGNORECASE)
_MLP: Final = re.compile(
    r"mlp|ffn|feed_?forward|expert|dense_?relu_?dense|(^|\.)(ff|fc\w*|intermediate|output)(\.|$)", re.IGNORECASE
)

log = get_logger(__name__)


def linear_layers(model: Any) -> dict[str, Shape]:
    """The linear layers in numbered blocks, by their whole path, in the model's order."""
    head, found = model.get_output_embeddings(), {}
    for name, module in model.named_modules():
        if module is head or not _IN_A_BLOCK.search(f".{name}"):
            continue
        if isinstance(module, torch.nn.Linear):
            found[name] = (module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            found[name] = (module.nf, module.nx)
    return found


def mlp_of(modules: Iterable[str]) -> list[str]:
    """Those of the paths that are an MLP's."""
    within = {module: match[2] for module in modules if (match := _IN_A_BLOCK.search(f".{module}"))}
    return [module for module, path in within.items() if _MLP.search(path) and not _ATTENTION.search(path)]


def adaptable(model: Any, tuning: FineTuning) -> dict[str, Shape]:
    """The linear layers of the blocks that `tuning` leaves in. Raises `TrainingError` where there are none."""
    found = linear_layers(model)
    if tuning.layers is not None:
        blocks = range(*tuning.layers)
        found = {module: shape for module, shape in found.items() if _block(module) in blocks}
    if not found:
        where = "numbered blocks" if tuning.layers is None else f"blocks {tuning.layers[0]} to {tuning.layers[1] - 1}"
        raise TrainingError(
            f"expected linear layers in {where} of {type(model).__name__}, got none, so there is nothing to adapt",
            hint="name modules in tuning.targets",
        )
    return found


def plan_by_name(model: Any, tuning: FineTuning) -> Plan:
    """What the "mlp" or "all" of `tuning` means here, at its rank; "all" where no path is known to be an MLP's."""
    shapes = adaptable(model, tuning)
    mlp = mlp_of(shapes) if tuning.targets == "mlp" else []
    if tuning.targets == "mlp" and not mlp:
        log.warning("targets_unknown", wanted="mlp", adapted="all", model=type(model).__name__, modules=len(shapes))
    return plan_of("mlp" if mlp else "all", dict.fromkeys(mlp or shapes, tuning.rank), shapes)


def plan_of(name: Targets, ranks: Mapping[str, int], shapes: Mapping[str, Shape]) -> Plan:
    """A plan with its number of parameters: rank · (d_out + d_in) for each module."""
    return Plan(name=name, ranks=ranks, parameters=sum(rank * sum(shapes[module]) for module, rank in ranks.items()))


def spelled_out(model: Any, tuning: FineTuning) -> FineTuning:
    """`tuning` with its targets as modules."""
    return plan_by_name(model, tuning).tuning(tuning) if isinstance(tuning.targets, str) else tuning


def _block(module: str) -> int:
    match = _IN_A_BLOCK.search(f".{module}")
    return int(match[1]) if match else -1


__all__ = ["Shape", "adaptable", "linear_layers", "mlp_of", "plan_by_name", "plan_of", "spelled_out"]
