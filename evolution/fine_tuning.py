"""Supervised fine-tuning of a LoRA on a causal language model, from prompts and the answers that are wanted.

The base is frozen and may be bf16; the adapter trains in fp32 and is written in bf16. Only answer positions have a loss
and `lm_head`, the largest product of a small model, runs on them alone. Knows no engine: model and tokenizer are given.
This is the plain loop; `evolution.trainer` has the one with replay, validation and checkpoints, made of the same parts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional

from evolution.errors import TrainingError
from evolution.targets import spelled_out
from evolution.training_data import IGNORED, Encoded, Pair, batches, encode, pad
from evolution.training_job import FineTuning
from registry.logs import get_logger

LOG_EVERY: Final = 10

log = get_logger(__name__)


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


def attach(
    model: Any,
    tuning: FineTuning,
    *,
    base_name: str,
    task_type: str = "CAUSAL_LM",
    rank_pattern: Mapping[str, int] | None = None,
) -> Any:
    """`model` with a fresh fp32 adapter, the only weights that train; `base_name` is the logical name it will carry.

    `rank_pattern` gives modules, by their whole path, another rank at the same scale, alpha / rank. Raises
    `TrainingError` where the model has none of the targets.
    """
    tuning, ranks = spelled_out(model, tuning), dict(rank_pattern or {})
    config = LoraConfig(
        r=tuning.rank,
        lora_alpha=tuning.alpha,
        target_modules=list(tuning.targets),
        layers_to_transform=None if tuning.layers is None else list(range(*tuning.layers)),
        rank_pattern=ranks,
        alpha_pattern={module: tuning.alpha * rank / tuning.rank for module, rank in ranks.items()},
        task_type=task_type,
    )
    torch.manual_seed(tuning.seed)
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise TrainingError(
            f"expected targets that {type(model).__name__} has and PEFT can adapt, got {tuning.targets}: {error}",
            hint='"mlp" and "all" are found in the model itself',
        ) from error
    # PEFT would write the absolute path that the base was loaded from.
    adapted.peft_config["default"].base_model_name_or_path = base_name
    return adapted


def train(adapted: Any, tokenizer: Any, pairs: Sequence[Pair], tuning: FineTuning) -> list[float]:
    """Move the adapter's weights in place; the loss of each step, in nats per answer token."""
    if not pairs:
        raise TrainingError("expected at least one pair to train on, got none")
    encoded = [encode(tokenizer, pair) for pair in pairs]
    optimiser = Optimiser(adapted, tuning)
    losses_nats: list[float] = []
    adapted.train()
    for step, rows in enumerate(batches(len(encoded), tuning.batch_size, tuning.steps, tuning.seed)):
        loss_nats = answer_loss(adapted.get_base_model(), [encoded[row] for row in rows])
        optimiser.step(loss_nats)
        losses_nats.append(loss_nats.item())
        if step % LOG_EVERY == 0:
            log.info("step", step=step, loss_nats=round(losses_nats[-1], 4))
    adapted.eval()
    return losses_nats


def answer_loss(causal: Any, rows: Sequence[Encoded]) -> Tensor:
    """Mean cross-entropy over the answers' tokens, in nats; a row is (prompt ids, answer ids)."""
    return functional.cross_entropy(*answer_logits(causal, rows))


def answer_logits(causal: Any, rows: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
    """Logits (answer tokens, vocabulary) in fp32, and the tokens wanted there."""
    ids, labels = (padded.to(causal.device) for padded in pad(rows))
    # Padding is on the right and attention is causal, so no answer position ever sees it.
    hidden = causal.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    targets = labels[:, 1:]
    wanted = targets != IGNORED
    return causal.get_output_embeddings()(hidden[wanted]).float(), targets[wanted]


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
        self._adamw = torch.optim.AdamW(self._weights, weight_decay=0.0, betas=(0.9, 0.99))
        self.steps_done = 0

    def step(self, loss: Tensor) -> None:
        """One descent on `loss`; gradients are cleared after it."""
        torch.autograd.backward(loss)
        self.descend()

    def descend(self) -> None:
        """One descent along the gradients that are there; they are cleared after it."""
        torch.nn.utils.clip_grad_norm_(self._weights, self._tuning.clip_norm)
        for group in self._adamw.param_groups:
            group["lr"] = self._tuning.learning_rate * self._factor(self.steps_done)
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        self.steps_done += 1

    def moments(self) -> dict[str, Tensor]:
        """AdamW's memory by weight and name; with `steps_done` it is the whole state."""
        state = self._adamw.state_dict()["state"]
        return {f"{weight}.{name}": tensor for weight, kept in state.items() for name, tensor in kept.items()}

    def resume(self, moments: Mapping[str, Tensor], steps_done: int) -> None:
        """Go on from a state of `moments`."""
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in moments.items():
            weight, _, name = key.partition(".")
            state.setdefault(int(weight), {})[name] = tensor
        self._adamw.load_state_dict(self._adamw.state_dict() | {"state": state})
        self.steps_done = steps_done

    def _factor(self, step: int) -> float:
        warm = (step + 1) / self._tuning.warmup_steps
        left = (self._tuning.steps - step) / self._tuning.steps
        return min(warm, left)


def _sort_targets(path: Path) -> None:
    # PEFT keeps the targets as a set, whose order changes from run to run.
    config = json.loads(path.read_text(encoding="utf-8"))
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


__all__ = [
    "FineTuning",
    "Optimiser",
    "Pair",
    "answer_logits",
    "answer_loss",
    "attach",
    "fine_tune",
    "save_bf16",
    "train",
]
