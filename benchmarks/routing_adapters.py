"""Six real adapters and a router LoRA, the material of the routing benchmark: CLINC150's first six domains on SmolLM2.

    python -m benchmarks.routing_adapters [--threads 2]

Each adapter answers a sentence with the name of its intent, in a prompt that does not name the domain, so an adapter
of another domain cannot be right. Training reads `train`, the settings were chosen on `val`, `test` is handed out and
never read here. What was trained is kept in the user's cache, under a digest of everything that decides it.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from arrowmoe.arguments import Adapter
from arrowmoe.base_model import BaseModel, default_cache, load_base_model
from arrowmoe.engine import ArrowEngine
from arrowmoe.routing.dataset import RoutingExample
from arrowmoe.routing.gates import Gates
from arrowmoe.routing.generative import train_router_lora
from evolution.fine_tuning import FineTuning, Pair, fine_tune
from registry.card import LoRACard
from registry.digest import digest_of, hex_of
from registry.errors import ArrowMoEError
from registry.format import LoRAFormat
from registry.logs import get_logger

BASE = "builtin:smollm2"
DOMAINS = 6
FORM = "{text}\nIntent:"
ROUTER_NAME = "clinc-router"
EXPERT_TUNING = FineTuning(steps=90, learning_rate=2e-3, layers=(12, 30))
ROUTER_TUNING = FineTuning(steps=120, learning_rate=2e-3, layers=(12, 30))
MAX_NEW_TOKENS = 10
BATCH_ROWS = 64

log = get_logger(__name__)


class DataMissingError(ArrowMoEError):
    """The data sets are not where they are looked for."""


@dataclass(frozen=True, kw_only=True)
class Expert:
    """An adapter, the CLINC150 domain it is for, and that domain's rows: a row's answer is its intent in words."""

    card: LoRACard
    domain: str
    train: tuple[RoutingExample, ...]
    val: tuple[RoutingExample, ...]
    test: tuple[RoutingExample, ...]


def main() -> None:
    """Train what the cache lacks, and say what there is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    torch.set_num_threads(parser.parse_args().threads)
    for expert in adapters():
        manifest = expert.card.manifest
        print(f"{expert.domain:24} {manifest.training['seconds']:6.1f} s  val {manifest.evaluation['val']:.3f}")
    router = router_lora().manifest
    print(f"{router.name:24} {router.training['seconds']:6.1f} s")


def adapters() -> list[Expert]:
    """The six experts, trained where the cache lacks them. Raises `DataMissingError`."""
    clinc, domains = read_data("clinc150_data_full.json"), read_data("clinc150_domains.json")
    return [_expert(domain, domains[domain], clinc) for domain in list(domains)[:DOMAINS]]


def router_lora() -> LoRACard:
    """The generative router's LoRA over the six experts' names, trained where the cache lacks it."""
    examples = [example for expert in adapters() for example in expert.train]
    recipe = {"tuning": asdict(ROUTER_TUNING), "rows": _digest([asdict(row) for row in examples])}
    return _cached(ROUTER_NAME, recipe, lambda: _train_router(examples))


def exact_match(engine: ArrowEngine, adapter: Adapter, rows: Sequence[RoutingExample]) -> float:
    """The share of `rows` that are answered exactly; `adapter` is `generate`'s: a name, one per row, or `Gates`."""
    return float(hits(engine, adapter, rows).mean())


def hits(engine: ArrowEngine, adapter: Adapter, rows: Sequence[RoutingExample]) -> npt.NDArray[np.bool_]:
    """(rows,): whether the greedy answer is the row's, after stripping white space."""
    right = np.zeros(len(rows), dtype=bool)
    by_length = sorted(range(len(rows)), key=lambda index: len(rows[index].text))
    for start in range(0, len(rows), BATCH_ROWS):
        batch = by_length[start : start + BATCH_ROWS]
        prompts = [prompt_of(rows[index]) for index in batch]
        made = engine.generate(prompts, _of_rows(adapter, batch), max_new_tokens=MAX_NEW_TOKENS)
        right[batch] = [answer.text.strip() == rows[index].answer for answer, index in zip(made, batch, strict=True)]
    return right


