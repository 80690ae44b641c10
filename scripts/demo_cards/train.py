"""Makes the four cards of `arrowmoe demo`: `python -m scripts.demo_cards.train --out DIR`.

For each card: write its data, score the bare base, train, save as bf16, score what was saved.
Scores are taken on the fp32 base, which is what the demo runs; the language model trains in bf16.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from evolution.fine_tuning import save_bf16
from registry.logs import get_logger
from scripts.demo_cards import adapters, bases, cards, causal, encoder
from scripts.demo_cards.recipes import RECIPES, CausalRecipe, EncoderRecipe
from scripts.demo_cards.splits import Labelled, Pair, Split, write_jsonl

DATA_DIRECTORY: Final = Path(__file__).parents[2] / "arrowmoe" / "demo_data"
THREADS: Final = 2

Score = Callable[[Any], float]
Train = Callable[[Any], None]

log = get_logger(__name__)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    options.data.mkdir(parents=True, exist_ok=True)
    for recipe in RECIPES:
        if options.only in (None, recipe.name):
            make(recipe, out=options.out, data=options.data)


def make(recipe: CausalRecipe | EncoderRecipe, *, out: Path, data: Path) -> None:
    """One card: its PEFT directory under `out`, its data and its entry under `data`."""
    if isinstance(recipe, CausalRecipe):
        split = recipe.data()
        _make_causal(recipe, split, out=out, data=data)
    else:
        _make_encoder(recipe, recipe.data(), out=out, data=data)


def _make_causal(recipe: CausalRecipe, split: Split[Pair], *, out: Path, data: Path) -> None:
    base, tokenizer = bases.load_causal("float32")
    trainee, _ = bases.load_causal("bfloat16")
    _finish(
        recipe,
        split,
        base=base,
        trainee=trainee,
        train=lambda model: causal.train(model, tokenizer, split.train, recipe.tuning),
        score=lambda model: causal.exact_match(model, tokenizer, split.heldout),
        out=out,
        data=data,
    )


def _make_encoder(recipe: EncoderRecipe, split: Split[Labelled], *, out: Path, data: Path) -> None:
    base, tokenizer = bases.load_encoder("float32")
    trainee, _ = bases.load_encoder("float32")
    _finish(
        recipe,
        split,
        base=base,
        trainee=trainee,
        train=lambda model: encoder.train(model, tokenizer, split.train, recipe.tuning),
        score=lambda model: encoder.nearest_neighbour_accuracy(model, tokenizer, split.heldout, split.reference),
        out=out,
        data=data,
    )


def _finish(
    recipe: CausalRecipe | EncoderRecipe,
    split: Split[Pair] | Split[Labelled],
    *,
    base: Any,
    trainee: Any,
    train: Train,
    score: Score,
    out: Path,
    data: Path,
) -> None:
    _write_data(recipe.name, split, data)
    base_score = score(base)
    adapted = adapters.attach(trainee, recipe)
    start = time.perf_counter()
    train(adapted)
    seconds = time.perf_counter() - start
    save_bf16(adapted, out / recipe.name)
    card_score = score(adapters.load(base, out / recipe.name))
    log.info("card", name=recipe.name, seconds=round(seconds), base=base_score, card=card_score)
    entry = cards.entry(
        recipe,
        prompts=cards.prompts(split.train),
        heldout=len(split.heldout),
        seconds=seconds,
        base_score=base_score,
        card_score=card_score,
    )
    cards.put(data / "cards.json", entry)


def _write_data(name: str, split: Split[Pair] | Split[Labelled], data: Path) -> None:
    write_jsonl(data / f"{name}.heldout.jsonl", split.heldout)
    if split.reference:
        write_jsonl(data / f"{name}.reference.jsonl", split.reference)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m scripts.demo_cards.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where the PEFT directories go")
    parser.add_argument("--only", choices=[recipe.name for recipe in RECIPES], help="one card")
    parser.add_argument("--data", type=Path, default=DATA_DIRECTORY, help="held-out sets go here")
    parser.add_argument("--threads", type=int, default=THREADS, help="torch threads")
    return parser


if __name__ == "__main__":
    main()
