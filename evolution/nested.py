"""Slow and fast: one slow LoRA that all tasks share, and one fast LoRA for each task, on a model's linear layers.

    y = W x + s · (B₀ A₀ x + Σ_k g_k B_k A_k x)          s = alpha / rank, the same at every rank

Training task k has g_k = 1 and all others out of the graph: gradients reach the slow pair and fast pair k alone, which
is why they get none rather than zeros (AdamW moves a weight on its old momentum where its gradient is zero). Inference
with no task named has every g_k = 1, or 1 / K. Each row may have a task of its own, or gates of its own for all tasks.
The sum is computed by `evolution.gated`, as in the engine.

The layers of one model share a `TaskContext`, so a model is used by one thread at a time. What happens at the end of a
task is in `evolution.consolidation`, how the pairs become cards in `evolution.nested_cards`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from evolution.errors import TrainingError
from evolution.gated import Concatenated, Segment, add_joined, add_segments
from evolution.targets import adaptable, plan_by_name
from evolution.training_job import FineTuning

Combine = Literal["sum", "mean"]
Factors = tuple[Tensor, Tensor]
"""A (rank, d_in) and B (d_out, rank)."""

_HINT: Final = "name the task: with nested.using(task): …"


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """A batch of `count` rows, and which of them (indices) belong to each task."""

    count: int
    by_task: Mapping[int, Tensor]


@dataclass(eq=False, kw_only=True)
class TaskContext:
    """Which fast pairs the batch in flight uses: one task's, each row's own, or with None all of them, combined.

    Gates are (rows, tasks).
    """

    combine: Combine = "sum"
    chosen: int | Rows | Tensor | None = field(default=None)


class LowRank(nn.Module):
    """A (rank, d_in) and B (d_out, rank) in fp32, which learn."""

    a: nn.Parameter
    b: nn.Parameter

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.become(a, b)

    @classmethod
    def fresh(cls, layer: nn.Linear, rank: int, generator: torch.Generator) -> LowRank:
        """A pair that changes nothing yet: A uniform in ±1/√d_in, as PEFT draws it, and B zero."""
        a = torch.empty(rank, layer.in_features).uniform_(-1, 1, generator=generator) / layer.in_features**0.5
        return cls(a.to(layer.weight.device), torch.zeros(layer.out_features, rank, device=layer.weight.device))

    def become(self, a: Tensor, b: Tensor) -> None:
        """Take copies of other factors, of any rank. They are new parameters: make the optimiser anew."""
        self.a, self.b = (nn.Parameter(factor.detach().clone()) for factor in (a, b))

    def factors(self) -> Factors:
        """Copies, which training does not move."""
        return self.a.detach().clone(), self.b.detach().clone()

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.a.shape[0]


class NestedLoRALinear(nn.Module):
    """A linear layer, frozen, with a slow pair and the fast pairs of all tasks."""

    def __init__(self, base: nn.Linear, slow: LowRank, *, scaling: float, context: TaskContext) -> None:
        super().__init__()
        self.base = base
        self.slow = slow
        # Typed as what it holds, for a ModuleList does not say.
        self.fast = cast("list[LowRank]", nn.ModuleList())
        self.scaling = scaling
        self.context = context

    def __getattr__(self, name: str) -> Any:
        """Models read a layer's weight or sizes directly; they are the base's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, x: Tensor) -> Tensor:
        """x (rows, …, d_in) → (rows, …, d_out). Raises `TrainingError` where the task is not known that it needs."""
        y: Tensor = self.base(x)
        wide = self.slow.a.dtype
        # The pairs stay in fp32 and are added in place, which autocast does not see.
        with torch.autocast(x.device.type, enabled=False):
            return self._add(y.to(wide), x.to(wide)).to(y.dtype)

    def _add(self, y: Tensor, x: Tensor) -> Tensor:
        chosen, rows = self.context.chosen, x.shape[0]
        if isinstance(chosen, int):
            return add_joined(y, x, self._joined([self.slow, self.fast[chosen]], self.scaling))
        if isinstance(chosen, Rows):
            _check_rows(rows, chosen.count)
            segments = [self._segment(task, own.to(x.device)) for task, own in chosen.by_task.items()]
            return add_segments(add_joined(y, x, self._joined([self.slow], self.scaling)), x, segments, rows)
        if chosen is None:
            chosen = self._all(x)
        _check_rows(rows, len(chosen))
        return add_joined(y, x, self._joined([self.slow, *self.fast], self._coefficients(chosen.to(x))))

    def _all(self, x: Tensor) -> Tensor:
        """The gates where no task is named (rows, tasks)."""
        if self.training:
            raise TrainingError("expected a task to train on, got none, so no fast LoRA can be chosen", hint=_HINT)
        share = 1 / len(self.fast) if self.context.combine == "mean" else 1.0
        return x.new_full((x.shape[0], len(self.fast)), share)

    def _coefficients(self, gates: Tensor) -> Tensor:
        """Gates (rows, tasks) times the scaling, with slow's 1 before them, as (rows, Σ rank)."""
        ranks = torch.tensor([self.slow.rank, *(fast.rank for fast in self.fast)], device=gates.device)
        return (self.scaling * functional.pad(gates, (1, 0), value=1.0)).repeat_interleave(ranks, dim=1)

    def _joined(self, pairs: Sequence[LowRank], coefficients: Tensor | float) -> Concatenated:
        a, b = torch.cat([pair.a for pair in pairs]), torch.cat([pair.b.T for pair in pairs])
        return Concatenated(a=a, b=b, coefficients=coefficients)

    def _segment(self, task: int, rows: Tensor) -> Segment:
        fast = self.fast[task]
        return Segment(a=fast.a, b=fast.b.T, units=rows, coefficients=self.scaling)


