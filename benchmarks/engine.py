"""What adapters cost a forward pass: SmolLM2-135M, fp32, 32 rows, against the bare base and PEFT's `adapter_names`.

    python -m benchmarks.engine [--rounds 7] [--only decode|prefill|experts]

The prices that choose layouts are measured first, as `arrowmoe bench tune` does. Arms take turns within one process; a
figure is the median of ratios within a round. PEFT holds the same 32 adapters. Last, every token chooses two of the 32
at every module, with the gates of PEFT's Arrow model (`engine_experts`).
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from peft import PeftModel
from transformers import DynamicCache, PreTrainedModel

from arrowmoe.bench_commands import measured
from arrowmoe.lora import tuning
from arrowmoe.lora.costs import Prices
from arrowmoe.lora.manager import LoRAManager
from arrowmoe.routing.gates import Gates
from benchmarks.adapters import smollm2, write_adapters
from benchmarks.engine_experts import Experts
from benchmarks.harness import Arm, Target, Times, interleave, report
from registry.card import LoRACard

ROWS = 32
PREFILL_TOKENS = 32
CONTEXT_TOKENS = 32
COUNTS = (1, 4, 16, 32)
DECODE_BARS = {1: 1.07, 4: 1.08, 16: 1.18, 32: 1.18}
PREFILL_BARS = {1: 1.10, 32: 1.10}
PEFT_BARS = {"decode": 2.0, "prefill": 1.0}

Gating = Callable[[], AbstractContextManager[None]]


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rounds", type=int, default=7, help="of prefill and experts; decode, which is short, has 5 times as many"
    )
    parser.add_argument("--only", choices=("decode", "prefill", "experts"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, torch.inference_mode():
        run(Path(directory), options.rounds, options.only)


def run(directory: Path, rounds: int, only: str | None) -> None:
    """All arms over one set of 32 adapters."""
    base = smollm2()
    paths = write_adapters(base, directory, max(COUNTS))
    samples = measured(base, lambda *progress: None)
    prices = tuning.fit(samples)
    ours, manager, cards = with_cards(base.model, paths, prices)
    vocabulary = base.model.config.vocab_size
    prompt = torch.randint(10, vocabulary, (ROWS, PREFILL_TOKENS), generator=torch.Generator().manual_seed(0))
    targets: list[Target] = []
    figures: dict[str, dict[str, float]] = {"prices": asdict(prices) | {"regret": tuning.regret(samples, prices)}}
    if only != "experts":
        peft = with_peft(base.model, paths)
        check_equal(ours, peft, manager, cards, prompt)
        for name, step, bars, times in (("decode", decode_step, DECODE_BARS, 5), ("prefill", forward, PREFILL_BARS, 1)):
            if only in (None, name):
                found = interleave(arms(step, base.model, ours, peft, manager, cards, prompt), rounds=times * rounds)
                targets += ratio_targets(name, found, bars)
                figures |= ratio_figures(name, found)
        del peft
    if only in (None, "experts"):
        experts, peaks = Experts(base.model, ours, manager, cards, paths, prompt, prices).measure(rounds)
        targets += expert_targets(experts, peaks)
        figures |= expert_figures(experts, peaks)
    report("engine", "PEFT (adapter_names, Arrow) and the bare base model", targets, figures)


def with_cards(
    model: PreTrainedModel, paths: Sequence[Path], prices: Prices
) -> tuple[PreTrainedModel, LoRAManager, list[LoRACard]]:
    """A copy of the base with every adapter loaded from a card."""
    wrapped = copy.deepcopy(model)
    manager = LoRAManager(wrapped, prices=prices)
    cards = [LoRACard.from_peft(path) for path in paths]
    for card in cards:
        manager.apply_card(card)
    return wrapped, manager, cards


def with_peft(model: PreTrainedModel, paths: Sequence[Path]) -> PeftModel:
    """A copy of the base with every adapter loaded by PEFT."""
    wrapped = PeftModel.from_pretrained(copy.deepcopy(model), str(paths[0]), adapter_name="a0")
    for index, path in enumerate(paths[1:], start=1):
        wrapped.load_adapter(str(path), adapter_name=f"a{index}")
    return wrapped.eval()


def check_equal(
    ours: PreTrainedModel, peft: PeftModel, manager: LoRAManager, cards: Sequence[LoRACard], prompt: torch.Tensor
) -> None:
    """Both arms compute the same thing, or timing them would mean nothing."""
    rows = slice(0, 4)
    with manager.gated(gates(cards, 4, rows=4)):
        found = ours(prompt[rows]).logits
    expected = peft(prompt[rows], adapter_names=names(4, rows=4)).logits
    error = float((found - expected).norm() / expected.norm())
    if error > 1e-5:
        raise SystemExit(f"expected equal logits, got a relative error of {error:.2e}")


def arms(
    step: Callable[..., Arm],
    base: PreTrainedModel,
    ours: PreTrainedModel,
    peft: PeftModel,
    manager: LoRAManager,
    cards: Sequence[LoRACard],
    prompt: torch.Tensor,
) -> dict[str, Arm]:
    """The bare base; ours and PEFT with 1 to 32 distinct adapters in the batch."""
    found: dict[str, Arm] = {"base": step(base, prompt, nullcontext, {})}
    for count in COUNTS:
        plan = manager.plan(gates(cards, count))
        found[f"ours_{count}"] = step(ours, prompt, lambda plan=plan: manager.running(plan), {})
        if count in (1, 32):
            found[f"peft_{count}"] = step(peft, prompt, nullcontext, {"adapter_names": names(count)})
    return found


def decode_step(model: PreTrainedModel, prompt: torch.Tensor, gating: Gating, options: dict[str, object]) -> Arm:
    """One token for each row, after a context that is already in the cache.

    Adapters are laid out by the first step of all, which is not timed, as in a generation.
    """
    cache = DynamicCache(config=model.config)
    with gating():
        model(prompt[:, :CONTEXT_TOKENS], past_key_values=cache, use_cache=True, logits_to_keep=1, **options)

    def step() -> None:
        with gating():
            model(prompt[:, -1:], past_key_values=cache, use_cache=True, logits_to_keep=1, **options)
        cache.crop(-1)

    return step


def forward(model: PreTrainedModel, prompt: torch.Tensor, gating: Gating, options: dict[str, object]) -> Arm:
    """A whole prompt of 32 × 32 tokens."""

    def step() -> None:
        with gating():
            model(prompt, use_cache=False, logits_to_keep=1, **options)

    return step


def gates(cards: Sequence[LoRACard], count: int, rows: int = ROWS) -> Gates:
    """Row i uses adapter i modulo `count`."""
    return Gates.of(
        [{cards[row % count].digest: 1.0} for row in range(rows)], {card.digest: card.name for card in cards}
    )


def names(count: int, rows: int = ROWS) -> list[str]:
    """The same choice in PEFT's words."""
    return [f"a{row % count}" for row in range(rows)]


