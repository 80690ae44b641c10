"""What is no prompt and no adapter is refused in words, before anything is computed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from arrowmoe.arguments import listed, per_row, prompt_text, strings
from arrowmoe.errors import GateError, PromptError


@pytest.mark.parametrize(
    ("prompt", "why"),
    [
        (None, "got None"),
        (5, "type int"),
        (b"w5", "type bytes"),
        (["w5"], "role and content, both strings, got 'w5'"),
        ([{"role": "user"}], "both strings"),
        ([{"content": "w5"}], "both strings"),
        ([{"role": "user", "content": None}], "both strings"),
        ({"role": "user", "content": "w5"}, "one message"),
        ([], "at least one message"),
        ([{"role": "system", "content": "w5"}], "role 'user'"),
    ],
)
def test_what_is_no_prompt_is_refused(prompt: Any, why: str) -> None:
    with pytest.raises(PromptError, match=why):
        prompt_text(prompt)


def test_of_messages_the_last_of_a_user_is_read_whatever_others_hold() -> None:
    said = [
        {"role": "user", "content": "w5"},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "w6"},
        {"role": "tool"},
    ]
    assert prompt_text(said) == "w6"


@pytest.mark.parametrize("given", [None, 5, b"w5", {"w5": 1}, {"w5"}, "w5"], ids=repr)
def test_what_is_no_list_is_refused(given: Any) -> None:
    with pytest.raises(PromptError, match="expected a list of prompts, got"):
        listed("prompts", given)


@pytest.mark.parametrize("given", [("w5", "w6"), np.array(["w5", "w6"]), iter(["w5", "w6"])])
def test_what_can_be_listed_in_order_is(given: Any) -> None:
    assert strings("texts", given) == ["w5", "w6"]


@pytest.mark.parametrize("text", [None, 5, b"w5", [{"role": "user", "content": "w5"}]], ids=repr)
def test_texts_are_strings(text: Any) -> None:
    with pytest.raises(PromptError, match="expected texts as strings, got"):
        strings("texts", ["w5", text])


@pytest.mark.parametrize(
    ("adapter", "why"),
    [
        (5, "type int"),
        (True, "type bool"),
        (b"a", "type bytes"),
        ({"a"}, "type set"),
        ([5], "type int"),
        ([["a"]], "type list"),
        ({"a": "1"}, "finite numbers as weights, got '1'"),
        ({"a": None}, "got None"),
        ({"a": float("nan")}, "got nan"),
        ([{"a": 10**400}], "finite numbers"),
        (["a", "a"], r"one adapter per row \(1\), got 2"),
    ],
    ids=repr,
)
def test_what_is_no_adapter_is_refused(adapter: Any, why: str) -> None:
    with pytest.raises(GateError, match=why):
        per_row(adapter, 1)


def test_adapters_are_names_mixtures_none_or_one_of_these_per_row() -> None:
    assert per_row("a", 2) == [{"a": 1.0}] * 2
    assert per_row((None, "a", {"b": np.float32(0.5)}), 3) == [{}, {"a": 1.0}, {"b": 0.5}]
