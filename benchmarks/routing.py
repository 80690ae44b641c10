"""The closed-form router on CLINC150 and BANKING77, frozen all-MiniLM-L6-v2, against routers that are trained.

    python -m benchmarks.routing [--only PART] [--cards 10000]

Settings of the router were chosen on training and validation splits; test splits are read here, for the figures.
`train` describes a card, `val` calibrates it, and chooses the regression's l2. Peers see all prompts in one place.
Three seeds draw the prompts of a cold start, an MLP's weights and batches, the folds of cross-fitting, and churn.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage

from arrowmoe.features import Vectors
from arrowmoe.routing.statistics import MAX_PROTOTYPES, MIN_PROMPTS
from benchmarks.harness import Op, Target, report
from benchmarks.routing_data import Material, Names, Rows, material
from benchmarks.routing_measures import (
    Decided,
    Statistics,
    Table,
    decided,
    described,
    fits_and_p_values,
    judged,
    percent,
    rounded,
    router,
    separated,
    show,
    spread,
)
from benchmarks.routing_peers import Learner, Peers, by_card, chosen_l2
from benchmarks.routing_scale import churn, many_cards
from registry.manifest import MAX_STATISTICS_BYTES

PARTS = ("domains", "left_out", "banking77", "cold_start", "scale")
SEEDS = (0, 1, 2)
ALPHAS = (0.01, 0.05, 0.10)
BUDGETS_KIB = (4, 8, 16, 32, 64)
FEW = {5: 70.0, 20: 86.0, 100: 94.5}
"""Examples per card, and the accuracy (%) that is asked for."""
OURS = "closed form"


@dataclass(kw_only=True)
class Part:
    """What one question found."""

    targets: list[Target] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def ask(self, name: str, value: float, op: Op, bar: float) -> None:
        """Hold a figure against its bar."""
        self.targets.append(Target(name=name, value=value, op=op, bar=bar))


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cards", type=int, default=10_000, help="cards of the largest index (default 10000)")
    parser.add_argument("--only", choices=PARTS, help="one part")
    arguments = parser.parse_args()
    found = material()
    l2 = chosen_l2(found.train.vectors, found.train.cards, found.val.vectors, found.val.cards)
    measures: dict[str, Callable[[], Part]] = {
        "domains": lambda: domains(found, l2),
        "left_out": lambda: left_out(found, l2),
        "banking77": lambda: banking(found, l2),
        "cold_start": lambda: cold_start(found, l2),
        "scale": lambda: scale(found, arguments.cards),
    }
    parts = {name: measures[name]() for name in PARTS if arguments.only in (None, name)}
    targets = [target for part in parts.values() for target in part.targets]
    figures = {name: rounded(part.figures) for name, part in parts.items()}
    print()
    report("routing", "centroids, nearest example, logistic regression, MLP head", targets, figures)


def domains(found: Material, l2: float) -> Part:
    """CLINC150's ten domains as ten cards: accuracy, what is out of scope, size, and whether α is kept."""
    part, table = Part(), Table()
    for labels, bar in (("intent", 97.7), ("card", 97.0)):
        cards = described(found.train, found.probe, with_intents=labels == "intent", held_out=found.val)
        form = router(cards)
        inside, outside = decided(form, found.test.vectors), decided(form, found.out_of_scope)
        way = table[f"{OURS}, {labels} labels"] = judged(inside, outside, found.test.cards)
        part.ask(f"accuracy, {labels} labels (%)", way["accuracy"], ">=", bar)
        part.ask(f"out-of-scope AUROC, {labels} labels (%)", way["auroc"], ">=", 97.5)
        part.ask(f"out-of-scope recall at 5 %, {labels} labels (%)", way["recall_at_5"], ">=", 88.0)
        part.ask(f"statistics, {labels} labels (bytes)", largest(cards), "<=", MAX_STATISTICS_BYTES)
        part.figures[f"acceptance_{labels}_labels"] = acceptance = accepted(found, cards, inside, outside)
        for alpha, found_at in acceptance["by_alpha"].items():
            for whom, rejected in (("right card", "rejected_by_right_card"), ("chosen card", "rejected_in_scope")):
                off = abs(found_at[rejected] - 100 * float(alpha))
                part.ask(f"false rejection by the {whom}, off α = {alpha}, {labels} labels (points)", off, "<=", 1.5)
        show(f"Acceptance by p-value, {labels} labels (%)", acceptance["by_alpha"])
    part.figures["routers"] = table | judged_peers(found, l2)
    part.figures["by_budget"] = by_budget(found)
    part.figures["cross_fitted"] = cross_fitted(found)
    show("CLINC150, ten domains as ten cards (%)", part.figures["routers"])
    show("CLINC150 by budget, card labels (%)", part.figures["by_budget"])
    show("False rejection of cards calibrated on train alone, by cross-fitting (%)", part.figures["cross_fitted"])
    return part


