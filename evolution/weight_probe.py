"""Where to adapt: which linear layers of a causal model gain most on a gap for what they forget elsewhere.

Gradients are taken of the B of a fresh LoRA, whose A is random and whose B is nothing: the very directions that its
training can move, a random sketch of each weight's gradient that needs no memory of the model's size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from evolution.errors import TrainingError
from evolution.fine_tuning import answer_loss, attach
from evolution.protocols import Example
from evolution.target_plan import Plan
from evolution.targets import linear_layers, mlp_of
from evolution.training_data import Encoded, encode_examples
from evolution.training_job import FineTuning, Targets

RANK: Final = 8
MOST_RANK: Final = 64


@dataclass(frozen=True, kw_only=True)
class Zone:
    """A linear layer as the probe saw it.

    `worth` is what its best single step would gain on the gap net of what it forgets on the replay text; in nats by its
    formula, but far beyond where that holds, so only ratios mean something. The root mean squares are of what comes
    into it on either. `shape` is (d_out, d_in).
    """

    module: str
    shape: tuple[int, int]
    worth: float
    gap_rms: float
    replay_rms: float

    @property
    def parameters_per_rank(self) -> int:
        """What one more rank of a LoRA costs."""
        return sum(self.shape)


class WeightMapProbe:
    """Measures each linear layer of a causal model's blocks, and plans from that.

    A step −ηG along the gap's mean gradient G gains η‖G‖² nats there, to first order, and costs ½η²·GᵀFG nats on the
    replay text, where F is the Fisher information (Kirkpatrick et al. 2017, arXiv:1612.00796), here the empirical one:
    GᵀFG = mean of ⟨g, G⟩² over the gradients g of single replay texts, blended with its isotropic part ‖G‖²·mean ‖g‖²/n
    because few texts leave most directions unseen. At the best η the net is ‖G‖⁴ / 2GᵀFG: that is a module's worth,
    gain per nat of forgetting, where a sensitivity as AdaLoRA's (arXiv:2303.10512) would be the gain alone.
    """

    def __init__(self, model: Any, tokenizer: Any, *, seed: int = 0) -> None:
        self._model, self._tokenizer, self._seed = model, tokenizer, seed
        self._shapes = linear_layers(model)

    def zones(self, gap: Sequence[Example], replay: Sequence[Example]) -> list[Zone]:
        """Every linear layer, the worthiest first; a few dozen examples of each will do. Raises `TrainingError`."""
        if not gap or not replay:
            raise TrainingError(f"expected examples of gap and replay, got {len(gap)} and {len(replay)}")
        gap_rows = encode_examples(self._model, self._tokenizer, gap)
        replay_rows = encode_examples(self._model, self._tokenizer, replay)
        with self._probing() as probe:
            wanted, gap_rms = probe.mean_gradients(gap_rows), probe.input_rms()
            worth = _worth(wanted, list(probe.gradients(replay_rows)))
            replay_rms = probe.input_rms()
        zones = [
            Zone(module=name, shape=shape, worth=worth[name], gap_rms=gap_rms[name], replay_rms=replay_rms[name])
            for name, shape in self._shapes.items()
        ]
        return sorted(zones, key=lambda zone: -zone.worth)

    @contextmanager
    def _probing(self) -> Iterator[_Probe]:
        tuning = FineTuning(rank=RANK, alpha=RANK, targets=tuple(self._shapes), seed=self._seed)
        adapted = attach(self._model, tuning, base_name="")
        try:
            with _Probe(adapted.eval(), self._shapes) as probe:
                yield probe
        finally:
            adapted.unload()


def hot_zones(zones: Sequence[Zone], share: float) -> list[Zone]:
    """The fewest zones that hold `share` of all worth, each by its worth per parameter."""
    ranked = sorted(zones, key=lambda zone: -zone.worth / zone.parameters_per_rank)
    wanted, total, hot = share * sum(zone.worth for zone in zones), 0.0, list[Zone]()
    for zone in ranked:
        if total >= wanted and hot:
            break
        hot.append(zone)
        total += zone.worth
    return hot


def hot_plan(zones: Sequence[Zone], *, budget_parameters: int, share: float = 0.5) -> Plan:
    """The hot zones, each at a rank by its worth. Raises `TrainingError` for a budget of less than one rank."""
    return _apportioned(hot_zones(zones, share), budget_parameters)


def plans(zones: Sequence[Zone], *, budget_parameters: int, share: float = 0.5) -> dict[Targets, Plan]:
    """Three plans under one budget: MLP-only, the default to beat, and all layers at one rank, and the hot zones.

    Raises `TrainingError` for a budget of less than one rank.
    """
    mlp = set(mlp_of(zone.module for zone in zones))
    return {
        "mlp": _uniform("mlp", [zone for zone in zones if zone.module in mlp], budget_parameters),
        "all": _uniform("all", zones, budget_parameters),
        "hot": hot_plan(zones, budget_parameters=budget_parameters, share=share),
    }


class _Probe:
    """A model with a fresh LoRA, its gradients, and what comes into its modules."""

    def __init__(self, adapted: Any, modules: Mapping[str, Any]) -> None:
        self._causal = adapted.get_base_model()
        self._layers = {name: self._causal.get_submodule(name) for name in modules}
        self._bs = {name: layer.lora_B["default"].weight for name, layer in self._layers.items()}
        self._squares: dict[str, list[float]] = {name: [] for name in modules}
        self._hooks = [layer.register_forward_pre_hook(self._watch(name)) for name, layer in self._layers.items()]

    def __enter__(self) -> _Probe:
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def gradients(self, rows: Sequence[Encoded]) -> Iterator[dict[str, Tensor]]:
        """Of each row's mean loss, by module: (d_out, rank)."""
        for row in rows:
            found = torch.autograd.grad(answer_loss(self._causal, [row]), list(self._bs.values()))
            yield dict(zip(self._bs, found, strict=True))

    def mean_gradients(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        """The mean of `gradients`."""
        totals = {name: torch.zeros_like(weight) for name, weight in self._bs.items()}
        for found in self.gradients(rows):
            for name, gradient in found.items():
                totals[name] += gradient / len(rows)
        return totals

    def input_rms(self) -> dict[str, float]:
        """Root mean square of what came into each module since the last call."""
        found = {name: (sum(kept) / len(kept)) ** 0.5 for name, kept in self._squares.items()}
        self._squares.update({name: [] for name in self._squares})
        return found

    def _watch(self, name: str) -> Any:
        def watch(_: Any, inputs: tuple[Tensor, ...]) -> None:
            self._squares[name].append(inputs[0].detach().float().square().mean().item())

        return watch


def _worth(wanted: Mapping[str, Tensor], replayed: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    worth = {}
    for name, direction in wanted.items():
        others = torch.stack([gradients[name] for gradients in replayed]).flatten(1).double()
        along = direction.flatten().double()
        squared = float(along.square().sum())
        fisher = float((others @ along).square().mean() + squared * others.square().mean())
        worth[name] = squared**2 / (2 * fisher) if fisher > 0 else 0.0
    return worth


def _uniform(name: Targets, zones: Sequence[Zone], budget: int) -> Plan:
    per_rank = sum(zone.parameters_per_rank for zone in zones)
    rank = min(MOST_RANK, budget // per_rank)
    if rank < 1:
        raise TrainingError(f"expected a budget of at least {per_rank} parameters for {name}, got {budget}")
    return Plan(name=name, ranks={zone.module: rank for zone in zones}, parameters=rank * per_rank)


def _apportioned(zones: Sequence[Zone], budget: int) -> Plan:
    """Each next rank to the zone with the most worth per parameter of the rank it would have (D'Hondt's method)."""
    ranks: dict[str, int] = {}
    spent = 0
    while open_ := [zone for zone in zones if _fits(zone, ranks, budget - spent)]:
        best = max(open_, key=lambda zone: zone.worth / zone.parameters_per_rank / (ranks.get(zone.module, 0) + 1))
        ranks[best.module] = ranks.get(best.module, 0) + 1
        spent += best.parameters_per_rank
    if not ranks:
        raise TrainingError(f"expected a budget that pays for one rank of a hot zone, got {budget}")
    return Plan(name="hot", ranks=ranks, parameters=spent)


def _fits(zone: Zone, ranks: Mapping[str, int], left: int) -> bool:
    return zone.parameters_per_rank <= left and ranks.get(zone.module, 0) < MOST_RANK


__all__ = ["WeightMapProbe", "Zone", "hot_plan", "hot_zones", "plans"]
