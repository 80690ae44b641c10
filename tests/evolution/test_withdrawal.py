"""Taking an expert back: only on verdicts that chance does not explain, and then wholly."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from scipy.stats import binom

from evolution.signals import Signal
from evolution.survey import PUBLISHED
from evolution.withdrawal import WITHDRAWN, Withdrawer, Withdrawing, regression
from tests.evolution.nights import BASE, TWO_O_CLOCK, Home, adapters, home_at, prompts


@pytest.fixture
def home(tmp_path: Path, empty_home: Path) -> Iterator[Home]:
    shutil.copytree(empty_home, tmp_path / "home")
    made = home_at(tmp_path / "home", adapters(tmp_path / "adapters"))
    made.traffic()
    made.factory.night(TWO_O_CLOCK)
    assert made.published() == ["question-velmora@1"]
    yield made
    made.registry.close()


def judged(home: Home, good: int, bad: int) -> None:
    card = home.registry.get("question-velmora").digest
    names = prompts(good + bad, first=500)
    home.signals.record_all(
        [
            Signal(base=BASE, prompt=one, accepted=True, card=card, feedback="good" if at < good else "bad")
            for at, one in enumerate(names)
        ]
    )


@pytest.mark.parametrize(("good", "bad"), [(0, 7), (1, 7), (6, 6), (8, 2), (20, 11), (0, 8)])
def test_the_test_is_binomial(good: int, bad: int) -> None:
    signals = [Signal(base=BASE, prompt="p", accepted=True, feedback=one) for one in ["good"] * good + ["bad"] * bad]
    unjudged = [Signal(base=BASE, prompt="p", accepted=True)] * 50
    found = regression([*signals, *unjudged], Withdrawing())
    tail = float(binom.sf(bad - 1, good + bad, 0.3))
    if good + bad < 8 or tail > 0.01:
        assert found is None
    else:
        assert found is not None
        assert (found.bad, found.verdicts) == (bad, good + bad)
        assert found.p_value == pytest.approx(tail)


def test_one_bad_day_takes_nothing_back(home: Home) -> None:
    judged(home, good=6, bad=4)
    assert Withdrawer(home.registry, home.journal, home.signals).withdraw(BASE) == ()
    assert home.published() == ["question-velmora@1"]


def test_an_expert_that_people_find_bad_leaves_with_its_reason(home: Home) -> None:
    judged(home, good=2, bad=10)
    withdrawer = Withdrawer(home.registry, home.journal, home.signals)
    assert withdrawer.withdraw("another/base") == ()
    assert withdrawer.withdraw(BASE) == ("question-velmora",)
    assert home.published() == []
    [gap] = home.journal.gaps()
    assert gap.state == WITHDRAWN
    assert "10 of 12 judged answers were bad" in gap.why
    assert home.signals.counts()[BASE].queued == 90 + 12, "its prompts are queued again"
    assert withdrawer.withdraw(BASE) == ()


def test_one_that_somebody_removed_is_only_noted(home: Home) -> None:
    judged(home, good=0, bad=12)
    home.registry.remove("question-velmora")
    assert Withdrawer(home.registry, home.journal, home.signals).withdraw(BASE) == ("question-velmora",)
    assert home.journal.gaps(state=PUBLISHED) == []
