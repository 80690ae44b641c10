"""CLINC150 and BANKING77 as all-MiniLM-L6-v2 sees them: the material of the routing benchmarks.

Embedding takes a minute, so vectors are kept in the user's cache, under a digest of the embedder and the texts.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from arrowmoe.base_model import default_cache, load_base_model
from arrowmoe.engine import ArrowEngine
from arrowmoe.features import Featurizer, TextFeaturizer, Vectors
from arrowmoe.routing.probe import Probe, measured
from arrowmoe.routing.texts import phrases
from benchmarks.routing_adapters import DataMissingError
from registry.digest import digest_of, hex_of
from scripts.data import data_dir

EMBEDDER = "builtin:minilm"

Names = npt.NDArray[np.str_]

# One sentence for each domain, written by people who knew its intents, as a card's owner does.
DESCRIPTIONS = {
    "auto_and_commute": "Questions about cars and getting around: fuel and gas, oil and tires, traffic, directions, "
    "distance and travel time to work.",
    "banking": "Questions about bank accounts: balance, transfers, bills, checks, pin, routing number, interest rate, "
    "frozen or blocked account and transactions.",
    "credit_cards": "Questions about credit cards: credit score and limit, card applications, declined or lost or "
    "damaged cards, rewards, APR and expiration date.",
    "home": "Help around the house and with lists, music, calendar and orders: shopping and to-do lists, reminders, "
    "playing songs, smart home devices, order status.",
    "kitchen_and_dining": "Questions about food and restaurants: recipes, ingredients, cooking time, calories, "
    "nutrition, meal suggestions, reservations and reviews.",
    "meta": "Talking to the assistant about its settings: change its name, voice, accent, speed or language, cancel, "
    "repeat, yes, no, maybe, reset, whisper mode.",
    "small_talk": "Small talk with the assistant: greetings, goodbye, thank you, jokes, fun facts, who made you, how "
    "old are you, are you a bot, hobbies and pets.",
    "travel": "Questions about travel: flights, hotels, car rental, luggage, visa, vaccines, plug type, translation, "
    "exchange rate, flight status and time zones.",
    "utility": "Everyday tools: alarm, timer, time, date, weather, calculator, measurement conversion, spelling, "
    "definitions, calls and texts, dice and coin flips.",
    "work": "Questions about employment: paid time off, payday, income, taxes, W2, insurance, direct deposit, 401k, "
    "meetings, schedule and vacation requests.",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """Prompts: `vectors` (n, d) of unit length, and the card and the intent of each."""

    vectors: Vectors
    cards: Names
    intents: Names

    def __len__(self) -> int:
        return len(self.vectors)

    def where(self, rows: npt.NDArray[Any]) -> Rows:
        """A subset, by a mask or by indices."""
        return Rows(vectors=self.vectors[rows], cards=self.cards[rows], intents=self.intents[rows])

    def of(self, card: str) -> Rows:
        """The prompts of one card."""
        return self.where(self.cards == card)


@dataclass(frozen=True, kw_only=True, eq=False)
class Material:
    """Both data sets; `phrases` are each CLINC150 domain's description, embedded in parts."""

    probe: Probe
    train: Rows
    val: Rows
    test: Rows
    out_of_scope: Vectors
    banking_train: Rows
    banking_test: Rows
    phrases: Mapping[str, Vectors]


def material() -> Material:
    """Everything, embedded where the cache lacks it. Raises `DataMissingError`."""
    featurizer = TextFeaturizer(ArrowEngine(load_base_model(EMBEDDER, device="cpu", dtype="float32")))
    clinc: Mapping[str, Sequence[tuple[str, str]]] = json.loads(_read("clinc150_data_full.json"))
    domains: Mapping[str, Sequence[str]] = json.loads(_read("clinc150_domains.json"))
    domain_of = {intent: domain for domain, intents in domains.items() for intent in intents}
    return Material(
        probe=measured(featurizer, default_cache()),
        train=_rows(featurizer, clinc["train"], domain_of),
        val=_rows(featurizer, clinc["val"], domain_of),
        test=_rows(featurizer, clinc["test"], domain_of),
        out_of_scope=embedded(featurizer, [text for text, _ in clinc["oos_test"]]),
        banking_train=_rows(featurizer, _pairs("banking77_train.csv"), {}),
        banking_test=_rows(featurizer, _pairs("banking77_test.csv"), {}),
        phrases={domain: embedded(featurizer, phrases(text)) for domain, text in DESCRIPTIONS.items()},
    )


def embedded(featurizer: Featurizer, texts: Sequence[str], cache: Path | None = None) -> Vectors:
    """Unit vectors (n, d) of `texts`, from the cache or made."""
    key = hex_of(digest_of(json.dumps([featurizer.embedder, *texts]).encode()))[:32]
    path = (cache or default_cache()) / "benchmarks" / f"{key}.npy"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.npy")
        np.save(partial, featurizer.features(texts).vectors)
        partial.replace(path)
    vectors: Vectors = np.load(path, allow_pickle=False)
    return vectors


def _rows(featurizer: Featurizer, pairs: Sequence[tuple[str, str]], card_of: Mapping[str, str]) -> Rows:
    texts, intents = zip(*pairs, strict=True)
    cards = np.array([card_of.get(intent, intent) for intent in intents])
    return Rows(vectors=embedded(featurizer, texts), cards=cards, intents=np.array(intents))


def _pairs(name: str) -> list[tuple[str, str]]:
    return [(row["text"], row["category"]) for row in csv.DictReader(io.StringIO(_read(name)))]


def _read(name: str) -> str:
    path = data_dir() / name
    if not path.is_file():
        raise DataMissingError(
            f"expected {name} in {data_dir()}, got no such file",
            hint="run `python -m scripts.data`, or set ARROWMOE_DATA to where the data sets are",
        )
    return path.read_text(encoding="utf-8")
