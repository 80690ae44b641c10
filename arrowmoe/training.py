"""The training process: a job file in, an adapter in the job's output directory out.

    python -m arrowmoe.training SPEC.json

Progress is in the output directory. An error of ours ends the process with code 1 and its words on stderr.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from arrowmoe.base_model import BaseModel, Kind, load_base_model
from arrowmoe.encoding import pool
from evolution.contrastive import Embed
from evolution.trainer import ExpertTrainer
from evolution.training_job import ModelSpec, Objective, OnStep, Trained, TrainingJob
from registry.errors import ArrowMoEError

KINDS: dict[Objective, Kind] = {"sft": "causal", "contrastive": "encoder"}


def train_from_file(path: Path, on_step: OnStep | None = None) -> Trained:
    """Load the models that a job file names, and train. Raises `ModelLoadError` and `TrainingError`."""
    job = TrainingJob.load(path)
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    base = _load(job.base, KINDS[job.objective])
    teacher = None if job.distillation is None else _load(job.distillation.teacher, "causal").model
    return ExpertTrainer(job, base.model, base.tokenizer, embed=embedder(base), teacher=teacher).run(on_step)


def embedder(base: BaseModel) -> Embed:
    """How an encoder's texts become vectors, as `encode_batch` does it, with gradients."""
    limits = (base.max_positions, base.tokenizer.model_max_length, base.pooling.max_tokens)
    longest = min(limit for limit in limits if limit is not None)

    def embed(texts: Sequence[str]) -> Tensor:
        batch = base.tokenizer(
            list(texts),
            padding=True,
            padding_side="right",
            truncation=True,
            max_length=longest,
            return_tensors="pt",
        ).to(base.device)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        states = base.model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
        return pool(states.float(), mask, base.pooling)

    return embed


def main() -> int:
    """Train the job of the command line; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m arrowmoe.training", description="Train one job.")
    parser.add_argument("spec", type=Path, help="a training job as JSON")
    try:
        train_from_file(parser.parse_args().spec)
    except ArrowMoEError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 1
    return 0


def _load(spec: ModelSpec, kind: Kind) -> BaseModel:
    return load_base_model(spec.model, name=spec.name, dtype=spec.dtype, device=spec.device, kind=kind)


if __name__ == "__main__":
    sys.exit(main())
