"""Supervised fine-tuning of a LoRA on a causal language model, from prompts and the answers that are wanted.

The base is frozen and may be bf16; the adapter trains in fp32 and is written in bf16. Only answer positions have a loss
and `lm_head`, the largest product of a small model, runs on them alone. Knows no engine: model and tokenizer are given.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional

from registry.errors import ArrowMoEError
from registry.logs import get_logger

LLAMA_LINEAR: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
IGNORED: Final = -100
LOG_EVERY: Final = 10

Encoded = tuple[list[int], list[int]]

log = get_logger(__name__)


class FineTuningError(ArrowMoEError):
    """A fine-tuning cannot start as it was asked for."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """What is asked and the whole answer. `prompt` is a string, completed as it is, or chat messages."""

    prompt: str | Sequence[Mapping[str, str]]
    answer: str


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """A LoRA's shape and AdamW's schedule: a linear warm-up, then a linear decay to nothing.

    `layers` is a half-open range of block indices, None is all of them. `seed` decides the first weights of the
    adapter, its dropout and the order of the examples.
    """

    rank: int = 8
    alpha: int = 16
    targets: tuple[str, ...] = LLAMA_LINEAR
    layers: tuple[int, int] | None = None
    steps: int = 120
    batch_size: int = 8
    learning_rate: float = 1e-3
    warmup_steps: int = 5
    clip_norm: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        counts = {name: getattr(self, name) for name in ("rank", "steps", "batch_size", "warmup_steps")}
        if min(counts.values()) < 1:
            raise FineTuningError(f"expected counts of at least 1, got {counts}")


def fine_tune(
    model: Any, tokenizer: Any, pairs: Sequence[Pair], tuning: FineTuning, *, base_name: str, directory: Path
) -> list[float]:
    """Train a fresh adapter on `pairs`, write it as a PEFT directory, and leave `model` as it was.

    Returns the loss of each step, in nats per answer token.
    """
    adapted = attach(model, tuning, base_name=base_name)
    try:
        losses_nats = train(adapted, tokenizer, pairs, tuning)
        save_bf16(adapted, directory)
    finally:
        adapted.unload()
    return losses_nats


def attach(model: Any, tuning: FineTuning, *, base_name: str, task_type: str = "CAUSAL_LM") -> Any:
    """`model` with a fresh fp32 adapter, the only weights that train; `base_name` is the logical name it will carry."""
    config = LoraConfig(
        r=tuning.rank,
        lora_alpha=tuning.alpha,
        target_modules=list(tuning.targets),
        layers_to_transform=None if tuning.layers is None else list(range(*tuning.layers)),
        task_type=task_type,
    )
    torch.manual_seed(tuning.seed)
    adapted = get_peft_model(model, config)
    # PEFT would write the absolute path that the base was loaded from.
    adapted.peft_config["default"].base_model_name_or_path = base_name
    return adapted


def train(adapted: Any, tokenizer: Any, pairs: Sequence[Pair], tuning: FineTuning) -> list[float]:
    """Move the adapter's weights in place; the loss of each step, in nats per answer token."""
    if not pairs:
        raise FineTuningError("expected at least one pair to train on, got none")
    encoded = [_encode(tokenizer, pair) for pair in pairs]
    optimiser = Optimiser(adapted, tuning)
    losses_nats: list[float] = []
    adapted.train()
    for step, rows in enumerate(_batches(len(encoded), tuning)):
        loss_nats = answer_loss(adapted.get_base_model(), [encoded[row] for row in rows])
        optimiser.step(loss_nats)
        losses_nats.append(loss_nats.item())
        if step % LOG_EVERY == 0:
            log.info("step", step=step, loss_nats=round(losses_nats[-1], 4))
    adapted.eval()
    return losses_nats


def answer_loss(causal: Any, rows: Sequence[Encoded]) -> Tensor:
    """Mean cross-entropy over the answers' tokens, in nats; a row is (prompt ids, answer ids)."""
    ids, labels = (padded.to(causal.device) for padded in _pad(rows))
    # Padding is on the right and attention is causal, so no answer position ever sees it.
    hidden = causal.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    targets = labels[:, 1:]
    wanted = targets != IGNORED
    logits = causal.get_output_embeddings()(hidden[wanted]).float()  # (answer tokens, vocabulary)
    return functional.cross_entropy(logits, targets[wanted])


def save_bf16(adapted: Any, directory: Path) -> None:
    """Round the adapter to bf16 in place and write it as a PEFT directory."""
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.data = weight.data.to(torch.bfloat16)
    adapted.save_pretrained(str(directory), save_embedding_layers=False)
    (directory / "README.md").unlink(missing_ok=True)
    _sort_targets(directory / "adapter_config.json")


class Optimiser:
    """AdamW on the trainable weights of a model, clipped, with a linear warm-up and decay."""

    def __init__(self, model: Any, tuning: FineTuning) -> None:
        self._tuning = tuning
        self._weights = [weight for weight in model.parameters() if weight.requires_grad]
        self._adamw = torch.optim.AdamW(self._weights, lr=tuning.learning_rate, weight_decay=0.0, betas=(0.9, 0.99))
        self._decay = torch.optim.lr_scheduler.LambdaLR(self._adamw, self._factor)

    def step(self, loss: Tensor) -> None:
        """One descent on `loss`; gradients are cleared after it."""
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self._weights, self._tuning.clip_norm)
        self._adamw.step()
        self._decay.step()
        self._adamw.zero_grad(set_to_none=True)

    def _factor(self, step: int) -> float:
        warm = (step + 1) / self._tuning.warmup_steps
        left = (self._tuning.steps - step) / self._tuning.steps
        return min(warm, left)


def _encode(tokenizer: Any, pair: Pair) -> Encoded:
    if isinstance(pair.prompt, str):
        prompt = tokenizer(pair.prompt)["input_ids"]
    else:
        messages = [dict(message) for message in pair.prompt]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    answer = tokenizer(pair.answer, add_special_tokens=False)["input_ids"]
    return list(prompt), [*answer, tokenizer.eos_token_id]


def _batches(count: int, tuning: FineTuning) -> list[list[int]]:
    """Row numbers of each step; every example is seen once before any is seen again."""
    rng = random.Random(tuning.seed)
    order: list[int] = []
    while len(order) < tuning.steps * tuning.batch_size:
        order += rng.sample(range(count), count)
    size = tuning.batch_size
    return [order[step * size : (step + 1) * size] for step in range(tuning.steps)]


def _pad(rows: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
    """Token ids and labels, both (batch, seq), padded on the right; any id pads, for labels say what counts."""
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.zeros((len(rows), width), dtype=torch.long)
    labels = torch.full((len(rows), width), IGNORED)
    for row, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return ids, labels


def _sort_targets(path: Path) -> None:
    # PEFT keeps the targets as a set, whose order changes from run to run.
    config = json.loads(path.read_text(encoding="utf-8"))
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


__all__ = [
    "LLAMA_LINEAR",
    "FineTuning",
    "FineTuningError",
    "Optimiser",
    "Pair",
    "answer_loss",
    "attach",
    "fine_tune",
    "save_bf16",
    "train",
]