def prompt_of(row: RoutingExample) -> str:
    """What an expert is asked."""
    return FORM.format(text=row.text)


def data_directory() -> Path:
    """Where the data sets are: `$ARROWMOE_DATA`, else beside the repository."""
    return Path(os.environ.get("ARROWMOE_DATA") or Path(__file__).parents[2] / "shared" / "data")


def _expert(domain: str, intents: Sequence[str], clinc: Mapping[str, Sequence[tuple[str, str]]]) -> Expert:
    name = domain.replace("_", "-")
    train, val, test = (_rows(name, intents, clinc[split]) for split in ("train", "val", "test"))
    recipe = {"tuning": asdict(EXPERT_TUNING), "form": FORM, "rows": _digest([asdict(row) for row in train])}
    card = _cached(name, recipe, lambda: _train_expert(name, train, val))
    return Expert(card=card, domain=domain, train=train, val=val, test=test)


def _rows(card: str, intents: Sequence[str], pairs: Sequence[tuple[str, str]]) -> tuple[RoutingExample, ...]:
    wanted = frozenset(intents)
    return tuple(
        RoutingExample(text=text, card=card, label=intent, answer=intent.replace("_", " "))
        for text, intent in pairs
        if intent in wanted
    )


def _train_expert(name: str, train: Sequence[RoutingExample], val: Sequence[RoutingExample]) -> LoRACard:
    base = _base("bfloat16")
    pairs = [Pair(prompt=prompt_of(row), answer=f" {row.answer}") for row in train]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        peft = Path(directory) / name
        fine_tune(base.model, base.tokenizer, pairs, EXPERT_TUNING, base_name=base.name, directory=peft)
        seconds = time.perf_counter() - start
        card = LoRACard.from_peft(peft, training={"seconds": seconds, **asdict(EXPERT_TUNING)})
    engine = ArrowEngine(_base("float32"))
    score = exact_match(engine, engine.load_lora(card), val)
    engine.remove_lora(name)
    log.info("expert", name=name, seconds=round(seconds), val=score)
    return card.describe(evaluation={"metric": "exact_match", "val": score, "rows": len(val)})


def _train_router(examples: Sequence[RoutingExample]) -> LoRACard:
    return train_router_lora(_base("bfloat16"), examples, ROUTER_TUNING, name=ROUTER_NAME)


def _cached(name: str, recipe: Mapping[str, Any], make: Callable[[], LoRACard]) -> LoRACard:
    """The card of this name and recipe, from the cache or made."""
    directory = default_cache() / "routing-adapters"
    path = directory / f"{name}-{_digest({'base': BASE, **recipe})[:16]}.lora.arrow"
    if not path.is_file():
        directory.mkdir(parents=True, exist_ok=True)
        LoRAFormat.save(make(), path)
    return LoRAFormat.load(path)


@cache
def _base(dtype: str) -> BaseModel:
    return load_base_model(BASE, device="cpu", dtype=dtype)


def _of_rows(adapter: Adapter, batch: Sequence[int]) -> Adapter:
    """What `adapter` says of the rows `batch`."""
    if isinstance(adapter, Gates):
        return adapter.rows(batch)
    if adapter is None or isinstance(adapter, str | Mapping):
        return adapter
    return [adapter[index] for index in batch]


def read_data(name: str) -> Any:
    """A JSON file of the data sets. Raises `DataMissingError`."""
    path = data_directory() / name
    if not path.is_file():
        raise DataMissingError(
            f"expected {name} in {data_directory()}, got no such file",
            hint="run `python -m scripts.data`, or set ARROWMOE_DATA to where the data sets are",
        )
    return json.loads(path.read_text(encoding="utf-8"))


def _digest(value: Any) -> str:
    return hex_of(digest_of(json.dumps(value, sort_keys=True).encode()))


if __name__ == "__main__":
    main()
