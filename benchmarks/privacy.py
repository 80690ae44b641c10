"""What an attacker learns of the prompts behind a card's statistics, measured on CLINC150 and BANKING77.

    python -m benchmarks.privacy [--threads 2] [--cards 30]

A card stands for an owner with private prompts of one intent. Strangers are other prompts of that intent, drawn from
the same pool, so knowing the topic wins nothing against them. What the figures mean is in docs/privacy.md.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from scipy.cluster.hierarchy import fcluster, linkage

from arrowmoe.base_model import default_cache
from arrowmoe.engine import ArrowEngine
from arrowmoe.features import Featurizer, TextFeaturizer
from arrowmoe.routing.acceptance import CALIBRATION_VALUES, Prompts, describe
from arrowmoe.routing.densities import Array
from arrowmoe.routing.metrics import auroc, recall_at_false_rejection
from arrowmoe.routing.probe import Probe, measured
from arrowmoe.routing.statistics import MIN_PROMPTS, CardStatistics, summarise
from benchmarks.harness import Target, report
from benchmarks.privacy_attacks import (
    added_prompts,
    calibration_match,
    distances,
    fit,
    inside_sketch,
    nearness,
    token_f1,
    unmixed,
)
from benchmarks.routing_data import EMBEDDER, embedded
from registry.manifest import MAX_STATISTICS_BYTES
from scripts.data import data_dir

MEMBERS, POOL, HELD_OUT = 60, 130, 30
"""Prompts of a card; prompts that its intent must have in all; prompts that calibrate it where some are held out."""
SIZES = (10, 20, 40, 60, 90)
RANKS = (0, 2, 4, 8, 16, 32, 56)
ADDED = (1, 3, 5, 10)
FALSE_ALARMS = 0.01
ALONE = "prototypes alone, by prompts per prototype"
WHOLE = "as `describe` makes them, by prompts per card"
CALIBRATED = f"{MEMBERS} prompts, by what calibrates"

Rows = npt.NDArray[np.intp]
Score = Callable[[CardStatistics, Array], Array]
Figures = dict[str, float]


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """Every text once, with its unit vector (n, d), its intent, and its CLINC150 domain ("" for BANKING77)."""

    texts: tuple[str, ...]
    vectors: Array
    intents: npt.NDArray[np.str_]
    domains: npt.NDArray[np.str_]


@dataclass(frozen=True, kw_only=True, eq=False)
class Victim:
    """Rows of a corpus: `members` a card is described with, `strangers` have the same intents and are not in it."""

    members: Rows
    strangers: Rows
    statistics: CardStatistics


def main() -> None:
    """Measure, print the tables, and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--cards", type=int, default=30, help="cards of one intent to attack")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    featurizer = TextFeaturizer(ArrowEngine.from_pretrained(EMBEDDER, device="cpu"))
    attack = Attack(read_corpus(featurizer), measured(featurizer, default_cache()), options.cards)
    tables = {
        ALONE: attack.by_grouping(),
        WHOLE: attack.by_size(),
        f"{MEMBERS} prompts, by the sketch's rank": attack.by_rank(),
        CALIBRATED: attack.by_calibration(),
        f"a card of {MEMBERS} prompts described again with more": attack.by_added(),
    }
    for title, rows in tables.items():
        print(f"\n{title}\n{table(rows)}")
    report("privacy", "single examples (one prompt per prototype)", targets(tables), tables)


def targets(tables: Mapping[str, Mapping[str, Figures]]) -> list[Target]:
    """Membership should be little above chance against strangers of the same intent."""
    alone, whole = tables[ALONE], tables[WHOLE]
    values = {
        f"prototypes alone of {MEMBERS} prompts": alone["default"]["auroc prototypes"],
        f"best attack on a card of {MEMBERS} prompts": _best(whole[str(MEMBERS)]),
        "best attack on a domain's card": _best(whole["domain"]),
        "held-out prompts by their calibration": tables[CALIBRATED]["held out"]["auroc calibration"],
    }
    return [Target(name=f"membership AUROC, {name}", value=value, op="<=", bar=0.6) for name, value in values.items()]


