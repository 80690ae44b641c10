"""Training a router head: on labels (Stage 1), through the mixed model (Stage 2), with the adapters (Stage 3).

The base is frozen in every stage, the adapters in the first two. A run that is given something to validate on ends
with the best state that it saw, which may be the one that it began with.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from arrowmoe.errors import RoutingError
from arrowmoe.routing.balance import CollapseMonitor, gate_entropy, load_balance_loss
from arrowmoe.routing.heads import RouterHead
from arrowmoe.routing.mixed import MixedOutput, MultiLoRAWithRouter
from arrowmoe.routing.modes import Annealing, Mode, gate, probabilities
from registry.logs import get_logger

IGNORED = -100
log = get_logger(__name__)

Stopped = Literal["steps", "patience"]
_B = TypeVar("_B")


@dataclass(frozen=True, kw_only=True)
class TrainingReport:
    """What a run did, step by step; `marginal` is each card's share of all gates, `losses` are nats.

    `validation` is the loss at each look, the first before any step; `best` the step whose state was kept.
    """

    losses: tuple[float, ...]
    entropies: tuple[float, ...]
    validation: tuple[float, ...]
    marginal: tuple[float, ...]
    steps: int
    best: int
    stopped_why: Stopped


@dataclass(frozen=True, kw_only=True)
class Stage1:
    """Settings of Stage 1; `patience` counts looks at the validation split that bring no lower loss."""

    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    steps: int = 1000
    batch_size: int = 32
    validation_share: float = 0.1
    look_every: int = 20
    patience: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size, self.look_every, self.patience) < 1 or not 0 < self.validation_share < 1:
            raise RoutingError(f"expected counts of at least 1 and a validation share in (0, 1), got {self}")


@dataclass(frozen=True, kw_only=True)
class Stage2:
    """Settings of Stages 2 and 3.

    The loss is task + `entropy_weight` · H(p) + `kl_weight` · KL(p ‖ p of the head as it came) + `balance_weight` ·
    load balance; the last only while the monitor says that the use of the cards has collapsed. Weights may be 0.
    """

    learning_rate: float = 1e-3
    adapter_learning_rate: float = 1e-5
    steps: int = 200
    mode: Mode = "soft"
    temperature: Annealing = field(default_factory=Annealing)
    hard_gumbel: bool = False
    entropy_weight: float = 0.01
    kl_weight: float = 0.0
    balance_weight: float = 0.01
    clip_norm: float = 1.0
    look_every: int = 20
    patience: int = 5
    validation_mode: Mode = "top1"
    seed: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Ids, attention and labels (rows, tokens), padded on the right; labels are `IGNORED` but on the answer."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    images: Mapping[str, Tensor] | None = None
    side: Tensor | None = None

    @property
    def prompt_mask(self) -> Tensor:
        """What the router may see: the prompt, never the answer."""
        return self.attention_mask * (self.labels == IGNORED)


class BalancedSampler:
    """Endless batches of indices in which every label is drawn equally often, whatever its number of examples."""

    def __init__(self, labels: Sequence[int], batch_size: int, *, seed: int = 0) -> None:
        if not labels or batch_size < 1:
            raise RoutingError(f"expected labels and a batch size of at least 1, got {len(labels)} and {batch_size}")
        self._rows = {label: [i for i, own in enumerate(labels) if own == label] for label in sorted(set(labels))}
        self._batch_size = batch_size
        self._seed = seed

    def __iter__(self) -> Iterator[list[int]]:
        rng = random.Random(self._seed)
        streams = [_reshuffled(rows, rng) for rows in self._rows.values()]
        draws = (next(stream) for stream in cycle(streams))
        while True:
            yield list(islice(draws, self._batch_size))


def train_stage1(
    head: RouterHead, features: Tensor, labels: Tensor, *, side: Tensor | None = None, settings: Stage1 | None = None
) -> TrainingReport:
    """Cross-entropy of features (rows, d) on labels (rows,), the index of the card; n_cards is the null expert's.

    A share of each label's rows is held out for early stopping. Raises `RoutingError`.
    """
    settings = settings or Stage1()
    _check_labels(head, features, labels)
    train, held = _split(labels.tolist(), settings.validation_share, settings.seed)
    sampler = BalancedSampler(labels[train].tolist(), settings.batch_size, seed=settings.seed)
    weights = list(head.parameters())
    optimiser = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=settings.weight_decay)

    def logits_of(rows: Tensor) -> Tensor:
        logits: Tensor = head(features[rows], None if side is None else side[rows])
        return logits

    def step(picked: list[int], index: int) -> _Step:
        rows = train[picked]
        logits = logits_of(rows)
        loss = nn.functional.cross_entropy(logits, labels[rows])
        _descend(optimiser, loss, weights, clip_norm=1.0)
        gates = gate(logits.detach(), "top1", null=head.config.null)
        return _Step(loss=loss.item(), entropy=gate_entropy(probabilities(logits.detach())).item(), gates=gates)

    def held_loss() -> float:
        return float(nn.functional.cross_entropy(logits_of(held), labels[held]))

    return _run(head, sampler, step, _Watch(head, weights, held_loss, settings.patience), settings)


def train_stage2(
    mixed: MultiLoRAWithRouter,
    batches: Iterable[Batch],
    *,
    validation: Sequence[Batch] = (),
    settings: Stage2 | None = None,
    monitor: CollapseMonitor | None = None,
) -> TrainingReport:
    """The task loss of the mixed model moves the head alone; `batches` are taken up to the settings' steps.

    With `validation` batches the head never ends worse on them than it began.
    """
    settings, weights = settings or Stage2(), list(mixed.head.parameters())
    optimiser = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=0.0)
    return _train_mixed(mixed, weights, optimiser, batches, validation, settings, monitor or CollapseMonitor())


def train_stage3(
    mixed: MultiLoRAWithRouter,
    batches: Iterable[Batch],
    *,
    validation: Sequence[Batch] = (),
    settings: Stage2 | None = None,
    monitor: CollapseMonitor | None = None,
) -> TrainingReport:
    """As Stage 2, and the adapters' A and B move too, at their own low rate; read them by `mixed.trained_cards`."""
    settings, head = settings or Stage2(), list(mixed.head.parameters())
    adapters = mixed.unfreeze_adapters()
    groups: list[dict[str, Any]] = [
        {"params": head, "lr": settings.learning_rate},
        {"params": adapters, "lr": settings.adapter_learning_rate},
    ]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
    try:
        return _train_mixed(
            mixed, [*head, *adapters], optimiser, batches, validation, settings, monitor or CollapseMonitor()
        )
    finally:
        mixed.freeze_adapters()