class NestedLoRA:
    """The nested layers of one model, by their path, and the task that they are used for."""

    def __init__(self, model: Any, tuning: FineTuning, layers: Mapping[str, nn.Linear], context: TaskContext) -> None:
        """Put nested layers in the place of `layers` and freeze the rest; `attach` finds them."""
        self.model = model
        self.rank = tuning.rank
        self.scaling = tuning.alpha / tuning.rank
        self._context = context
        self._generator = torch.Generator().manual_seed(tuning.seed)
        self._trained = [weight for weight in model.parameters() if weight.requires_grad]
        for weight in self._trained:
            weight.requires_grad_(False)
        self.layers = {path: self._nested(layer) for path, layer in layers.items()}
        for path, nested in self.layers.items():
            model.set_submodule(path, nested)

    @property
    def tasks(self) -> int:
        """K, the number of fast pairs at each layer."""
        return len(next(iter(self.layers.values())).fast)

    def grow(self, tasks: int) -> None:
        """Have fast pairs for at least `tasks` tasks; those that are there stay."""
        for _ in range(self.tasks, tasks):
            for nested in self.layers.values():
                nested.fast.append(LowRank.fresh(nested.base, self.rank, self._generator))

    @contextmanager
    def using(self, task: int | Tensor) -> Iterator[None]:
        """Within, the model computes slow + fast[task]; a tensor (rows,) of task ids gives each row its own.

        Gates (rows, tasks) compute slow + Σ gate · fast; they may learn, and then every fast pair does.

        Stay within until after the backward pass: activations that are computed anew there need the task as well.
        Raises `TrainingError` for a task that is not there.
        """
        chosen, before = self._chosen(task), self._context.chosen
        self._context.chosen = chosen
        try:
            yield
        finally:
            self._context.chosen = before

    def trainable(self, task: int) -> list[nn.Parameter]:
        """What training `task` moves: the slow pairs and its own fast ones."""
        self.check(task)
        pairs = (pair for nested in self.layers.values() for pair in (nested.slow, nested.fast[task]))
        return [weight for pair in pairs for weight in pair.parameters()]

    def reset(self, task: int, *, left: float = 0.0) -> None:
        """Leave `left` of what fast `task` changes; with 0 it begins anew."""
        self.check(task)
        for nested in self.layers.values():
            pair = nested.fast[task]
            begun = pair if left else LowRank.fresh(nested.base, self.rank, self._generator)
            pair.become(begun.a, begun.b * left)

    def check(self, task: int) -> None:
        """Raise `TrainingError` where there is no such task."""
        if not 0 <= task < self.tasks:
            raise TrainingError(f"expected a task from 0 to {self.tasks - 1}, got {task}", hint="nested.grow(tasks)")

    def detach(self) -> Any:
        """The model as it was before `attach`, bit for bit; what had trained may train again."""
        for path, nested in self.layers.items():
            self.model.set_submodule(path, nested.base)
        for weight in self._trained:
            weight.requires_grad_(True)
        return self.model

    def _nested(self, layer: nn.Linear) -> NestedLoRALinear:
        slow = LowRank.fresh(layer, self.rank, self._generator)
        nested = NestedLoRALinear(layer, slow, scaling=self.scaling, context=self._context)
        return nested.train(layer.training)

    def _chosen(self, task: int | Tensor) -> int | Rows | Tensor:
        if isinstance(task, int):
            self.check(task)
            return task
        if task.is_floating_point() and task.dim() == 2 and task.shape[1] == self.tasks:
            return task
        if task.dim() != 1 or task.is_floating_point():
            raise TrainingError(
                f"expected task ids (rows,) or gates (rows, {self.tasks}), got {task.dtype} of {tuple(task.shape)}"
            )
        found = sorted(set(task.tolist()))
        for one in found:
            self.check(one)
        return Rows(count=len(task), by_task={one: (task == one).nonzero().flatten() for one in found})