def accepted(found: Material, cards: Statistics, inside: Decided, outside: Decided) -> dict[str, Any]:
    """Rows rejected at each α by the p-value under the card that was chosen, and under the card that is right."""
    fits, p_inside = fits_and_p_values(cards, found.probe, found.test.vectors, inside[0])
    out_fits, p_outside = fits_and_p_values(cards, found.probe, found.out_of_scope, outside[0])
    _, p_right = fits_and_p_values(cards, found.probe, found.test.vectors, found.test.cards)
    by_alpha = {
        f"{alpha}": {
            "rejected_in_scope": percent(p_inside < alpha),
            "rejected_out_of_scope": percent(p_outside < alpha),
            "rejected_by_right_card": percent(p_right < alpha),
            **{
                f"card_{end}": pick(percent(p_right[found.test.cards == name] < alpha) for name in cards)
                for end, pick in (("least", min), ("most", max))
            },
        }
        for alpha in ALPHAS
    }
    return {"by_alpha": by_alpha, "fit": separated(fits, out_fits), "p_value": separated(p_inside, p_outside)}


def judged_peers(found: Material, l2: float) -> Table:
    """Peers on card labels and on intent labels; the MLP head once for each seed."""
    table = Table()
    for labels, classes in (("card", found.train.cards), ("intent", found.train.intents)):
        card_of = dict(zip(classes.tolist(), found.train.cards.tolist(), strict=True))
        for name, learn in Peers(l2).all().items():
            table[f"{name}, {labels} labels"] = judged_peer(learn, found, classes, card_of)
        for seed in SEEDS[1:]:
            learn = Peers(l2, seed).mlp()
            table[f"MLP head, {labels} labels, seed {seed}"] = judged_peer(learn, found, classes, card_of)
    return table


def judged_peer(learn: Learner, found: Material, classes: Names, card_of: Mapping[str, str]) -> dict[str, float]:
    """One peer, taught `classes`, judged by cards."""
    score, names = learn(found.train.vectors, classes), np.unique(found.train.cards)

    def decide(x: Vectors) -> Decided:
        scores = by_card(score(x), np.unique(classes).tolist(), card_of)
        return names[scores.argmax(axis=1)], scores.max(axis=1)

    return judged(decide(found.test.vectors), decide(found.out_of_scope), found.test.cards)


