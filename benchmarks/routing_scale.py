"""Churn and size: thousands of cards, made of the 227 intents of CLINC150 and BANKING77, each described as a card.

A made card takes a real intent's statistics, moves their centre to a random mixture of three real intents' centres,
and stretches each direction of the sketch by a random tenth or so: real scatter, in the places between real topics,
which are crowded. A prompt for it is a test prompt of that intent, moved alike.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from arrowmoe.routing.closed_form import ClosedForm
from arrowmoe.routing.densities import Array
from arrowmoe.routing.statistics import CardStatistics, summarise
from benchmarks.routing_data import Material, Rows
from benchmarks.routing_measures import percent

PRESENT, CHANGES = 1000, 1000
CHECKED_PROMPTS = 10
PROMPTS = 1000
KEYS_AT_ONCE = 500


@dataclass(frozen=True, kw_only=True, eq=False)
class Intent:
    """A real intent: its statistics from train, its test prompts (n, d)."""

    card: CardStatistics
    prompts: Array


@dataclass(frozen=True, kw_only=True, eq=False)
class MadeCard:
    """A card that was made, and prompts (n, d) of unit length for it."""

    card: CardStatistics
    prompts: Array


def churn(found: Material, seed: int) -> dict[str, float]:
    """Random arrivals and departures among PRESENT cards; each arrival is followed by a decision on a prompt of it."""
    rng = np.random.default_rng(seed)
    cards = {f"{at}": made for at, made in enumerate(made_cards(intents(found), PRESENT + CHANGES, rng))}
    present, absent = [*cards][:PRESENT], [*cards][PRESENT:]
    form = router_of({key: cards[key].card for key in present})
    form.score(cards["0"].prompts[:1])
    arrivals, departures, chosen = [], [], []
    for arrives in rng.integers(0, 2, CHANGES):
        here, there = (absent, present) if arrives else (present, absent)
        key = here.pop(rng.integers(len(here)))
        there.append(key)
        if arrives:
            prompt = cards[key].prompts[:1]
            arrivals.append(
                milliseconds(lambda key=key, prompt=prompt: (form.add(key, cards[key].card), form.score(prompt)))
            )
            chosen.append(key in form.score(prompt)[0].keys)
        else:
            departures.append(milliseconds(lambda key=key: form.remove(key)))
    x = np.concatenate([cards[key].prompts[:1] for key in present[:CHECKED_PROMPTS]])
    return {
        "relative_error": refit_error(form, {key: cards[key].card for key in rng.permutation(present).tolist()}, x),
        "arrival_median_ms": float(np.median(arrivals)),
        "arrival_p99_ms": float(np.quantile(arrivals, 0.99)),
        "arrival_max_ms": max(arrivals),
        "departure_p99_ms": float(np.quantile(departures, 0.99)),
        "arrivals_shortlisted_percent": percent(np.array(chosen)),
    }


def many_cards(found: Material, number: int, seed: int) -> dict[str, float]:
    """Decisions among `number` cards, one prompt at a time: time, memory, and agreement with the exact score of all."""
    rng, before = np.random.default_rng(seed), resident_mb()
    cards = {f"{at}": made for at, made in enumerate(made_cards(intents(found), number, rng))}
    x = mixed_prompts(found, list(cards.values()), rng)
    form = router_of({key: made.card for key, made in cards.items()})
    ready_ms = milliseconds(lambda: form.score(x[:1]))
    memory = resident_mb() - before
    first = [milliseconds(lambda row=row: form.score(row[None])) for row in x]
    again = [milliseconds(lambda row=row: form.score(row[None])) for row in x]
    fast = [row.keys[row.values.argmax()] for row in form.score(x)]
    slow = exact_best(form, list(cards), x)
    return {
        "cards": number,
        "statistics_mb": sum(made.card.nbytes for made in cards.values()) / 1e6,
        "memory_mb": memory,
        "memory_with_every_card_factorised_mb": resident_mb() - before,
        "pool_ready_ms": ready_ms,
        "decision_median_ms": float(np.median(first)),
        "decision_p99_ms": float(np.quantile(first, 0.99)),
        "decision_again_median_ms": float(np.median(again)),
        "decision_again_p99_ms": float(np.quantile(again, 0.99)),
        "prompts": len(x),
        "agreement": percent(np.array(fast) == np.array(slow)),
    }


def intents(found: Material) -> list[Intent]:
    """All intents of both data sets."""

    def one(train: Rows, test: Rows, name: str) -> Intent:
        card = summarise(train.vectors[train.intents == name], embedder=found.probe.embedder, probe=found.probe.digest)
        return Intent(card=card, prompts=test.vectors[test.intents == name].astype(np.float64))

    return [
        one(train, test, name)
        for train, test in ((found.train, found.test), (found.banking_train, found.banking_test))
        for name in np.unique(train.intents).tolist()
    ]


def made_cards(real: Sequence[Intent], number: int, rng: np.random.Generator) -> list[MadeCard]:
    """As many cards, see the module's text."""
    centres = np.stack([intent.card.mean for intent in real])

    def one() -> MadeCard:
        intent = real[rng.integers(len(real))]
        moved = rng.dirichlet(np.ones(3)) @ centres[rng.choice(len(real), 3, replace=False)] - intent.card.mean
        stretch = np.exp(0.1 * rng.standard_normal((len(intent.card.sketch), 1)))
        card = replace(intent.card, prototypes=intent.card.prototypes + moved, sketch=stretch * intent.card.sketch)
        prompts = intent.prompts + moved
        return MadeCard(card=card, prompts=prompts / np.linalg.norm(prompts, axis=1, keepdims=True))

    return [one() for _ in range(number)]


