"""What routing does for the task: six real adapters on SmolLM2 answer, and each router chooses who answers what.

    python -m benchmarks.routing_tasks [--rows 40] [--threads 2]

Rows are of CLINC150's test split; a row is right if its greedy answer is its intent's name. Adapters, heads and cards'
statistics saw `train`, `val` chose settings and the state that Stage 2 keeps. No router abstains here.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from arrowmoe.base_model import BaseModel, default_cache, load_base_model
from arrowmoe.engine import ArrowEngine
from arrowmoe.features import TextFeaturizer
from arrowmoe.routing.arrow_score import ArrowScorer
from arrowmoe.routing.dataset import RoutingExample
from arrowmoe.routing.gates import Gates
from arrowmoe.routing.generative import GenerativeRouter
from arrowmoe.routing.modes import Mode, gate
from arrowmoe.routing.probe import measured, sentences
from arrowmoe.routing.spectral import SpectralScorer
from benchmarks.harness import Target, report
from benchmarks.routing_adapters import BASE, Expert, adapters, hits, prompt_of, router_lora
from benchmarks.routing_data import EMBEDDER, Rows, embedded
from benchmarks.routing_measures import Table, described, percent, rounded, router, show
from benchmarks.routing_peers import mlp
from benchmarks.routing_stages import STAGES, Staged, staged
from registry.logs import get_logger

ROWS_PER_DOMAIN = 40
PROBE_TEXTS = 128
MLP_SEEDS = (0, 1, 2)
MIXED: tuple[Mode, ...] = ("top2", "soft")
CLOSED_FORM = "closed form"

log = get_logger(__name__)

Scores = npt.NDArray[np.float64]
"""(rows, experts), the greatest is chosen."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Asked:
    """Test rows, and the column of the expert that each is of."""

    experts: Sequence[Expert]
    rows: tuple[RoutingExample, ...]

    @property
    def names(self) -> list[str]:
        """The experts' names, one a column."""
        return [expert.card.name for expert in self.experts]

    @property
    def expected(self) -> npt.NDArray[np.intp]:
        """(rows,)."""
        return np.array([self.names.index(str(row.card)) for row in self.rows], dtype=np.intp)

    @property
    def prompts(self) -> list[str]:
        """What the experts are asked."""
        return [prompt_of(row) for row in self.rows]


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=ROWS_PER_DOMAIN, help="test rows of each domain (default 40)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    start = time.perf_counter()
    asked = drawn(adapters(), arguments.rows)
    base = load_base_model(BASE, device="cpu", dtype="float32")
    scores = by_weights(base, asked) | by_embedding(asked)
    stages = staged(base, asked.experts, asked.prompts)
    collapse = collapses(asked, stages)
    show("a planted collapse (%)", collapse)
    engine = ArrowEngine(base)
    for expert in asked.experts:
        engine.load_lora(expert.card)
    right = answered(engine, asked)
    tasks = end_tasks(engine, asked, right, scores | {"generative": generative(engine, asked)})
    show("end task, one adapter a row (%)", tasks)
    mixing = ablation(engine, asked, right, {CLOSED_FORM: scores[CLOSED_FORM]} | stages.logits)
    show(f"modes and losses (%); Stage 1 on {STAGES.shots} prompts a card", mixing)
    figures = {"tasks": tasks, "ablation": mixing, "collapse": collapse}
    about: dict[str, Any] = {"rows": len(asked.rows), "seconds": time.perf_counter() - start, **figures}
    report("routing_tasks", "the oracle, which knows each row's adapter", targets(figures), rounded(about))


def drawn(experts: Sequence[Expert], count: int, seed: int = 0) -> Asked:
    """`count` test rows of each expert, drawn at random."""
    rng = np.random.default_rng(seed)
    rows = [expert.test[at] for expert in experts for at in rng.permutation(len(expert.test))[:count]]
    return Asked(experts=experts, rows=tuple(rows))


def by_weights(base: BaseModel, asked: Asked) -> dict[str, Scores]:
    """Routers that read the adapters' weights and nothing else."""
    cards = [expert.card for expert in asked.experts]
    probe = [prompt_of(RoutingExample(text=text, card=None)) for text in sentences()[:PROBE_TEXTS]]
    return {
        "Arrow": ArrowScorer(base, cards).scores(asked.prompts).astype(np.float64),
        "spectral": SpectralScorer(base, cards, probe).scores(asked.prompts).astype(np.float64),
    }


def by_embedding(asked: Asked) -> dict[str, Scores]:
    """Routers on all-MiniLM-L6-v2: the closed form on what cards carry, and a head on all prompts in one place."""
    featurizer = TextFeaturizer(ArrowEngine(load_base_model(EMBEDDER, device="cpu", dtype="float32")))

    def rows_of(rows: Sequence[RoutingExample]) -> Rows:
        return Rows(
            vectors=embedded(featurizer, [row.text for row in rows]),
            cards=np.array([row.card for row in rows]),
            intents=np.array([row.label for row in rows]),
        )

    train = rows_of([row for expert in asked.experts for row in expert.train])
    held_out = rows_of([row for expert in asked.experts for row in expert.val])
    x = rows_of(asked.rows).vectors
    probe = measured(featurizer, default_cache())
    cards = described(train, probe, with_intents=True, held_out=held_out)
    columns = [sorted(asked.names).index(name) for name in asked.names]
    found = router(cards).exact(x.astype(np.float64), asked.names)
    heads = {f"MLP head, seed {seed}": mlp(train.vectors, train.cards, seed)(x)[:, columns] for seed in MLP_SEEDS}
    return {CLOSED_FORM: np.stack([row.values for row in found])} | heads