def ratio_targets(name: str, times: Times, bars: Mapping[int, float]) -> list[Target]:
    """Against the bare base, and PEFT as the peer."""
    against_base = [
        Target(name=f"{name}, {count} adapters / base", value=times.ratio(f"ours_{count}", "base"), op="<=", bar=bar)
        for count, bar in bars.items()
    ]
    peft = Target(
        name=f"{name}, 32 adapters: PEFT / ours",
        value=times.ratio("peft_32", "ours_32"),
        op=">=",
        bar=PEFT_BARS[name],
    )
    return [*against_base, peft]


def expert_targets(times: Times, peaks: Mapping[str, int]) -> list[Target]:
    """Against PEFT's Arrow model: a forward pass, and the memory that it takes above the bare base's."""
    ours, peft = (max(peaks[name] - peaks["base"], 0) for name in ("ours", "peft"))
    return [
        Target(name="top-2 of 32: PEFT Arrow / ours", value=times.ratio("peft", "ours"), op=">=", bar=3.0),
        Target(name="top-2 of 32, peak above base: ours / PEFT", value=ours / peft, op="<=", bar=0.25),
    ]


def expert_figures(times: Times, peaks: Mapping[str, int]) -> dict[str, dict[str, float]]:
    """Milliseconds (median), ratio to the base and MB of the peak of every arm."""
    return {
        "experts_ms": {arm: round(1000 * times.median(arm), 1) for arm in times.seconds},
        "experts_ratio_to_base": {arm: round(times.ratio(arm, "base"), 3) for arm in times.seconds},
        "experts_peak_mb": {arm: round(peak / 1e6, 1) for arm, peak in peaks.items()},
    }


def ratio_figures(name: str, times: Times) -> dict[str, dict[str, float]]:
    """Milliseconds (median) and ratio to the base of every arm."""
    return {
        f"{name}_ms": {arm: round(1000 * times.median(arm), 1) for arm in times.seconds},
        f"{name}_ratio_to_base": {arm: round(times.ratio(arm, "base"), 3) for arm in times.seconds},
    }


if __name__ == "__main__":
    main()
