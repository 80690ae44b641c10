"""Prices fitted to what was measured, by a clock that is not this machine's."""

from __future__ import annotations

from dataclasses import astuple, replace
from itertools import count

import pytest
import torch

from arrowmoe.lora import tuning
from arrowmoe.lora.costs import LAYOUTS, Prices
from arrowmoe.lora.tuning import Sample, fit, measure, regret, trials

TRUE = Prices(operation=4e-6, read=2e-10, multiply=3e-11, multiply_batched=5e-11, move=1e-10)
CPU = torch.device("cpu")


@pytest.fixture
def samples(monkeypatch: pytest.MonkeyPatch) -> list[Sample]:
    """Every trial, taking just as long as `TRUE` says."""
    monkeypatch.setattr(tuning, "MAX_MODULES", 2)
    ticks = count()
    found = [sample for trial in trials([(6, 10)]) for sample in measure(trial, CPU, torch.float32, ticks.__next__)]
    return [replace(sample, seconds=sample.work.seconds(TRUE)) for sample in found]


def test_every_layout_of_every_trial_is_measured(samples: list[Sample]) -> None:
    assert len(samples) == 3 * len(trials([(6, 10)]))
    assert {sample.layout for sample in samples} == set(LAYOUTS)


def test_a_trials_seconds_are_those_of_one_module() -> None:
    trial = trials([(6, 10)])[0]
    ticks = count()
    found = measure(trial, CPU, torch.float32, ticks.__next__)
    assert {sample.seconds for sample in found} == {1 / tuning.MAX_MODULES}, "a round of all modules took one tick"


def test_prices_are_found_again_from_what_they_cost(samples: list[Sample]) -> None:
    assert astuple(fit(samples)) == pytest.approx(astuple(TRUE), rel=1e-6)


def test_no_price_is_negative(samples: list[Sample]) -> None:
    odd = [replace(sample, seconds=1.0 / (1 + sample.work.multiply)) for sample in samples]
    assert min(astuple(fit(odd))) >= 0


def test_regret_is_zero_for_the_true_prices_and_not_for_wrong_ones(samples: list[Sample]) -> None:
    assert regret(samples, TRUE) == pytest.approx(0)
    assert regret(samples, replace(TRUE, operation=1.0)) > 0.01
