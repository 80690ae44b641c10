"""Measuring this machine for the engine: what `arrowmoe bench tune` does, and what an engine is given of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from arrowmoe.base_model import BaseModel, load_base_model
from arrowmoe.lora import tuning
from arrowmoe.lora.costs import Prices, keep_prices, prices_of
from arrowmoe.lora.layer import shape_of
from arrowmoe.settings import Settings

Progress = Callable[[str, int, int], None]


def prices(settings: Settings, base: BaseModel) -> Prices:
    """What was measured for the device and dtype of `base`, else the default."""
    return prices_of(settings.cache_dir, base.device, base.dtype)


def tune(
    settings: Settings, model: str, on_progress: Progress, clock: tuning.Clock = time.perf_counter
) -> dict[str, Any]:
    """Measure the gated sum at the sizes of `model`'s maps and keep the prices for its device and dtype.

    `regret` is how much longer the chosen layouts took than the fastest ones, in the mean over trials; `regret_before`
    with the prices that were in use. Raises `ModelLoadError`.
    """
    base = load_base_model(model, device=settings.device, dtype=settings.dtype, cache=settings.cache_dir)
    samples = measured(base, on_progress, clock)
    found, before = tuning.fit(samples), prices(settings, base)
    return {
        "device": str(base.device),
        "dtype": str(base.dtype).removeprefix("torch."),
        "prices": asdict(found),
        "regret": tuning.regret(samples, found),
        "regret_before": tuning.regret(samples, before),
        "path": str(keep_prices(settings.cache_dir, base.device, base.dtype, found)),
    }


def measured(base: BaseModel, on_progress: Progress, clock: tuning.Clock = time.perf_counter) -> list[tuning.Sample]:
    """Every layout in the trials for the sizes of `base`'s maps, on its device."""
    trials = tuning.trials(sizes_of(base.model))
    samples: list[tuning.Sample] = []
    for done, trial in enumerate(trials):
        on_progress("measuring", done, len(trials))
        samples += tuning.measure(trial, base.device, base.dtype, clock)
    return samples


def sizes_of(model: PreTrainedModel) -> list[tuple[int, int]]:
    """(d_in, d_out) of the smallest and the largest linear map inside the model, without its output layer."""
    maps = [
        module for name, module in model.named_modules() if name != "lm_head" and not isinstance(module, nn.Embedding)
    ]
    shapes = sorted({shape for module in maps if (shape := shape_of(module)) is not None}, key=sum)
    return list(dict.fromkeys([shapes[0], shapes[-1]]))
