"""Two streams of tasks: ten digits two by two, and four of CLINC150's domains; the order is drawn anew for each seed.

A stream is written as the files that `evolution.nested_trainer` reads. `on` says what is scored: "val" is what the
settings in `continual_arms` were chosen on, "test" is what is reported. `vectors` are what a router sees of each task.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from arrowmoe.base_model import load_base_model
from arrowmoe.engine import ArrowEngine
from arrowmoe.features import TextFeaturizer, Vectors
from benchmarks.continual_base import Pretraining, scaled_up, stroke_model
from benchmarks.continual_stem import remember
from benchmarks.routing_adapters import FORM, read_data
from benchmarks.routing_data import EMBEDDER, embedded
from evolution.nested_experiment import NestedTask
from evolution.training_job import ModelSpec

Split = Literal["val", "test"]
Kind = Literal["image", "text"]
Rows = npt.NDArray[np.intp]

TEXT_BASE: Final = "builtin:smollm2"
TEXT_STEM: Final = 20
"""Blocks of the language model below those that learn."""
DOMAINS: Final = ("banking", "travel", "kitchen_and_dining", "work")
PER_INTENT: Final = {"train": 40, "val": 4, "test": 8}
DIGIT_SHARES: Final = (0.6, 0.2)
"""Of the images, for training and validation; the rest is the test."""
SPLIT_SEED: Final = 100
"""The same for every order of the tasks, so that nothing is reported that a setting was chosen on."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """One task, and unit vectors (n, d) of what it trains on and of what is scored."""

    spec: NestedTask
    train: Vectors
    scored: Vectors


@dataclass(frozen=True, kw_only=True, eq=False)
class Stream:
    """Tasks in the order of a seed; `base` makes the model and its tokenizer (None for images) anew."""

    kind: Kind
    spec: ModelSpec
    base: Callable[[], tuple[Any, Any]]
    tasks: tuple[Task, ...]


def digits(directory: Path, seed: int, on: Split, how: Pretraining) -> Stream:
    """Five tasks of two digits each, 8 × 8 scaled up to 16 × 16, for a base that never saw a digit."""
    data = load_digits()
    images, labels = scaled_up(torch.from_numpy(data.images / 16).float()), np.asarray(data.target)
    train, val, test = _parts(np.random.default_rng(SPLIT_SEED).permutation(len(labels)))
    scored, pairs = {"val": val, "test": test}[on], np.random.default_rng(seed).permutation(10).reshape(5, 2)
    vectors = _seen(stroke_model(how), images)
    tasks = []
    for pair in pairs:
        name = "-".join(map(str, pair))
        own = [rows[np.isin(labels[rows], pair)] for rows in (train, scored)]
        urls = [directory / f"{name}-{part}.npz" for part in ("train", on)]
        for url, rows in zip(urls, own, strict=True):
            np.savez(url, images=images[rows].numpy(), labels=labels[rows])
        tasks.append(_task(name, urls, vectors[own[0]], vectors[own[1]]))
    return Stream(
        kind="image",
        spec=ModelSpec(model="strokes", name="arrowmoe/strokes"),
        base=lambda: (stroke_model(how), None),
        tasks=tuple(tasks),
    )


def clinc(directory: Path, seed: int, on: Split, limit: int | None = None) -> Stream:
    """Four domains: a sentence is answered with the name of its intent; nothing in it names the domain.

    `limit` bounds the sentences of each intent. Raises `DataMissingError`.
    """
    sentences, intents_of = read_data("clinc150_data_full.json"), read_data("clinc150_domains.json")
    featurizer = TextFeaturizer(ArrowEngine(load_base_model(EMBEDDER, device="cpu", dtype="float32")))
    tasks = []
    for domain in random.Random(seed).sample(DOMAINS, len(DOMAINS)):
        own = [_drawn(sentences[split], intents_of[domain], split, limit) for split in ("train", on)]
        urls = [directory / f"{domain}-{part}.jsonl" for part in ("train", on)]
        for url, rows in zip(urls, own, strict=True):
            asked = [{"prompt": FORM.format(text=text), "answer": f" {answer}"} for text, answer in rows]
            url.write_text("".join(json.dumps(one) + "\n" for one in asked), encoding="utf-8")
        vectors = [embedded(featurizer, [text for text, _ in rows]) for rows in own]
        tasks.append(_task(domain, urls, *vectors))
    return Stream(
        kind="text",
        spec=ModelSpec(model=TEXT_BASE, name="HuggingFaceTB/SmolLM2-135M-Instruct", dtype="bfloat16"),
        base=_language_model,
        tasks=tuple(tasks),
    )


@cache
def _language_model() -> tuple[Any, Any]:
    """Loaded once, for a training leaves it as it was; its first blocks are remembered and its prompts are no chat."""
    base = load_base_model(TEXT_BASE, device="cpu", dtype="bfloat16")
    remember(base.model, TEXT_STEM)
    base.tokenizer.chat_template = None
    return base.model, base.tokenizer


def _task(name: str, urls: Sequence[Path], train: Vectors, scored: Vectors) -> Task:
    data, test = (url.resolve().as_uri() for url in urls)
    return Task(spec=NestedTask(name=name, data_url=data, test_url=test), train=train, scored=scored)


def _parts(rows: Rows) -> tuple[Rows, Rows, Rows]:
    train, val = (round(share * len(rows)) for share in DIGIT_SHARES)
    return rows[:train], rows[train : train + val], rows[train + val :]


@torch.no_grad()
def _seen(model: Any, images: Tensor) -> Vectors:
    """Unit vectors of the class token, as the bare base makes it."""
    hidden = model.vit(pixel_values=images).last_hidden_state[:, 0]
    vectors: Vectors = torch.nn.functional.normalize(hidden, dim=-1).numpy()
    return vectors


def _drawn(
    pairs: Sequence[tuple[str, str]], intents: Sequence[str], split: str, limit: int | None
) -> list[tuple[str, str]]:
    """Sentences of each intent with its name in words, the same for every seed."""
    texts: Mapping[str, list[str]] = {intent: [text for text, own in pairs if own == intent] for intent in intents}
    count, rng = min(PER_INTENT[split], limit or PER_INTENT[split]), random.Random(0)
    return [(text, intent.replace("_", " ")) for intent in intents for text in rng.sample(texts[intent], count)]