class Attack:
    """Cards made of a corpus, and what is learned from each kind."""

    def __init__(self, corpus: Corpus, probe: Probe, cards: int, seed: int = 0) -> None:
        self._corpus, self._probe = corpus, probe
        self._vectors = corpus.vectors.astype(np.float32)
        self._seed = seed
        names, counts = np.unique(corpus.intents[corpus.intents != "oos"], return_counts=True)
        self._intents = np.random.default_rng(seed).permutation(names[counts >= POOL])[:cards]

    def by_grouping(self) -> dict[str, Figures]:
        """Prototypes of about m prompts each (m = 1: the examples themselves), and the clusters found by default."""
        rows = {}
        for name, m in {"1": 1, "3": 3, "5": 5, "10": 10, "default": None}.items():
            rows[name] = self._by_lists(self._victims(MEMBERS, m))
        return rows | {"domain": self._by_lists(self._of_domains(labels=False))}

    def by_size(self) -> dict[str, Figures]:
        """Default cards of one intent, and of CLINC150's domains with and without the intents as labels."""
        arms = {f"{size}": self._victims(size, None) for size in SIZES}
        arms |= {"domain": self._of_domains(labels=False), "domain, intents": self._of_domains(labels=True)}
        return {name: _shape(victims) | self._all_scores(victims) for name, victims in arms.items()}

    def by_rank(self) -> dict[str, Figures]:
        """Default cards with a sketch of each rank, also of more than `describe` allows."""
        victims, rows = self._victims(MEMBERS, None), {}
        for rank in RANKS:
            cards = [self._sketched(victim, rank) for victim in victims]
            rows[str(rank)] = self._membership("sketch", cards, inside_sketch)
            rows[str(rank)] |= self._membership("fit", cards, self._fit)
        return rows

    def by_calibration(self) -> dict[str, Figures]:
        """Calibration by cross-fitting, attacked for the card's prompts; by held-out prompts, attacked for those."""
        rows = {}
        for name, held_out in {"cross-fitting": 0, "held out": HELD_OUT}.items():
            victims = [self._calibrated(victim, held_out) for victim in self._victims(MEMBERS, None)]
            rows[name] = self._membership("calibration", victims, self._calibration)
        return rows

    def by_added(self) -> dict[str, Figures]:
        """Two versions of a card: is the text nearest to what came between them one of the prompts that were added."""
        rows = {}
        for added in ADDED:
            hits = []
            for victim in self._victims(MEMBERS, None):
                new = victim.strangers[:added]
                after = self._summary(np.concatenate([victim.members, new]))
                apart = added_prompts(victim.statistics, after)
                nearest = distances(self._corpus.vectors, apart[None])[:, 0].argmin()
                hits.append(nearest in new)
            rows[str(added)] = {"nearest is one of them": float(np.mean(hits))}
        return rows

    def _victims(self, size: int, m: int | None) -> list[Victim]:
        """A card for each intent, of `size` prompts in groups of about m; None is what `describe` does by itself."""
        victims = []
        for number, intent in enumerate(self._intents):
            rows = np.flatnonzero(self._corpus.intents == intent)
            rows = np.random.default_rng([self._seed, number]).permutation(rows)
            members = rows[:size]
            labels = None if m is None else _groups(self._corpus.vectors[members], m)
            statistics = self._summary(members, labels, m or MIN_PROMPTS)
            victims.append(Victim(members=members, strangers=rows[size:], statistics=statistics))
        return victims

    def _of_domains(self, *, labels: bool) -> list[Victim]:
        """A card for each domain, of two thirds of its prompts."""
        victims = []
        for number, domain in enumerate(np.unique(self._corpus.domains[self._corpus.domains != ""])):
            rows = np.flatnonzero(self._corpus.domains == domain)
            rows = np.random.default_rng([self._seed, number]).permutation(rows)
            members, strangers = np.split(rows, [2 * len(rows) // 3])
            statistics = self._summary(members, [*self._corpus.intents[members]] if labels else None)
            victims.append(Victim(members=members, strangers=strangers, statistics=statistics))
        return victims

    def _calibrated(self, victim: Victim, held_out: int) -> Victim:
        """The card calibrated on so many of the strangers, which are what is attacked then; 0: on its own prompts."""
        extra, strangers = np.split(victim.strangers, [held_out])
        prompts = Prompts(vectors=self._vectors[victim.members], held_out=self._vectors[extra])
        statistics = describe(prompts, self._probe, min_prompts=MIN_PROMPTS, budget_bytes=MAX_STATISTICS_BYTES)
        return Victim(members=extra if held_out else victim.members, strangers=strangers, statistics=statistics)

    def _sketched(self, victim: Victim, rank: int) -> Victim:
        """The card with the `rank` strongest directions of its prompts around their nearest prototypes."""
        x, prototypes = self._corpus.vectors[victim.members], victim.statistics.prototypes
        _, lengths, axes = np.linalg.svd(x - prototypes[distances(x, prototypes).argmin(axis=1)], full_matrices=False)
        sketch = (lengths[:, None] * axes)[:rank] / np.sqrt(len(x))
        return replace(victim, statistics=replace(victim.statistics, sketch=sketch))

    def _summary(self, rows: Rows, labels: Sequence[str] | None = None, m: int = MIN_PROMPTS) -> CardStatistics:
        """As `describe` makes them, with room for the calibration that it adds."""
        return summarise(
            self._vectors[rows],
            embedder=self._probe.embedder,
            probe=self._probe.digest,
            labels=labels,
            min_prompts=m,
            calibration_values=CALIBRATION_VALUES,
        )

    def _fit(self, statistics: CardStatistics, x: Array) -> Array:
        return fit(statistics, self._probe, x)

    def _calibration(self, statistics: CardStatistics, x: Array) -> Array:
        return calibration_match(statistics, self._probe, x)

    def _all_scores(self, victims: Sequence[Victim]) -> Figures:
        scores = {"prototypes": nearness, "sketch": inside_sketch, "fit": self._fit}
        figures: Figures = {}
        for name, score in scores.items():
            figures |= self._membership(name, victims, score)
        return figures

    def _membership(self, name: str, victims: Sequence[Victim], score: Score) -> Figures:
        """Mean AUROC of members against strangers of their intent, and members found at 1 % false alarms overall."""
        within, inside, outside = [], [], []
        for victim in victims:
            member, stranger = (
                score(victim.statistics, self._corpus.vectors[rows]) for rows in (victim.members, victim.strangers)
            )
            kinds, others = self._corpus.intents[victim.members], self._corpus.intents[victim.strangers]
            within += [auroc(member[kinds == kind], stranger[others == kind]) for kind in np.unique(kinds)]
            inside.append(member)
            outside.append(stranger)
        found = recall_at_false_rejection(-np.concatenate(outside), -np.concatenate(inside), FALSE_ALARMS)
        known = [value for value in within if value is not None]
        return {f"auroc {name}".strip(): float(np.mean(known)), f"found {name}".strip(): found.recall if found else 0.0}

    def _by_lists(self, victims: Sequence[Victim]) -> Figures:
        """Prototypes alone, and with lists of texts: the card's prompts among them, every other one, none."""
        rows = [self._one_list(victim) for victim in victims]
        lists = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
        return _shape(victims) | self._membership("prototypes", victims, nearness) | lists

    def _one_list(self, victim: Victim) -> Figures:
        everything = np.arange(len(self._corpus.texts))
        nearest = distances(self._corpus.vectors, victim.statistics.prototypes).argmin(axis=0)
        recall, precision = self._unmixing(victim, everything)
        half_recall, half_precision = self._unmixing(victim, np.setdiff1d(everything, victim.members[::2]))
        overlap, by_chance = self._overlap(victim, np.setdiff1d(everything, victim.members))
        return {
            "nearest in card": float(np.isin(nearest, victim.members).mean()),
            "unmixed": recall,
            "right": precision,
            "unmixed, half": half_recall,
            "right, half": half_precision,
            "F1": overlap,
            "F1 chance": by_chance,
        }

    def _unmixing(self, victim: Victim, candidates: Rows) -> tuple[float, float]:
        """Share of the card's prompts among `candidates` that are named, and share of the named that are the card's."""
        vectors, statistics = self._corpus.vectors[candidates], victim.statistics
        pairs = zip(statistics.prototypes, statistics.counts, strict=True)
        named = np.unique(np.concatenate([candidates[unmixed(mean, count, vectors)] for mean, count in pairs]))
        right = np.isin(named, victim.members).sum()
        return right / np.isin(candidates, victim.members).sum(), right / max(len(named), 1)

    def _overlap(self, victim: Victim, candidates: Rows) -> tuple[float, float]:
        """Words shared with the prompt nearest to a prototype: by the nearest candidate, and by any stranger."""
        texts, vectors = self._corpus.texts, self._corpus.vectors
        prototypes = victim.statistics.prototypes
        private = victim.members[distances(vectors[victim.members], prototypes).argmin(axis=0)]
        guesses = candidates[distances(vectors[candidates], prototypes).argmin(axis=0)]
        strangers = np.resize(victim.strangers, len(private))
        found, chance = (
            [token_f1(texts[one], texts[other]) for one, other in zip(private, guess, strict=True)]
            for guess in (guesses, strangers)
        )
        return float(np.mean(found)), float(np.mean(chance))


def read_corpus(featurizer: Featurizer) -> Corpus:
    """Both data sets, all splits; of texts that differ in capitals or white space only, the first."""
    clinc = json.loads((data_dir() / "clinc150_data_full.json").read_text(encoding="utf-8"))
    domains = json.loads((data_dir() / "clinc150_domains.json").read_text(encoding="utf-8"))
    splits = [clinc[split] for split in ("train", "val", "test")]
    splits += [_banking("banking77_train.csv"), _banking("banking77_test.csv"), clinc["oos_test"]]
    vectors = np.concatenate([embedded(featurizer, [text for text, _ in split]) for split in splits])
    pairs = [pair for split in splits for pair in split]
    first = sorted({" ".join(text.lower().split()): row for row, (text, _) in reversed([*enumerate(pairs)])}.values())
    domain_of = {intent: domain for domain, intents in domains.items() for intent in intents}
    return Corpus(
        texts=tuple(pairs[row][0] for row in first),
        vectors=vectors[first].astype(np.float64),
        intents=np.array([pairs[row][1] for row in first]),
        domains=np.array([domain_of.get(pairs[row][1], "") for row in first]),
    )


def table(rows: Mapping[str, Figures]) -> str:
    """Rows of figures, one column per name."""
    names = list(next(iter(rows.values())))
    lines = [f"{'':16}" + "".join(f"{name:>{max(len(name), 6) + 2}}" for name in names)]
    lines += [
        f"{title:16}" + "".join(f"{figures[name]:>{max(len(name), 6) + 2}.3g}" for name in names)
        for title, figures in rows.items()
    ]
    return "\n".join(lines)


def _banking(name: str) -> list[tuple[str, str]]:
    with (data_dir() / name).open(encoding="utf-8", newline="") as file:
        return [(row["text"], row["category"]) for row in csv.DictReader(file)]


def _groups(x: Array, m: int) -> list[str]:
    """Ward's clusters of about m rows, as labels."""
    if m == 1:
        return [str(row) for row in range(len(x))]
    return [str(group) for group in fcluster(linkage(x, "ward"), len(x) // m, "maxclust")]


def _best(figures: Figures) -> float:
    return max(value for name, value in figures.items() if name.startswith("auroc"))


def _shape(victims: Sequence[Victim]) -> Figures:
    """Means over the cards."""
    cards = [victim.statistics for victim in victims]
    return {
        "prototypes": float(np.mean([len(card.counts) for card in cards])),
        "prompts each": float(np.mean([card.counts.mean() for card in cards])),
        "rank": float(np.mean([len(card.sketch) for card in cards])),
    }


if __name__ == "__main__":
    main()
