"""Redaction: what has a form is found, what only looks like it is not, and originals come back."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolution.errors import DisclosureError
from evolution.redaction import PatternRedactor, PresidioRedactor, Span, redacted

REDACTOR = PatternRedactor()


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("EMAIL", "jane.doe+x@mail.corp.example"),
        ("EMAIL", "jane.doe (at) corp (dot) example"),
        ("EMAIL", "jane at corp dot example"),
        ("PHONE", "+49 170 1234567"),
        ("PHONE", "(555) 123-4567"),
        ("PHONE", "555-1234"),
        ("PHONE", "0170 1234567"),
        ("IBAN", "DE89 3704 0044 0532 0130 00"),
        ("IBAN", "gb29nwbk60161331926819"),
        ("CARD", "4111 1111 1111 1111"),
        ("CARD", "378282246310005"),
        ("SSN", "078-05-1120"),
        ("IP", "192.168.0.17"),
        ("IP", "2001:db8::8a2e:370:7334"),
        ("URL", "https://bob:hunter2@host.example/private?x=1"),
        ("SECRET", "sk-proj-abcdefghijklmnop1234"),
        ("SECRET", "ghp_abcdefghijklmnopqrstuvwxyz0123456789"),
        ("SECRET", "AKIAIOSFODNN7EXAMPLE"),
        ("SECRET", "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl"),
        ("SECRET", "q7Zp3xW9vK2mR8tB5nY1"),
        ("SECRET", "-----BEGIN RSA PRIVATE KEY-----\nMIIB\n-----END RSA PRIVATE KEY-----"),
    ],
)
def test_a_value_leaves_its_text_whole(kind: str, value: str) -> None:
    text = f"Please look at {value} and tell me more."
    redaction = REDACTOR.redact(text)
    assert redaction.text == f"Please look at <{kind}_1> and tell me more."
    assert redaction.restored(redaction.text) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("My name is Jane Doe-Smith.", "My name is <NAME_1>."),
        ("my name is jane doe and i sing", "my name is <NAME_1> and i sing"),
        ("I'm Åsa, hello", "I'm <NAME_1>, hello"),
        ("Dear Dr. J. Smith, hello", "Dear <NAME_1>, hello"),
        ("I am Jane Doe. Sign it Jane.", "I am <NAME_1>. Sign it <NAME_2>."),
        ("my password is hunter2", "my password is <SECRET_1>"),
        ("GET /x?access_token=abc&y=1", "GET /x?access_token=<SECRET_1>&y=1"),
        ("born on 3 May 1980 in Rome", "born on <BIRTH_1> in Rome"),
        ("a@b.example, c@d.example, a@b.example", "<EMAIL_1>, <EMAIL_2>, <EMAIL_1>"),
    ],
)
def test_what_a_phrase_announces_is_found(text: str, expected: str) -> None:
    redaction = REDACTOR.redact(text)
    assert redaction.text == expected
    assert redaction.restored(redaction.text) == text


@pytest.mark.parametrize(
    "text",
    [
        "I am tired, this is fine, and dear me",
        "Write the date in ISO format: 3 March 2021",
        "2026-11-21 08:46:12 and 21.11.2026 and 11/21/2026",
        "What is 123456 plus 7890?",
        "at 12:30:45 we had version 3.11.7",
        "see https://docs.example/page?x=1",
        "internationalisation-of-localisations and src/docs/readme-for-people",
    ],
)
def test_what_is_no_personal_data_stays(text: str) -> None:
    assert REDACTOR.redact(text).text == text


@pytest.mark.parametrize("value", ["DE89 3704 0044 0532 0130 01", "4111 1111 1111 1112"])
def test_checksums_tell_ibans_and_cards_from_other_numbers(value: str) -> None:
    assert not {"IBAN", "CARD"} & {name[1:5].rstrip("_") for name in REDACTOR.redact(value).originals}


def test_a_placeholder_that_a_user_typed_is_not_mistaken_for_ours() -> None:
    redaction = REDACTOR.redact("is <EMAIL_1> a placeholder for a@b.example?")
    assert redaction.text == "is <EMAIL_1> a placeholder for <EMAIL_2>?"
    assert redaction.restored("<EMAIL_1> is, <EMAIL_2> is not, <EMAIL_9> neither") == (
        "<EMAIL_1> is, a@b.example is not, <EMAIL_9> neither"
    )


@given(st.text(), st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9), st.sampled_from(["NAME", "EMAIL"]))))
def test_spans_however_they_overlap_leave_nothing_and_come_back(text: str, places: list[tuple[int, int, str]]) -> None:
    found = [
        Span(start=start, end=min(start + size, len(text)), kind=kind)
        for start, size, kind in places
        if start < len(text)
    ]
    redaction = redacted(text, found)
    assert redaction.restored(redaction.text) == text
    covered = {at for span in found for at in range(span.start, span.end)}
    rest = "".join(sign for at, sign in enumerate(text) if at not in covered)
    for placeholder in redaction.originals:
        redaction = type(redaction)(text=redaction.text.replace(placeholder, ""), originals=redaction.originals)
    assert redaction.text == rest


@given(st.text())
def test_any_text_comes_back(text: str) -> None:
    redaction = REDACTOR.redact(text)
    assert redaction.restored(redaction.text) == text


@dataclass
class Entity:
    start: int
    end: int
    entity_type: str


class Analyzer:
    def analyze(self, text: str, language: str) -> list[Entity]:
        at = text.index("Baker Street")
        return [Entity(at, at + len("Baker Street"), "LOCATION")]


def test_presidio_adds_to_the_patterns() -> None:
    redactor = PresidioRedactor(Analyzer())
    assert redactor.redact("a@b.example lives in Baker Street").text == "<EMAIL_1> lives in <LOCATION_1>"


def test_presidio_that_is_not_installed_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "presidio_analyzer", None)
    with pytest.raises(DisclosureError) as caught:
        PresidioRedactor()
    assert "arrowmoe[presidio]" in str(caught.value.hint)
