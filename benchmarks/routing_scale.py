"""Churn and size: thousands of cards, made of the 227 intents of CLINC150 and BANKING77, each described as a card.

The real ones come first. A made card takes a real intent's statistics, moves their centre to a random mixture of three
real intents' centres, and stretches each direction of the sketch by a random tenth or so: real scatter, in the crowded
places between real topics. A prompt for it is a test prompt of that intent, moved alike and scaled to unit length.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from arrowmoe.routing.closed_form import ClosedForm
from arrowmoe.routing.densities import Array
from arrowmoe.routing.statistics import CardStatistics, summarise
from benchmarks.routing_data import Material
from benchmarks.routing_measures import percent, router

PRESENT, CHANGES = 1000, 1000
REAL = 227
CHECKED_PROMPTS = 10
PROMPTS = 1000
KEYS_AT_ONCE = 500


@dataclass(frozen=True, kw_only=True, eq=False)
class Described:
    """A card's statistics, and prompts (n, d) of unit length for it that they were not computed from."""

    card: CardStatistics
    prompts: Array


def churn(found: Material, seed: int) -> dict[str, float]:
    """Random arrivals and departures among PRESENT cards; each arrival is followed by a decision on a prompt of it."""
    rng = np.random.default_rng(seed)
    cards = {f"{at}": one for at, one in enumerate(population(found, PRESENT + CHANGES, rng))}
    keys = rng.permutation([*cards]).tolist()
    present, absent = keys[:PRESENT], keys[PRESENT:]
    form = router({key: cards[key].card for key in present})
    form.score(cards[present[0]].prompts[:1])
    arrivals, departures, shortlisted = list[float](), list[float](), list[bool]()
    for arrives in rng.integers(0, 2, CHANGES):
        here, there = (absent, present) if arrives else (present, absent)
        key = here.pop(rng.integers(len(here)))
        there.append(key)
        if arrives:
            arrivals.append(milliseconds(partial(arrive, form, key, cards[key])))
            shortlisted.append(key in form.score(cards[key].prompts[:1])[0].keys)
        else:
            departures.append(milliseconds(partial(form.remove, key)))
    x = np.concatenate([cards[key].prompts[:1] for key in present[:CHECKED_PROMPTS]])
    return {
        "relative_error": refit_error(form, {key: cards[key].card for key in rng.permutation(present).tolist()}, x),
        "arrivals": len(arrivals),
        **times("arrival", arrivals),
        **times("departure", departures),
        "arrivals_shortlisted": percent(np.array(shortlisted)),
    }


def arrive(form: ClosedForm, key: str, new: Described) -> None:
    """What a card's arrival costs until it can be chosen: its own sums, and a decision with everything made anew."""
    form.add(key, new.card)
    form.score(new.prompts[:1])


def many_cards(found: Material, number: int, seed: int) -> dict[str, float]:
    """Decisions among `number` cards, one prompt at a time: time, memory, and agreement with the exact score of all.

    A decision factorises the cards of its shortlist that none before it looked at: so the first round of prompts.
    """
    rng = np.random.default_rng(seed)
    cards = {f"{at}": one for at, one in enumerate(population(found, number, rng))}
    x = prompts_of(list(cards.values()), rng)
    before = resident_mb()
    form = router({key: one.card for key, one in cards.items()})
    ready_ms = milliseconds(lambda: form.score(x[:1]))
    index_mb = resident_mb() - before
    first, again = ([milliseconds(partial(form.score, row[None])) for row in x] for _ in range(2))
    fast = [row.keys[row.values.argmax()] for row in form.score(x)]
    figures = {
        "cards": number,
        "statistics_mb": sum(one.card.nbytes for one in cards.values()) / 1e6,
        "statistics_in_memory_mb": sum(one.card.prototypes.nbytes + one.card.sketch.nbytes for one in cards.values())
        / 1e6,
        "index_mb": index_mb,
        "index_after_prompts_mb": resident_mb() - before,
        "first_decision_ms": ready_ms,
        **times("unseen_cards_decision", first),
        **times("decision", again),
        "prompts": len(x),
    }
    return figures | {"agreement": percent(np.array(fast) == np.array(exact_best(form, list(cards), x)))}


def population(found: Material, number: int, rng: np.random.Generator) -> list[Described]:
    """The real intents, and as many made cards as it takes (see above)."""
    real = intents(found)[:number]
    centres = np.stack([intent.card.mean for intent in real])

    def made() -> Described:
        intent = real[int(rng.integers(len(real)))]
        moved = rng.dirichlet(np.ones(3)) @ rng.choice(centres, 3, replace=False) - intent.card.mean
        stretch = np.exp(0.1 * rng.standard_normal((len(intent.card.sketch), 1)))
        card = replace(intent.card, prototypes=intent.card.prototypes + moved, sketch=stretch * intent.card.sketch)
        prompts = intent.prompts + moved
        return Described(card=card, prompts=prompts / np.linalg.norm(prompts, axis=1, keepdims=True))

    return real + [made() for _ in range(number - len(real))]


def intents(found: Material) -> list[Described]:
    """Each intent of both data sets as a card: described with train, with its test prompts."""
    embedder, probe = found.probe.embedder, found.probe.digest
    return [
        Described(
            card=summarise(train.vectors[train.intents == name], embedder=embedder, probe=probe),
            prompts=test.vectors[test.intents == name].astype(np.float64),
        )
        for train, test in ((found.train, found.test), (found.banking_train, found.banking_test))
        for name in np.unique(train.intents).tolist()
    ]


def prompts_of(cards: Sequence[Described], rng: np.random.Generator) -> Array:
    """PROMPTS prompts (n, d), in turn for a random card of all, and for one of the real ones at the beginning."""
    bounds = [len(cards), min(REAL, len(cards))]
    chosen = [cards[int(rng.integers(bounds[at % 2]))].prompts for at in range(PROMPTS)]
    return np.stack([prompts[rng.integers(len(prompts))] for prompts in chosen])


def refit_error(form: ClosedForm, cards: dict[str, CardStatistics], x: Array) -> float:
    """The largest difference from a router that gets the same cards afresh, relative to a score of at least 1 nat."""
    keys = sorted(cards)
    ours = np.stack([row.values for row in form.exact(x, keys)])
    fresh = np.stack([row.values for row in router(cards).exact(x, keys)])
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


def times(name: str, values: Sequence[float]) -> dict[str, float]:
    """Median, 99th percentile and greatest of milliseconds."""
    return {
        f"{name}_median_ms": float(np.median(values)),
        f"{name}_p99_ms": float(np.quantile(values, 0.99)),
        f"{name}_max_ms": max(values),
    }


def milliseconds(run: Callable[[], object]) -> float:
    """How long `run` takes."""
    start = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - start)


def resident_mb() -> float:
    """Resident memory of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6
