"""How an expert is grown: what is asked of the teacher, how it is trained, what it is held to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from evolution.anchors import anchors
from evolution.errors import JobError
from evolution.examples import Limits
from evolution.gate import Bars
from evolution.protocols import Example, Kind
from evolution.training_job import FineTuning, Targets

_ENCODER: Final = FineTuning(targets=("query", "value"), learning_rate=5e-4, steps=60, batch_size=32)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How an expert is grown.

    `asks_prompts` gives the gap's own prompts to the teacher, else the teacher writes examples from the theme; at most
    `most_examples` are gathered, and a teacher that gives more than `most_same` of them one answer is not believed. Of
    them `held_out_share` is for the exam alone, at least `least_held_out`. A training that lifts but drifts is repeated
    once with `more_replay`. `sealed` is never asked of a teacher, nor trained on, and neither are anchors.

    `targets` says where a causal model is adapted, so that `tuning` names no modules: in its MLPs, in all linear layers
    of its blocks, or where a probe finds that it gains most, for what its MLPs would have cost. Raises `JobError`.
    """

    tuning: FineTuning = field(default_factory=FineTuning)
    encoder_tuning: FineTuning = _ENCODER
    targets: Targets = "mlp"
    asks_prompts: bool = False
    writes: bool = True
    most_examples: int = 240
    least_examples: int = 40
    most_same: float = 0.9
    held_out_share: float = 0.25
    least_held_out: int = 24
    validation_share: float = 0.1
    replay_share: float = 0.25
    more_replay: float = 1.0
    max_new_tokens: int = 32
    precision: str = "float32"
    seed: int = 0
    limits: Limits = field(default_factory=Limits)
    anchors: Mapping[str, tuple[Example, ...]] | None = None
    encoder_anchors: Mapping[str, tuple[Example, ...]] = field(default_factory=dict)
    sealed: tuple[Example, ...] = ()
    bars: Bars = field(default_factory=lambda: Bars(alpha=0.05))

    def __post_init__(self) -> None:
        if not isinstance(self.tuning.targets, str):
            raise JobError(f"expected a recipe's targets to be mlp, all or hot, got modules {self.tuning.targets}")
        if self.targets == "hot" and min(self.replay_share, self.more_replay) <= 0:
            raise JobError("expected replay with hot targets, got none, so nothing says what is forgotten")

    def anchors_of(self, kind: Kind) -> Mapping[str, tuple[Example, ...]]:
        """What an expert for a base of this kind must not unlearn, by name."""
        if kind == "encoder":
            return self.encoder_anchors
        return anchors() if self.anchors is None else self.anchors


__all__ = ["Recipe"]
