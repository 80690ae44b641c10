"""Stages 1 and 2 of a head on SmolLM2's own hidden state, through six real adapters; and a collapse that is planted.

Stage 1 sees few prompts, so that there is something left for the task loss to teach.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from arrowmoe.base_model import BaseModel
from arrowmoe.lora.manager import LoRAManager
from arrowmoe.routing.balance import CollapseMonitor
from arrowmoe.routing.dataset import RoutingExample
from arrowmoe.routing.heads import HeadConfig, RouterHead
from arrowmoe.routing.hidden import HiddenFeaturizer
from arrowmoe.routing.mixed import MultiLoRAWithRouter
from arrowmoe.routing.training import IGNORED, BalancedSampler, Batch, Stage1, Stage2, train_stage1, train_stage2
from benchmarks.routing_adapters import Expert, prompt_of

FEATURE_ROWS = 64

Logits = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Prompts of each card that Stage 1 sees (`shots`) and that validate, batches, and the stages' own settings.

    Stage 2 trains on prompts of at most `longest` characters, for a batch computes all rows to the length of one.
    """

    layer: int = 4
    shots: int = 10
    validation: int = 6
    batch_size: int = 12
    longest: int = 48
    stage1: Stage1 = field(default_factory=lambda: Stage1(steps=200, validation_share=0.2))
    stage2: Stage2 = field(
        default_factory=lambda: Stage2(learning_rate=3e-5, steps=24, entropy_weight=0.03, kl_weight=0.1, look_every=8)
    )
    planted: float = 16.0
    rescue: Stage2 = field(
        default_factory=lambda: Stage2(learning_rate=1e-3, steps=40, entropy_weight=0.4, balance_weight=1.25)
    )


STAGES = Settings()


@dataclass(frozen=True, kw_only=True, eq=False)
class Staged:
    """Logits (rows, cards) of the asked prompts by name: of heads after each stage, and around a planted collapse."""

    logits: dict[str, Logits]
    collapse: dict[str, Logits]


def staged(base: BaseModel, experts: Sequence[Expert], prompts: Sequence[str], settings: Settings = STAGES) -> Staged:
    """Train through `base`, which is left without adapters, as it was."""
    manager = LoRAManager(base.model)
    try:
        lab = _Lab(base, experts, prompts, settings, manager)
        return Staged(logits=lab.stages(), collapse=lab.collapse())
    finally:
        for expert in experts:
            manager.remove_card(expert.card.digest)


class _Lab:
    def __init__(
        self,
        base: BaseModel,
        experts: Sequence[Expert],
        prompts: Sequence[str],
        settings: Settings,
        manager: LoRAManager,
    ) -> None:
        self._base, self._experts, self._settings, self._manager = base, experts, settings, manager
        self._featurizer = HiddenFeaturizer(base, layer=settings.layer)
        self._asked = self._features(prompts)
        self._train = [row for expert in experts for row in expert.train if len(row.text) <= settings.longest]
        shots = [row for expert in experts for row in _some(expert.train, settings.shots)]
        self._shots, self._labels = self._features([prompt_of(row) for row in shots]), self._columns(shots)
        held = [row for expert in experts for row in _some(expert.val, settings.validation)]
        held.sort(key=lambda row: len(row.text))
        size = settings.batch_size
        self._validation = [batch_of(base, held[start : start + size]) for start in range(0, len(held), size)]

    def stages(self) -> dict[str, Logits]:
        """Stage 1, Stage 2 from there, and Stage 2 without its terms."""
        stage2 = self._settings.stage2
        variants = {
            "Stage 2": stage2,
            "Stage 2 without KL": replace(stage2, kl_weight=0.0),
            "Stage 2 without entropy": replace(stage2, entropy_weight=0.0),
        }
        return {"Stage 1": self._logits(self._stage1())} | {
            name: self._logits(self._stage2(self._stage1(), own)) for name, own in variants.items()
        }

    def collapse(self) -> dict[str, Logits]:
        """A head that gives everything to the first card, before Stage 2, after it, and after it with the term."""
        rescue = self._settings.rescue
        variants = {"unbalanced": replace(rescue, balance_weight=0.0), "balanced": rescue}
        return {"planted": self._logits(self._planted())} | {
            name: self._logits(self._stage2(self._planted(), own, validate=False)) for name, own in variants.items()
        }

    def _stage1(self) -> RouterHead:
        """The same head each time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._settings.stage1.seed)
            head = RouterHead(HeadConfig(d_hidden=self._shots.shape[1], n_cards=len(self._experts)))
        train_stage1(head, self._shots, self._labels, settings=self._settings.stage1)
        return head

    def _stage2(self, head: RouterHead, settings: Stage2, *, validate: bool = True) -> RouterHead:
        cards = [expert.card for expert in self._experts]
        mixed = MultiLoRAWithRouter(self._base, cards, head, self._featurizer, manager=self._manager)
        train_stage2(
            mixed,
            self._batches(settings.seed),
            validation=self._validation if validate else (),
            settings=settings,
            monitor=CollapseMonitor(most=0.7),
        )
        return head

    def _planted(self) -> RouterHead:
        head = self._stage1()
        with torch.no_grad():
            head.output.bias[0] += self._settings.planted
        return head

    def _batches(self, seed: int) -> Iterator[Batch]:
        sampler = BalancedSampler(self._columns(self._train).tolist(), self._settings.batch_size, seed=seed)
        return (batch_of(self._base, [self._train[at] for at in picked]) for picked in sampler)

    def _columns(self, rows: Sequence[RoutingExample]) -> Tensor:
        names = [expert.card.name for expert in self._experts]
        return torch.tensor([names.index(str(row.card)) for row in rows])

    def _features(self, prompts: Sequence[str]) -> Tensor:
        starts = range(0, len(prompts), FEATURE_ROWS)
        batches = [self._featurizer.features(prompts[start : start + FEATURE_ROWS]).vectors for start in starts]
        return torch.from_numpy(np.concatenate(batches))

    def _logits(self, head: RouterHead) -> Logits:
        with torch.no_grad():
            logits: Logits = head(self._asked).double().numpy()
        return logits


def batch_of(base: BaseModel, rows: Sequence[RoutingExample]) -> Batch:
    """Prompts with their answers; labels stand on the answer and the end token."""
    prompts = [base.tokenizer(prompt_of(row))["input_ids"] for row in rows]
    answers = [base.tokenizer(f" {row.answer}", add_special_tokens=False)["input_ids"] for row in rows]
    end = [base.tokenizer.eos_token_id]
    pairs = [(prompt, [*answer, *end]) for prompt, answer in zip(prompts, answers, strict=True)]
    return Batch(
        input_ids=_padded([[*prompt, *answer] for prompt, answer in pairs], 0),
        attention_mask=_padded([[1] * len([*chain(*pair)]) for pair in pairs], 0),
        labels=_padded([[IGNORED] * len(prompt) + answer for prompt, answer in pairs], IGNORED),
    )


def _padded(rows: Sequence[Sequence[int]], filler: int) -> Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=filler)


def _some(rows: Sequence[RoutingExample], count: int, seed: int = 0) -> list[RoutingExample]:
    return random.Random(seed).sample(rows, count)
