"""The benchmark of the nights: what is asked holds what it says, and its measures are those of plain formulas."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from arrowmoe.generation import Generation
from benchmarks.night_measures import compared, purity, right
from benchmarks.night_tasks import (
    DOMAIN,
    INTENT_FORM,
    PER_INTENT,
    TEST_PER_INTENT,
    TOWNS,
    Family,
    around,
    dates,
    facts,
    intents,
)
from benchmarks.routing_adapters import DataMissingError
from evolution.examples import normalised
from evolution.protocols import Example

INTENTS = ("book_flight", "car_rental")


@pytest.fixture
def clinc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small file of the form of CLINC150."""
    rows = {
        split: [[f"{split} {intent} {at}", intent] for at in range(30) for intent in (*INTENTS, "greeting")]
        for split in ("train", "test")
    }
    oos = {"oos_test": [[f"stray {at}", "oos"] for at in range(80)]}
    (tmp_path / "clinc150_data_full.json").write_text(json.dumps(rows | oos))
    (tmp_path / "clinc150_domains.json").write_text(json.dumps({DOMAIN: INTENTS, "small_talk": ["greeting"]}))
    monkeypatch.setenv("ARROWMOE_DATA", str(tmp_path))
    return tmp_path


@pytest.mark.usefixtures("clinc")
@pytest.mark.parametrize("make", [intents, facts, dates])
def test_no_test_item_is_in_the_traffic(make: type[Family]) -> None:
    family = make()
    asked = {normalised(one.prompt) for one in family.traffic}
    assert len(asked) == len(family.traffic) >= 30
    assert family.test
    assert asked.isdisjoint(normalised(one.prompt) for one in family.test)


@pytest.mark.usefixtures("clinc")
def test_intents_are_of_one_domain_in_like_parts() -> None:
    family = intents()
    first = family.traffic[0]
    assert first.prompt.startswith(INTENT_FORM.format(text="train book_flight"))
    assert first.answer == "book flight"
    answers = [one.answer for one in family.traffic]
    assert {name: answers.count(name) for name in answers} == {"book flight": PER_INTENT, "car rental": PER_INTENT}
    assert len(family.test) == TEST_PER_INTENT * len(INTENTS)


def test_every_fact_that_is_tested_was_told() -> None:
    family = facts()
    founder_of = {one.prompt.rstrip("?").split()[-1]: one.answer for one in family.traffic[:TOWNS]}
    assert len(founder_of) == len(set(founder_of.values())) == TOWNS
    for one in (*family.traffic, *family.test):
        [town] = founder_of.keys() & set(one.prompt.rstrip("?.").split())
        assert one.answer == founder_of[town]


def test_dates_are_days_and_tested_ones_are_new() -> None:
    family = dates()
    days = {date.fromisoformat(one.answer) for one in family.traffic}
    assert days.isdisjoint(date.fromisoformat(one.answer) for one in family.test)


@pytest.mark.usefixtures("clinc")
def test_stray_requests_are_all_different() -> None:
    other = around()
    assert len(set(other.stray)) == len(other.stray)
    assert len({one.prompt for one in other.covered}) == len(other.covered)


def test_missing_data_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARROWMOE_DATA", str(tmp_path))
    with pytest.raises(DataMissingError, match="clinc150"):
        intents()


def test_purity_is_one_for_whole_families_and_less_where_they_are_mixed() -> None:
    whole = [("1/0", "facts")] * 5 + [("2/0", "dates")] * 5
    assert purity(whole) == 1.0
    assert purity([*whole[:4], ("2/0", "facts"), *whole[5:]]) < 0.8


def test_a_comparison_is_an_exact_test_of_what_differs() -> None:
    before, after = np.array([True, False, False, False, True]), np.array([True, True, True, True, False])
    found = compared(after, before)
    assert found["after"] == pytest.approx(80.0)
    assert found["before"] == pytest.approx(40.0)
    assert found["p_value"] == pytest.approx(binomtest(3, 4, 0.5, alternative="greater").pvalue)


def test_an_answer_is_right_whatever_its_case_and_full_stop() -> None:
    items = [Example(prompt="a", answer="Orla Venn"), Example(prompt="b", answer="2020-01-02")]
    made = [_said("orla venn."), _said("2020-01-03")]
    assert right(items, made).tolist() == [True, False]


def _said(text: str) -> Generation:
    return Generation(text=text, tokens=(1,), prompt_tokens=1, logprob_nats=0.0, finish_reason="eos")
