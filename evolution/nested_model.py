"""A base model with slow and fast pairs, and with a head that grows, as the state on disk has them.

The weights of `nested.safetensors` go in and out bit for bit. Nothing here trains.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from evolution.checkpoint import Checkpoint, read_checkpoint
from evolution.errors import TrainingError
from evolution.nested import LowRank, NestedLoRA, attach
from evolution.nested_experiment import NestedExperiment
from evolution.nested_loss import logits_by_row
from evolution.nested_state import WEIGHTS, NestedState
from evolution.nested_subjects import Images, Scored, Subject, Texts

ROWS_AT_ONCE: Final = 64
_FAST_SEEDS: Final = 0x5EED0000  # the CPU generator heeds 32 bits


class NestedModel:
    """What `opened` gives: `nested` and `subject` on one model, and the `state` that they are in."""

    def __init__(self, nested: NestedLoRA, subject: Subject[Any], state: NestedState) -> None:
        self.nested, self.subject, self.state = nested, subject, state

    def right(self, rows: Sequence[Any], task: int) -> tuple[float, float]:
        """The share of a task's rows that is right, with no task named and with it.

        With it, the task's own fast pair answers alone where it still has one, and only its own classes compete.
        """
        untold = torch.cat([scored.right() for scored in self._scored(rows)])
        if isinstance(self.subject, Texts) and self.state.pair_of(task) is None:
            told = untold
        else:
            told = torch.cat([scored.right() for scored in self._scored(rows, task)])
        return float(untold.double().mean()), float(told.double().mean())

    def row_nats(self, rows: Sequence[Any]) -> list[float]:
        """The mean loss of each row, with no task named."""
        return [nats for scored in self._scored(rows) for nats in scored.row_nats().tolist()]

    def logits(self, rows: Sequence[Any]) -> list[Tensor]:
        """The logits of each row, with no task named."""
        return [logits for scored in self._scored(rows) for logits in logits_by_row(scored)]

    @property
    def free_pair(self) -> int:
        """The fast pair that the next task gets: one that nobody holds, or a new one."""
        held = self.state.held
        return held.index(None) if None in held else len(held)

    def take_pair(self, task: int, seed: int) -> int:
        """The free pair, which changes nothing yet; from now on it is the task's."""
        pair = self.free_pair
        self.nested.grow(pair + 1)
        # Slow pairs drew theirs from a seed of the same kind: two of one A would have one rank between them.
        generator = torch.Generator().manual_seed(seed + _FAST_SEEDS)
        for layer in self.nested.layers.values():
            layer.fast[pair].become(*LowRank.fresh(layer.base, self.nested.rank, generator).factors())
        self.hold(pair, task)
        return pair

    def hold(self, pair: int, task: int | None) -> None:
        """Say which task needs a fast pair."""
        held = [*self.state.held, None][: self.nested.tasks]
        held[pair] = task
        self.state = replace(self.state, held=tuple(held))

    def train_only(self, weights: Sequence[nn.Parameter]) -> None:
        """Let these weights alone have gradients."""
        chosen = set(map(id, weights))
        for weight in self.nested.model.parameters():
            weight.requires_grad_(id(weight) in chosen)

    def parameters(self) -> int:
        """Of all pairs and the head."""
        heads = [self.subject.head] if isinstance(self.subject, Images) else []
        pairs = [pair for layer in self.nested.layers.values() for pair in (layer.slow, *layer.fast)]
        return sum(weight.numel() for part in (*heads, *pairs) for weight in part.parameters())

    def save(self, experiment: NestedExperiment) -> None:
        """Keep weights and state, whole or not at all."""
        self.checkpoint().write(experiment.output / WEIGHTS)
        self.state.write(experiment.output)

    def checkpoint(self) -> Checkpoint:
        """Weights and state as they are now."""
        return Checkpoint(tensors=self._tensors(), notes=asdict(self.state))

    def restore(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take the weights that `save` kept, in the state that was given."""
        self.restore_pairs(tensors)
        if isinstance(self.subject, Images):
            self.subject.restore(self.state.classes, tensors.get("head", {}))

    def restore_pairs(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take slow and fast pairs only."""
        nested = self.nested
        nested.grow(len(self.state.held))
        for path, layer in nested.layers.items():
            device = layer.slow.a.device
            pairs = [(layer.slow, "slow", path)]
            pairs += [(layer.fast[number], "fast", f"{number}.{path}") for number in self._used]
            for pair, group, name in pairs:
                pair.become(*(tensors[group][f"{name}.{factor}"].to(device) for factor in "ab"))

    @torch.no_grad()
    def _scored(self, rows: Sequence[Any], task: int | None = None) -> Iterator[Scored]:
        pair = None if task is None else self.state.pair_of(task)
        with ExitStack() as stack:
            if pair is not None:
                stack.enter_context(self.nested.using(pair))
            for start in range(0, len(rows), ROWS_AT_ONCE):
                yield self.subject.scored(rows[start : start + ROWS_AT_ONCE], task)

    @property
    def _used(self) -> list[int]:
        """The fast pairs that change something; the others are drawn anew when they are taken."""
        return [pair for pair, task in enumerate(self.state.held) if task is not None]

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        tensors: dict[str, dict[str, Tensor]] = {"slow": {}, "fast": {}}
        for path, layer in self.nested.layers.items():
            tensors["slow"] |= _named(path, layer.slow)
            for number in self._used:
                tensors["fast"] |= _named(f"{number}.{path}", layer.fast[number])
        if isinstance(self.subject, Images):
            tensors["head"] = {name: tensor.detach().cpu() for name, tensor in self.subject.head.state_dict().items()}
        return tensors


@contextmanager
def opened(experiment: NestedExperiment, model: Any, tokenizer: Any = None) -> Iterator[NestedModel]:
    """`model` as far as the experiment's output directory has got; afterwards it is as it was before, in eval mode.

    Raises `TrainingError`, also for a state of another experiment or of tasks that have changed since.
    """
    path = experiment.output / WEIGHTS
    kept = read_checkpoint(path)
    state = NestedState(experiment=experiment.fingerprint()) if kept is None else state_of(kept.notes)
    _check(experiment, state)
    with ExitStack() as stack:
        subject = _subject(experiment, model, tokenizer, stack)
        nested = attach(model.eval(), experiment.tuning, combine=experiment.combine)
        stack.callback(lambda: nested.detach().eval())
        opened_model = NestedModel(nested, subject, state)
        if kept is not None:
            opened_model.restore(kept.tensors)
        yield opened_model


def state_of(notes: Mapping[str, Any]) -> NestedState:
    """The state in the notes of a checkpoint. Raises `TrainingError`."""
    try:
        return NestedState.of(notes)
    except (KeyError, TypeError, ValueError) as error:
        raise TrainingError(f"{WEIGHTS} is damaged: {error!r}", hint="delete its directory to begin again") from error


def _subject(experiment: NestedExperiment, model: Any, tokenizer: Any, stack: ExitStack) -> Subject[Any]:
    if experiment.kind == "text":
        if tokenizer is None:
            raise TrainingError("expected a tokenizer for tasks of text, got none")
        return Texts(model, tokenizer)
    if not isinstance(getattr(model, "classifier", None), nn.Linear):
        raise TrainingError(f"expected an image model with a linear classifier, got {type(model).__name__}")
    images = Images(model)
    stack.callback(images.detach)
    return images


def _check(experiment: NestedExperiment, state: NestedState) -> None:
    """What was learnt must be a beginning of what is to be learnt."""
    hint = f"delete {experiment.output} to begin again, or write to another directory"
    if state.experiment != experiment.fingerprint():
        raise TrainingError(f"expected {WEIGHTS} of this experiment, got one of other settings", hint=hint)
    known = [(task.name, task.digest()) for task in experiment.tasks[: len(state.tasks)]]
    if known != [(task.name, task.data) for task in state.tasks]:
        raise TrainingError("expected the tasks that were learnt already first and as they were", hint=hint)


def _named(name: str, pair: LowRank) -> dict[str, Tensor]:
    return {f"{name}.{factor}": tensor.cpu() for factor, tensor in zip("ab", pair.factors(), strict=True)}


__all__ = ["NestedModel", "opened", "state_of"]