def task_loss(mixed: MultiLoRAWithRouter, batches: Sequence[Batch], *, mode: Mode = "top1") -> float:
    """Mean loss of the answers' tokens, in nats, over all of `batches`, routed by `mode`; changes nothing."""
    total, tokens = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            count = int((batch.labels[:, 1:] != IGNORED).sum())
            total += float(_answer_loss(_forward(mixed, batch, mode).output, batch.labels)) * count
            tokens += count
    return total / tokens


def _train_mixed(
    mixed: MultiLoRAWithRouter,
    weights: list[nn.Parameter],
    optimiser: torch.optim.Optimizer,
    batches: Iterable[Batch],
    validation: Sequence[Batch],
    settings: Stage2,
    monitor: CollapseMonitor,
) -> TrainingReport:
    reference = copy.deepcopy(mixed.head).eval() if settings.kl_weight else None
    null = mixed.head.config.null

    def step(batch: Batch, index: int) -> _Step:
        temperature = settings.temperature.at(index)
        made = _forward(mixed, batch, settings.mode, temperature, settings.hard_gumbel)
        gates, probs = made.gates.flatten(0, -2), made.gate_probs.flatten(0, -2)
        monitor.update(gates)
        entropy = gate_entropy(probs)
        loss = _answer_loss(made.output, batch.labels) + settings.entropy_weight * entropy
        if reference is not None:
            loss = loss + settings.kl_weight * _divergence(mixed, reference, batch, made.gate_logits)
        if monitor.collapsed:
            cards = probs[:, :-1] if null else probs
            chosen = gate(cards.detach(), "top1") > 0
            loss = loss + settings.balance_weight * load_balance_loss(cards, chosen)
        _descend(optimiser, loss, weights, settings.clip_norm)
        return _Step(loss=loss.item(), entropy=entropy.item(), gates=gates.detach())

    def look() -> float:
        return task_loss(mixed, validation, mode=settings.validation_mode)

    watch = _Watch(mixed.head, weights, look if validation else None, settings.patience)
    return _run(mixed.head, batches, step, watch, settings)


def _forward(
    mixed: MultiLoRAWithRouter, batch: Batch, mode: Mode, temperature: float = 1.0, hard_gumbel: bool = False
) -> MixedOutput:
    made: MixedOutput = mixed(
        batch.input_ids,
        batch.attention_mask,
        images=batch.images,
        routing_mode=mode,
        prompt_mask=batch.prompt_mask,
        side=batch.side,
        temperature=temperature,
        hard_gumbel=hard_gumbel,
    )
    return made


def _answer_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits (rows, tokens, vocabulary) predict the next token; mean over the answers' tokens, in nats."""
    return nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED
    )


