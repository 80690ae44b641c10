"""Top-2 of 32 experts, chosen by every token at every module: ours against PEFT's Arrow model, with the same gates.

PEFT computes its gates from each module's input; ours are given those, read off PEFT's run. What PEFT needs for them (a
product with 32 prototypes and a top-k) is part of its time, some 5 % of what it computes for the experts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora.arrow import ArrowLoraLinearLayer, create_arrow_model
from peft.tuners.lora.config import ArrowConfig
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from arrowmoe.lora.costs import Prices
from arrowmoe.lora.manager import LoRAManager
from arrowmoe.lora.plan import Plan
from benchmarks.harness import Arm, Times, interleave
from registry.card import LoRACard

TOP_K = 2
TOLERANCE = 1e-4


class Experts:
    """Both models over the same adapters, and the plan of one prompt (rows, tokens)."""

    def __init__(
        self,
        base: PreTrainedModel,
        ours: PreTrainedModel,
        manager: LoRAManager,
        cards: Sequence[LoRACard],
        paths: Sequence[Path],
        prompt: Tensor,
        prices: Prices,
    ) -> None:
        self._prompt = prompt
        self._base, self._ours, self._manager = base, ours, manager
        self._peft = arrow_model(base, paths)
        gates = gates_of(self._peft, prompt)
        idle = torch.zeros((len(prompt), len(cards)))
        self._plan = Plan(tuple(card.digest for card in cards), idle, layers=gates, prices=prices)
        self._check_equal()

    def measure(self, rounds: int) -> tuple[Times, dict[str, int]]:
        """Seconds of a forward pass, and the most bytes that it holds at once, for base, ours and PEFT."""
        arms = {"base": self._forward(self._base), "ours": self._mixed(), "peft": self._forward(self._peft)}
        return interleave(arms, rounds=rounds), {name: peak_bytes(arm) for name, arm in arms.items()}

    def _forward(self, model: nn.Module) -> Arm:
        return lambda: model(input_ids=self._prompt, use_cache=False, logits_to_keep=1).logits

    def _mixed(self) -> Arm:
        forward = self._forward(self._ours)

        def step() -> object:
            with self._manager.running(self._plan):
                return forward()

        return step

    def _check_equal(self) -> None:
        found, expected = self._mixed()(), self._forward(self._peft)()
        assert isinstance(found, Tensor)
        assert isinstance(expected, Tensor)
        error = float((found - expected).norm() / expected.norm())
        if error > TOLERANCE:
            raise SystemExit(f"expected equal logits of ours and PEFT's Arrow, got a relative error of {error:.2e}")


def arrow_model(base: PreTrainedModel, paths: Sequence[Path]) -> PeftModel:
    """PEFT's Arrow router over the adapters, in eval mode."""
    config = ArrowConfig(top_k=TOP_K, router_temperature=1.0)
    return create_arrow_model(copy.deepcopy(base), [str(path) for path in paths], arrow_config=config).eval()


def gates_of(model: PeftModel, prompt: Tensor) -> dict[str, Tensor]:
    """The gates (rows, tokens, experts) that PEFT's Arrow uses at each module, by module path."""
    found: dict[str, Tensor] = {}
    model(input_ids=prompt, use_cache=False, logits_to_keep=1)  # works out the prototypes
    hooks = [
        module.register_forward_pre_hook(_noting(path, found))
        for name, module in model.named_modules()
        if isinstance(module, ArrowLoraLinearLayer)
        for path in [name.removeprefix("base_model.model.").partition(".lora_arrow")[0]]
    ]
    model(input_ids=prompt, use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    return found


def peak_bytes(arm: Arm) -> int:
    """The most bytes that a call holds at once of what it allocates itself."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        arm()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _noting(path: str, found: dict[str, Tensor]) -> Callable[[ArrowLoraLinearLayer, tuple[Tensor, ...]], None]:
    """A hook that writes down the gates of one module, by the formula of its forward pass."""

    def hook(module: ArrowLoraLinearLayer, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        scores = (x @ module.prototypes.T).abs()
        best, experts = scores.topk(module.top_k, dim=-1)
        weights = torch.softmax(best / module.temperature, dim=-1)
        found[path] = torch.zeros_like(scores).scatter(-1, experts, weights)

    return hook