def by_budget(found: Material) -> Table:
    """Accuracy and AUROC by size: at most half of it for prototypes, the rest for calibration and sketch."""
    table, d = Table(), found.train.vectors.shape[1]
    for kib in BUDGETS_KIB:
        number = min(MAX_PROTOTYPES, kib * 1024 // 2 // (2 * d))
        clustered = Rows(
            vectors=found.train.vectors, cards=found.train.cards, intents=clusters_by_card(found.train, number)
        )
        cards = described(clustered, found.probe, with_intents=True, held_out=found.val, budget_bytes=kib * 1024)
        form = router(cards)
        judgement = judged(decided(form, found.test.vectors), decided(form, found.out_of_scope), found.test.cards)
        table[f"{kib} KiB"] = {"bytes": largest(cards), "prototypes": number, **judgement}
    return table


def clusters_by_card(rows: Rows, number: int) -> Names:
    """Ward's clusters of each card's prompts, `number` per card, by name."""
    found = np.zeros(len(rows), dtype=object)
    for card in np.unique(rows.cards):
        own = rows.cards == card
        found[own] = [f"{at}" for at in fcluster(linkage(rows.vectors[own], "ward"), number, "maxclust")]
    return found.astype(str)


def cross_fitted(found: Material) -> Table:
    """How often the right card rejects, where no prompt was held out and folds of the card's own calibrate it."""
    table = Table()
    for labels in ("intent", "card"):
        p_values = []
        for seed in SEEDS:
            cards = described(found.train, found.probe, with_intents=labels == "intent", seed=seed)
            p_values.append(fits_and_p_values(cards, found.probe, found.test.vectors, found.test.cards)[1])
        table[f"{labels} labels"] = {f"{alpha}": percent(np.stack(p_values) < alpha) for alpha in ALPHAS}
    return table


def left_out(found: Material, l2: float) -> Part:
    """Each domain in turn is what no card is for; the others are cards described with intent labels."""
    part, cards = Part(), described(found.train, found.probe, with_intents=True, held_out=found.val)
    form, gaps = router(cards), {}
    for name in cards:
        form.remove(name)
        gaps[name] = gap_auroc(decided(form, found.test.vectors)[1], found.test.cards == name)
        form.add(name, cards[name])
    part.figures["auroc_by_domain"] = gaps
    table = part.figures["routers"] = {f"{OURS}, intent labels": spread(gaps.values())}
    for peer, learn in Peers(l2).all().items():
        table[f"{peer}, intent labels"] = spread([gap_of_peer(learn, found, name) for name in cards])
    part.ask("gap AUROC, mean (%)", table[f"{OURS}, intent labels"]["mean"], ">=", 96.5)
    part.ask("gap AUROC, least (%)", table[f"{OURS}, intent labels"]["least"], ">=", 93.0)
    show("CLINC150, one domain left out: AUROC against the other nine, over domains (%)", table)
    return part


def gap_of_peer(learn: Learner, found: Material, name: str) -> float:
    """A peer's gap AUROC after it learnt the intents of all domains but one."""
    train = found.train.where(found.train.cards != name)
    card_of = dict(zip(train.intents.tolist(), train.cards.tolist(), strict=True))
    scores = learn(train.vectors, train.intents)(found.test.vectors)
    best = by_card(scores, np.unique(train.intents).tolist(), card_of).max(axis=1)
    return gap_auroc(best, found.test.cards == name)


def gap_auroc(scores: Any, is_gap: Any) -> float:
    """How well scores tell rows of the gap from the rest."""
    return separated(scores[~is_gap], scores[is_gap])["auroc"]


def banking(found: Material, l2: float) -> Part:
    """BANKING77: 77 cards that lie close together; described by default, and with nothing to keep private."""
    part, train, test = Part(), found.banking_train, found.banking_test
    names, table = np.unique(train.cards), {}
    for way, min_prompts in ((OURS, MIN_PROMPTS), (f"{OURS}, public prompts", 1)):
        form = router(described(train, found.probe, min_prompts=min_prompts))
        table[way] = {"accuracy": percent(decided(form, test.vectors)[0] == test.cards)}
    for peer, learn in Peers(l2).all().items():
        chosen = names[learn(train.vectors, train.cards)(test.vectors).argmax(axis=1)]
        table[peer] = {"accuracy": percent(chosen == test.cards)}
    part.figures["routers"] = table
    part.ask("BANKING77 as 77 cards, accuracy (%)", table[OURS]["accuracy"], ">=", 93.0)
    show("BANKING77 as 77 cards (%)", table)
    return part


def cold_start(found: Material, l2: float) -> Part:
    """A few examples per card, each kept as it is, with and without the phrases of the card's description."""
    part = Part()
    for few, bar in FEW.items():
        runs = [cold_started(found, few, Peers(l2, seed)) for seed in SEEDS]
        table = part.figures[f"{few}_examples"] = {name: spread([run[name] for run in runs]) for name in runs[0]}
        ours = table[f"{OURS}, described"]["mean"]
        part.ask(f"{few} examples per card and a sentence, accuracy (%)", ours, ">=", bar)
        show(f"CLINC150, {few} examples per card, accuracy over seeds (%)", table)
    return part


def cold_started(found: Material, few: int, peers: Peers) -> dict[str, float]:
    """Accuracy of everyone from the same draw; peers take the phrases as further examples."""
    rng, names = np.random.default_rng(peers.seed), np.unique(found.train.cards)
    drawn = [rng.choice(np.flatnonzero(found.train.cards == name), few, replace=False) for name in names]
    train, phrases = found.train.where(np.concatenate(drawn)), found.phrases
    x = np.concatenate([train.vectors, *(phrases[name] for name in names)])
    classes = np.concatenate([train.cards, np.repeat(names, [len(phrases[name]) for name in names])])
    accuracies = {}
    for words, public, vectors, of in (("alone", None, train.vectors, train.cards), ("described", phrases, x, classes)):
        cards = described(train, found.probe, public=public, min_prompts=1)
        accuracies[f"{OURS}, {words}"] = percent(decided(router(cards), found.test.vectors)[0] == found.test.cards)
        for peer, learn in peers.all().items():
            chosen = names[learn(vectors, of)(found.test.vectors).argmax(axis=1)]
            accuracies[f"{peer}, {words}"] = percent(chosen == found.test.cards)
    return accuracies


def scale(found: Material, cards: int) -> Part:
    """Cards that come and go among 1,000, and a decision among many."""
    part = Part()
    table = {f"churn, seed {seed}": churn(found, seed) for seed in SEEDS}
    many = many_cards(found, cards, SEEDS[0])
    part.figures = {**table, "many": many}
    worst = {key: max(run[key] for run in table.values()) for key in next(iter(table.values()))}
    part.ask("churn: scores against a refit (relative)", worst["relative_error"], "<=", 1e-6)
    part.ask(
        "churn: from a card's arrival to a decision that may choose it, p99 (ms)", worst["arrival_p99_ms"], "<=", 20
    )
    part.ask(f"decision among {cards} cards, median (ms)", many["decision_median_ms"], "<=", 5)
    part.ask(f"decision among {cards} cards, p99 (ms)", many["decision_p99_ms"], "<=", 5)
    part.ask(f"shortlist agrees with the exact score, {cards} cards (%)", many["agreement"], ">=", 99.5)
    show("Churn among 1,000 cards, and many cards", part.figures)
    return part


def largest(cards: Statistics) -> int:
    """Bytes of the largest card's statistics."""
    return max(card.nbytes for card in cards.values())


if __name__ == "__main__":
    main()