def mixed_prompts(found: Material, cards: Sequence[MadeCard], rng: np.random.Generator) -> Array:
    """PROMPTS prompts (n, d): half for random cards, half real ones of both data sets."""
    made = [card.prompts[rng.integers(len(card.prompts))] for card in rng.choice(np.array(cards, object), PROMPTS // 2)]
    real = np.concatenate([found.test.vectors, found.banking_test.vectors]).astype(np.float64)
    return np.concatenate([np.stack(made), rng.choice(real, PROMPTS - len(made), replace=False)])


def router_of(cards: dict[str, CardStatistics]) -> ClosedForm:
    """A router that holds `cards`."""
    form = ClosedForm(next(iter(cards.values())).dimension)
    for key, card in cards.items():
        form.add(key, card)
    return form


def refit_error(form: ClosedForm, cards: dict[str, CardStatistics], x: Array) -> float:
    """The largest difference from a router that gets the same cards afresh, relative to a score of at least 1 nat."""
    keys = sorted(cards)
    ours = np.stack([row.values for row in form.exact(x, keys)])
    fresh = np.stack([row.values for row in router_of(cards).exact(x, keys)])
    return float((np.abs(ours - fresh) / np.maximum(1, np.abs(fresh))).max())


def exact_best(form: ClosedForm, keys: Sequence[str], x: Array) -> list[str]:
    """The best of all cards for each row."""
    best, chosen = np.full(len(x), -np.inf), np.full(len(x), "", dtype=object)
    for start in range(0, len(keys), KEYS_AT_ONCE):
        some = keys[start : start + KEYS_AT_ONCE]
        values = np.stack([row.values for row in form.exact(x, some)])
        better = values.max(axis=1) > best
        best[better] = values.max(axis=1)[better]
        chosen[better] = np.array(some, dtype=object)[values.argmax(axis=1)[better]]
    return [*chosen]


def milliseconds(run: Callable[[], object]) -> float:
    """How long `run` takes."""
    start = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - start)


def resident_mb() -> float:
    """Resident memory of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6
