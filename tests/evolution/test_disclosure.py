"""Disclosure: what each policy lets out, as a table."""

from __future__ import annotations

import pytest

from evolution.disclosure import disclosed
from evolution.errors import DisclosureError
from evolution.protocols import Theme

PRIVATE = "Mail jane@corp.example about my loan"
WRITTEN = "Mail test@synthetic.example about a loan"
THEME = Theme(name="loans", description="Loans, ask jane@corp.example", terms=("loan", "a@b.example"), labels=("yes",))
CLEAN = Theme(name="loans", description="Loans, ask <EMAIL_1>", terms=("loan", "<EMAIL_1>"), labels=("yes",))


def test_never_lets_nothing_out() -> None:
    with pytest.raises(DisclosureError, match="never"):
        disclosed((), THEME, "never")


def test_description_lets_a_clean_theme_and_the_teachers_own_prompts_out() -> None:
    leaving = disclosed([WRITTEN], THEME, "description", written={WRITTEN})
    assert leaving.theme == CLEAN
    assert [prompt.text for prompt in leaving.prompts] == [WRITTEN]


def test_description_lets_no_users_prompt_out() -> None:
    with pytest.raises(DisclosureError, match="got 1 others") as caught:
        disclosed([WRITTEN, PRIVATE], THEME, "description", written={WRITTEN})
    assert "jane" not in str(caught.value)


def test_redacted_lets_prompts_out_with_placeholders_that_only_we_can_fill() -> None:
    leaving = disclosed([PRIVATE], THEME, "redacted")
    assert leaving.theme == CLEAN
    assert [prompt.text for prompt in leaving.prompts] == ["Mail <EMAIL_1> about my loan"]
    assert leaving.prompts[0].restored("ask <EMAIL_1>") == "ask jane@corp.example"


def test_full_lets_everything_out_as_it_is() -> None:
    leaving = disclosed([PRIVATE], THEME, "full")
    assert (leaving.theme, leaving.prompts[0].text) == (THEME, PRIVATE)
