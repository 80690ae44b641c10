"""A tiny model with adapters under a scheduler whose clock goes by forward passes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel

from arrowmoe.base_model import BaseModel
from arrowmoe.batching import Batching, BatchLimits
from arrowmoe.generation import Chunk, Generation, Prompt, Sampling
from arrowmoe.lora.manager import LoRAManager
from registry.card import LoRACard
from tests.arrowmoe.causal_models import greedy
from tests.arrowmoe.tiny import base
from tests.peft_models import load_peft, make_peft, tiny_llama

LONG = "w5 w9 w12 w7 w33 w21 w4 w60 w18 w11 w42 w3"


@dataclass(kw_only=True)
class Bench:
    """A tiny model with adapters; every forward pass takes a second, and its (rows, tokens) are in `passes`."""

    tiny: BaseModel
    plain: PreTrainedModel
    manager: LoRAManager
    limits: BatchLimits
    cards: list[LoRACard] = field(default_factory=list)
    adapted: list[torch.nn.Module] = field(default_factory=list)
    passes: list[tuple[int, int]] = field(default_factory=list)
    now_s: float = 0.0

    def __post_init__(self) -> None:
        manager = self.manager
        self.batching = Batching(
            self.tiny, plan=manager.plan, running=manager.running, limits=self.limits, now=lambda: self.now_s
        )
        self.tiny.model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, model: torch.nn.Module, args: object, given: Mapping[str, torch.Tensor]) -> None:
        self.passes.append(tuple(given["input_ids"].shape))
        self.now_s += 1

    def stream(
        self,
        prompt: Prompt = "w5 w9",
        adapter: int | None = None,
        *,
        timeout_s: float | None = None,
        **sampling: object,
    ) -> Iterator[Chunk]:
        """One row, with an adapter by its number."""
        settings = Sampling(**{"max_new_tokens": 6, **sampling})
        return self.batching.generate([prompt], [self.weights(adapter)], settings, timeout_s=timeout_s)

    def call(self, rows: Sequence[tuple[str, int | None]], new_tokens: int) -> Iterator[Chunk]:
        prompts, adapters = [prompt for prompt, _ in rows], [self.weights(adapter) for _, adapter in rows]
        return self.batching.generate(prompts, adapters, Sampling(max_new_tokens=new_tokens))

    def weights(self, adapter: int | None) -> dict[str, float]:
        return {} if adapter is None else {self.cards[adapter].digest: 1.0}

    def alone(self, prompt: str, adapter: int | None, new_tokens: int) -> list[int]:
        """What PEFT and transformers answer to it."""
        model = self.plain if adapter is None else self.adapted[adapter]
        return greedy(model, self.tiny, prompt, new_tokens)


def bench(make: Callable[[], PreTrainedModel] = tiny_llama, path: Path | None = None, **limits: int) -> Bench:
    """Three adapters of ranks 2, 5 and 16, if there is a `path` to keep them in."""
    torch.manual_seed(0)
    model = make()
    plain = make_again(model)
    manager = LoRAManager(model)
    made = Bench(tiny=base(model), plain=plain, manager=manager, limits=BatchLimits(**{"prompt_tokens": 4, **limits}))
    for seed, rank in enumerate((2, 5, 16) if path else ()):
        directory = make_peft(plain, path / f"a{seed}", seed=seed, r=rank)
        made.adapted.append(load_peft(plain, directory))
        made.cards.append(LoRACard.from_peft(directory))
        manager.apply_card(made.cards[-1])
    return made


def make_again(model: PreTrainedModel) -> PreTrainedModel:
    again = type(model)(model.config).eval()
    again.load_state_dict(model.state_dict())
    return again


@contextmanager
def no_collector() -> Iterator[None]:
    """What goes within goes with its last reference."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def finished(stream: Iterator[Chunk]) -> Generation:
    *_, last = stream
    assert last.generation is not None
    return last.generation