def _divergence(mixed: MultiLoRAWithRouter, reference: nn.Module, batch: Batch, logits: Tensor) -> Tensor:
    """KL(p ‖ p of the reference head), mean over the rows, in nats."""
    with torch.no_grad():
        before = reference(mixed.features(batch.input_ids, batch.prompt_mask, batch.images), batch.side)
    log_p, log_q = torch.log_softmax(logits, dim=-1), torch.log_softmax(before, dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1).mean()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Step:
    loss: float
    entropy: float
    gates: Tensor


class _Watch:
    """Looks at a validation loss now and then, and keeps the state in which it was lowest."""

    def __init__(
        self, head: nn.Module, weights: Sequence[nn.Parameter], loss: Callable[[], float] | None, patience: int
    ) -> None:
        self.history: list[float] = []
        self.best = 0
        self._head, self._weights, self._loss = head, weights, loss
        self._misses_left = self._patience = patience
        self._state: list[Tensor] = []

    def look(self, step: int) -> bool:
        """Whether patience has ended; without a validation loss the last state is the best."""
        if self._loss is None:
            self.best = step
            return False
        self._head.eval()
        with torch.no_grad():
            loss = self._loss()
        if loss < min(self.history, default=math.inf):
            self.best, self._misses_left = step, self._patience
            self._state = [weight.detach().clone() for weight in self._weights]
        else:
            self._misses_left -= 1
        self.history.append(loss)
        return self._misses_left == 0

    def put_back(self) -> None:
        """The best state, if one was kept."""
        with torch.no_grad():
            for weight, best in zip(self._weights, self._state, strict=False):
                weight.copy_(best)


def _run(
    head: nn.Module,
    batches: Iterable[_B],
    step: Callable[[_B, int], _Step],
    watch: _Watch,
    settings: Stage1 | Stage2,
) -> TrainingReport:
    steps: list[_Step] = []
    stopped: Stopped = "steps"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        for index, batch in enumerate(islice(batches, settings.steps)):
            if index % settings.look_every == 0 and watch.look(index):
                stopped = "patience"
                break
            head.train()
            steps.append(step(batch, index))
        else:
            watch.look(len(steps))
    head.eval()
    watch.put_back()
    return _report(steps, watch, stopped)


def _report(steps: Sequence[_Step], watch: _Watch, stopped: Stopped) -> TrainingReport:
    if not steps:
        raise RoutingError("expected batches to train on, got none")
    used = torch.cat([step.gates for step in steps]).float().sum(dim=0)
    report = TrainingReport(
        losses=tuple(step.loss for step in steps),
        entropies=tuple(step.entropy for step in steps),
        validation=tuple(watch.history),
        marginal=tuple((used / used.sum().clamp_min(1e-9)).tolist()),
        steps=len(steps),
        best=watch.best,
        stopped_why=stopped,
    )
    log.info("head_trained", steps=report.steps, best=report.best, loss_nats=report.losses[-1], stopped=stopped)
    return report


def _descend(optimiser: torch.optim.Optimizer, loss: Tensor, weights: Sequence[nn.Parameter], clip_norm: float) -> None:
    if not bool(loss.isfinite()):
        raise RoutingError(f"expected a finite loss, got {loss.item()}", hint="lower the learning rate")
    optimiser.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(weights, clip_norm)
    optimiser.step()


def _reshuffled(rows: Sequence[int], rng: random.Random) -> Iterator[int]:
    """`rows` over and over, in a new order each time."""
    while True:
        yield from rng.sample(rows, len(rows))


def _split(labels: Sequence[int], held_share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices to train on and to hold out, the same share of every label; a label with one row is trained on."""
    rng, train, held = random.Random(seed), list[int](), list[int]()
    for label in sorted(set(labels)):
        rows = [row for row, own in enumerate(labels) if own == label]
        rng.shuffle(rows)
        count = min(len(rows) - 1, max(1, round(held_share * len(rows))))
        held += rows[:count]
        train += rows[count:]
    return torch.tensor(train), torch.tensor(held)


def _check_labels(head: RouterHead, features: Tensor, labels: Tensor) -> None:
    if labels.shape != features.shape[:1] or len(labels) < 2:
        raise RoutingError(f"expected one label per row of features {tuple(features.shape)}, got {tuple(labels.shape)}")
    if int(labels.min()) < 0 or int(labels.max()) >= head.config.n_logits:
        raise RoutingError(
            f"expected labels from 0 to {head.config.n_logits - 1}, got {int(labels.min())} to {int(labels.max())}",
            hint="out-of-scope rows are n_cards, and need a head with null=True",
        )
    if int(labels.bincount().max()) < 2:
        raise RoutingError("expected a card with at least two examples, so that one can be held out")
