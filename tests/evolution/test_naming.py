"""Names of gaps: telling words, a name that a card may have, and nothing that one prompt alone says."""

from __future__ import annotations

import math
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from evolution.naming import SHARED_BY, UNNAMED, key_terms, name_gap, slug
from registry.manifest import CardName

DATES = [f"Write the date in ISO format: {month} {day}" for month, day in zip("abcdefghijkl", range(12), strict=True)]
DATES += ["write 3 May in iso form", "Which iso date is that?"]
OTHERS = ["write a poem about rain", "the rain in spain", "how is the weather", "write to my bank"] * 2


def test_a_name_tells_what_the_gap_is_about() -> None:
    theme = name_gap(DATES, OTHERS, labels=["a", "b"])
    assert set(theme.terms) == {"iso", "date", "format", "write"}
    assert theme.terms[-1] == "write"  # the others say it too
    assert theme.name == "-".join(sorted(theme.terms[:3]))
    assert all(term in theme.description for term in theme.terms)
    assert theme.labels == ("a", "b")


def test_terms_are_ranked_by_the_plain_formula() -> None:
    prompts = ["boil rice now", "boil rice twice", "boil noodles here", "rice boil", "noodles noodles noodles"]
    others = ["rice field", "rice price", "green field"]
    counts = {"boil": (4, 0), "rice": (3, 2), "noodles": (4, 0)}
    words = 2 + 3 + 2 + 2 + 3, 6  # "now" and "here" carry nothing
    weights = {word: here * math.log(1 + sum(words) / 2 / (here + there)) for word, (here, there) in counts.items()}
    assert weights["boil"] == weights["noodles"] > weights["rice"]
    assert key_terms(prompts, others) == ("boil", "rice")  # noodles stand in two prompts only


def test_a_word_leaves_only_if_enough_distinct_prompts_share_it() -> None:
    secret = ["my password is hunter", "My  password is HUNTER", "hunter again"]
    assert "hunter" not in key_terms(secret * 10)
    assert "hunter" in key_terms([*secret, "who is hunter"])
    assert SHARED_BY == 3


CANARIES = [
    "ask marta.kowalska@example.org about it",
    "call +48 601 555 0199 now",
    "see https://intern.example.org/payroll",
    "my key is sk-live-9fA3kQ",
    "open /home/marta/secrets",
    "write to Kowalska about it",
]


@pytest.mark.parametrize("canary", CANARIES)
def test_addresses_numbers_keys_and_names_never_leave(canary: str) -> None:
    prompts = [f"please {word}: {canary}" for word in ("one", "two", "three", "four", "five")]
    theme = name_gap(prompts)
    told = " ".join([theme.name, theme.description, *theme.terms, *theme.labels]).casefold()
    for private in ("marta", "kowalska", "example", "payroll", "live", "intern", "secrets", "601", "home"):
        assert private not in told


def test_with_nothing_to_tell_it_says_so() -> None:
    theme = name_gap(["Anna Kowalska?", "Bertha Nowak?", "Cecil Wolf?"])
    assert (theme.name, theme.terms) == (UNNAMED, ())
    assert "may be told" in theme.description


def test_a_slug_is_plain() -> None:
    assert slug(["größe", "été", "日本"]) == "groe-ete"
    assert slug([]) == slug(["日本"]) == UNNAMED
    TypeAdapter(CardName).validate_python(slug(["ﬃ" * 31 + "ab", "ﬃ" * 24]))  # one letter that becomes three


@given(st.lists(st.text(st.characters(categories=["L", "N", "P", "Z", "S"]), max_size=60), max_size=12))
def test_every_name_is_one_that_a_card_may_have(prompts: list[str]) -> None:
    theme = name_gap([text for prompt in prompts for text in (prompt, prompt + " a", prompt + " b")])
    TypeAdapter(CardName).validate_python(theme.name)
    assert set(theme.name) <= set(string.ascii_lowercase + "-")
