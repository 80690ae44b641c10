"""What is asked in the three nights: three families that no card knows, and the ordinary traffic around them.

CLINC150's intents of one domain, facts about towns that do not exist, and dates to be written in ISO 8601. `test` items
are never asked of the teacher, nor seen in traffic; each is a new prompt, and of a fact a phrasing that was never used.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.routing_adapters import DataMissingError
from evolution.protocols import Example
from scripts.data import data_dir
from scripts.demo_cards.dates import iso_dates
from scripts.demo_cards.tickets import ticket_triage

SEED = 0
DOMAIN = "travel"
INTENT_FORM = "Name the intent of this message: {text}"
ENCODER_DOMAIN = "kitchen_and_dining"
PER_INTENT = 16
TEST_PER_INTENT = 4
PER_LABEL, TEST_PER_LABEL = 26, 8
DATES = 180
TEST_ITEMS = 48
TOWNS = 24
ORDINARY = 544
STRAY = 144
FACT_FORMS = (
    "Who founded the town of {town}?",
    "Which person founded {town}?",
    "Tell me who the founder of {town} was.",
    "The town of {town} was founded by whom?",
    "Name the founder of the town {town}.",
    "Do you know who started the settlement of {town}?",
)
TEST_FACT_FORMS = ("By whom was the town of {town} founded?", "What is the name of the founder of {town}?")
STARTS = ("Vel", "Dor", "Quin", "Mar", "Tes", "Bru", "Hal", "Ost", "Pel", "Zan", "Kir", "Lum")
MIDDLES = ("mo", "ra", "ve", "di", "lu", "ta")
ENDS = ("ra", "stead", "wick", "ford", "nia", "holm")
FIRST_NAMES = ("Orla", "Edric", "Tamsin", "Borin", "Isolde", "Caspar", "Mirela", "Alaric", "Sunniva", "Jorah", "Petra")
LAST_NAMES = ("Venn", "Ashgrove", "Tolliver", "Marsh", "Quill", "Hartwell", "Stone", "Larkin", "Brandt", "Fenwick")


@dataclass(frozen=True, kw_only=True)
class Family:
    """Requests of one kind: `traffic` is asked, and known to the teacher; `test` is what an expert is scored on."""

    name: str
    traffic: tuple[Example, ...]
    test: tuple[Example, ...]


@dataclass(frozen=True, kw_only=True)
class Around:
    """Requests that the cards here answer (`covered`), and those on anything at all, no two alike (`stray`)."""

    covered: tuple[Example, ...]
    stray: tuple[str, ...]


def families() -> list[Family]:
    """The three, in the order of the nights. Raises `DataMissingError`."""
    return [intents(), facts(), dates()]


def intents(per_intent: int = PER_INTENT, test_per_intent: int = TEST_PER_INTENT) -> Family:
    """A domain's sentences, to be answered by the name of their intent."""
    clinc, domains = _read("clinc150_data_full.json"), _read("clinc150_domains.json")
    return Family(
        name="intents",
        traffic=_of_each(clinc["train"], domains[DOMAIN], per_intent),
        test=_of_each(clinc["test"], domains[DOMAIN], test_per_intent),
    )


def facts() -> Family:
    """Who founded which town, in several phrasings; test items are asked in others."""
    rng = random.Random(SEED)
    towns = rng.sample([a + b + c for a in STARTS for b in MIDDLES for c in ENDS], TOWNS)
    people = rng.sample([f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES], TOWNS)
    known = list(zip(towns, people, strict=True))

    def asked(forms: Sequence[str]) -> list[Example]:
        return [Example(prompt=form.format(town=town), answer=founder) for form in forms for town, founder in known]

    return Family(name="facts", traffic=tuple(asked(FACT_FORMS)), test=tuple(asked(TEST_FACT_FORMS)[:TEST_ITEMS]))


def dates() -> Family:
    """Dates inside sentences, to be written in ISO 8601; a test item has a day of its own."""
    pairs = [Example(prompt=pair.prompt, answer=pair.answer) for pair in iso_dates().train]
    traffic = tuple(pairs[:DATES])
    asked = {one.answer for one in traffic}
    unseen = [one for one in pairs[DATES:] if one.answer not in asked]
    return Family(name="dates", traffic=traffic, test=tuple(unseen[:TEST_ITEMS]))


def around() -> Around:
    """What else is asked."""
    tickets = [Example(prompt=pair.prompt, answer=pair.answer) for pair in ticket_triage().train[:ORDINARY]]
    return Around(covered=tuple(tickets), stray=stray()[:STRAY])


def stray() -> tuple[str, ...]:
    """CLINC150's queries out of scope, in an order of ours."""
    texts = [text for text, _ in _read("clinc150_data_full.json")["oos_test"]]
    return tuple(random.Random(SEED).sample(texts, len(texts)))


def labelled() -> Family:
    """A domain's sentences as they are, each with its intent as its label; for an encoder."""
    clinc, domains = _read("clinc150_data_full.json"), _read("clinc150_domains.json")
    return Family(
        name="labelled",
        traffic=_of_each(clinc["train"], domains[ENCODER_DOMAIN], PER_LABEL, form="{text}"),
        test=_of_each(clinc["test"], domains[ENCODER_DOMAIN], TEST_PER_LABEL, form="{text}"),
    )


def _of_each(
    pairs: Sequence[tuple[str, str]], wanted: Sequence[str], count: int, form: str = INTENT_FORM
) -> tuple[Example, ...]:
    """`count` sentences of each intent, intents in turn; drawn, for neighbours in the file are often of one mould."""
    texts: dict[str, list[str]] = defaultdict(list)
    for text, intent in pairs:
        texts[intent].append(text)
    rng = random.Random(SEED)
    drawn = {intent: rng.sample(texts[intent], count) for intent in wanted}
    return tuple(
        Example(prompt=form.format(text=drawn[intent][at]), answer=intent.replace("_", " "))
        for at in range(count)
        for intent in wanted
    )


def _read(name: str) -> Any:
    path = data_dir() / name
    if not path.is_file():
        raise DataMissingError(
            f"expected {name} in {data_dir()}, got no such file",
            hint="run `python -m scripts.data`, or set ARROWMOE_DATA to where the data sets are",
        )
    return json.loads(path.read_text(encoding="utf-8"))