def generative(engine: ArrowEngine, asked: Asked) -> Scores:
    """Log probability that the router LoRA writes each expert's name, on the engine's own base."""
    writer = GenerativeRouter(engine, router_lora())
    scores = writer.log_probs_nats([row.text for row in asked.rows])
    engine.remove_lora(writer.card.digest)
    return scores[:, [writer.names.index(name) for name in asked.names]].double().numpy()


def answered(engine: ArrowEngine, asked: Asked) -> npt.NDArray[np.bool_]:
    """(rows, experts): whether each expert answers each row right."""
    return np.stack([hits(engine, name, asked.rows) for name in asked.names], axis=1)


def end_tasks(engine: ArrowEngine, asked: Asked, right: npt.NDArray[np.bool_], scores: Mapping[str, Scores]) -> Table:
    """Exact match of every router, beside the share of rows that it gave to their own expert."""
    uniform = np.full(right.shape, 1 / right.shape[1])
    bounds = {
        "oracle": judged(asked, right, np.eye(right.shape[1])[asked.expected]),
        "random": {"routed": 100 / right.shape[1], "exact_match": 100 * float(right.mean())},
        "uniform soft": {"exact_match": percent(hits(engine, gates_of(asked, uniform), asked.rows))},
    }
    table = bounds | {name: judged(asked, right, own) for name, own in scores.items()}
    oracle = bounds["oracle"]["exact_match"]
    return {name: own | {"of_oracle": 100 * own["exact_match"] / oracle} for name, own in table.items()}


def ablation(engine: ArrowEngine, asked: Asked, right: npt.NDArray[np.bool_], logits: Mapping[str, Scores]) -> Table:
    """Exact match of each router's choice and mixtures, and the entropy of its gates (nats)."""
    return {name: judged(asked, right, own) | mixtures(engine, asked, own) for name, own in logits.items()}


def mixtures(engine: ArrowEngine, asked: Asked, logits: Scores) -> dict[str, float]:
    """Exact match where several adapters answer a row together."""
    p = torch.from_numpy(logits).softmax(dim=-1)
    weights = {mode: gate(torch.from_numpy(logits), mode).numpy() for mode in MIXED}
    found = {mode: percent(hits(engine, gates_of(asked, own), asked.rows)) for mode, own in weights.items()}
    return found | {"entropy_nats": float(torch.special.entr(p).sum(dim=-1).mean())}


def judged(asked: Asked, right: npt.NDArray[np.bool_], scores: Scores) -> dict[str, float]:
    """Of rows that are given to the expert with the greatest score: how many to their own, how many answered right."""
    own = right[np.arange(len(right)), scores.argmax(axis=1)]
    return {"routed": routed(asked, scores), "exact_match": percent(own)}


def routed(asked: Asked, scores: Scores) -> float:
    """The share of rows that are given to their own expert."""
    return percent(scores.argmax(axis=1) == asked.expected)


def gates_of(asked: Asked, weights: Scores) -> Gates:
    """Weights (rows, experts) as the engine takes them."""
    digests = tuple(expert.card.digest for expert in asked.experts)
    return Gates(adapters=digests, names=tuple(asked.names), weights=weights.astype(np.float32))


def collapses(asked: Asked, stages: Staged) -> Table:
    """A head that gave all rows to one card, and what Stage 2 made of it, with and without the load-balance term."""
    return {
        name: {"routed": routed(asked, own), "largest_share": 100 * largest_share(own)}
        for name, own in stages.collapse.items()
    }


def largest_share(logits: Scores) -> float:
    """The share of rows that the most used expert gets."""
    return float(np.bincount(logits.argmax(axis=1)).max() / len(logits))


def targets(figures: Mapping[str, Table]) -> list[Target]:
    """Part 5 of what the router must show."""
    tasks, mixing, collapse = figures["tasks"], figures["ablation"], figures["collapse"]
    gain = mixing["Stage 2"]["exact_match"] - mixing["Stage 1"]["exact_match"]
    return [
        Target(name="closed form, % of the oracle", value=tasks[CLOSED_FORM]["of_oracle"], op=">=", bar=97),
        Target(name="Stage 2 less Stage 1, points", value=gain, op=">=", bar=0),
        Target(name="planted collapse: share of one card", value=collapse["planted"]["largest_share"], op=">=", bar=99),
        Target(name="after balancing: share of one card", value=collapse["balanced"]["largest_share"], op="<=", bar=50),
    ]


if __name__ == "__main__":
    main()