def attach(model: Any, tuning: FineTuning, *, tasks: int = 1, combine: Combine = "sum") -> NestedLoRA:
    """Put a slow pair and `tasks` fast ones on the targets of `tuning`, at its rank, and freeze all else.

    `combine` says what inference does with the fast pairs where no task is named. Raises `TrainingError`, with the
    model left as it was, where a target is missing, is no plain `nn.Linear`, or is nested already.
    """
    if tasks < 1:
        raise TrainingError(f"expected at least 1 task, got {tasks}")
    if any(isinstance(module, NestedLoRALinear) for module in model.modules()):
        raise TrainingError("expected a bare model, got one with nested layers", hint="detach() them first")
    nested = NestedLoRA(model, tuning, _layers(model, tuning), TaskContext(combine=combine))
    nested.grow(tasks)
    return nested


def _check_rows(expected: int, got: int) -> None:
    if got != expected:
        raise TrainingError(f"expected a task for each of {expected} rows, got {got} tasks")


def _layers(model: Any, tuning: FineTuning) -> dict[str, nn.Linear]:
    found = {path: model.get_submodule(path) for path in _paths(model, tuning)}
    # A subclass may be read rather than called, as attention's out_proj in nn.MultiheadAttention, or be quantised.
    odd = [path for path, layer in found.items() if type(layer) is not nn.Linear]
    if odd:
        raise TrainingError(f"expected nn.Linear at {odd[0]!r}, got {type(found[odd[0]]).__name__}, so it cannot nest")
    return found


def _paths(model: Any, tuning: FineTuning) -> list[str]:
    if isinstance(tuning.targets, str):
        return list(plan_by_name(model, tuning).ranks)
    paths = list(adaptable(model, tuning))
    for target in tuning.targets:
        if not any(_ends_in(path, target) for path in paths):
            raise TrainingError(f"expected targets that {type(model).__name__} has in its blocks, got {target!r}")
    return [path for path in paths if any(_ends_in(path, target) for target in tuning.targets)]


def _ends_in(path: str, target: str) -> bool:
    return f".{path}".endswith(f".{target}")


__all__ = ["Combine", "Factors", "LowRank", "NestedLoRA", "NestedLoRALinear", "Rows", "TaskContext", "attach"]
