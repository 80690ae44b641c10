"""What is generated: prompts as tokens, how the next one is chosen, and what an answer says.

Rows are computed by `arrowmoe.running_batch`, and who is computed when is decided by `arrowmoe.batching`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Literal

from transformers import BatchEncoding

from arrowmoe.base_model import BaseModel
from arrowmoe.errors import PromptError

Message = Mapping[str, str]
Prompt = str | Sequence[Message]
FinishReason = Literal["stop", "length"]
Computing = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen. `temperature` 0 is greedy; `top_p` keeps the smallest set of tokens of that probability
    (nucleus sampling, arXiv:1904.09751); `stop` strings end a row and are cut off; row i is seeded with `seed` + i.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise PromptError(f"expected max_new_tokens of at least 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature < math.inf:
            raise PromptError(f"expected a finite temperature of at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise PromptError(f"expected top_p in (0, 1], got {self.top_p}")
        if "" in self.stop:
            raise PromptError("expected stop strings of at least one character, got an empty one")


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds that one row waited, that it took from there to its first token, and from that one to its last."""

    queue_s: float
    prefill_s: float
    decode_s: float


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One row's answer. `adapters` says which cards made it, with which weights; empty means the bare base model.

    `logprob_nats` is Σ log P of the new tokens under the model at temperature 1, end token included. `signal` is what
    feedback on a routed answer refers to, where it was recorded.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    logprob_nats: float
    finish_reason: FinishReason
    adapters: Mapping[str, float] = field(default_factory=dict)
    signal: str | None = None
    timing: Timing | None = field(default=None, compare=False)


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A piece of row `row`'s text as it is made; the last one of a row carries its whole `generation`."""

    row: int
    text: str
    generation: Generation | None = None


def tokenise(base: BaseModel, prompts: Sequence[Prompt], new_tokens: int) -> BatchEncoding:
    """Prompts as a batch padded on the left, where they are computed. Raises as `token_ids` does."""
    return pad(base, token_ids(base, prompts, new_tokens))


def token_ids(base: BaseModel, prompts: Sequence[Prompt], new_tokens: int) -> list[list[int]]:
    """Prompts as tokens: a string as it is, messages through the model's chat template.

    Raises `PromptError` for an empty prompt, or where prompt and new tokens exceed the model's context.
    """
    ids = [_ids(base, prompt) for prompt in prompts]
    longest, limit = max(map(len, ids)), base.max_positions
    if min(map(len, ids)) == 0:
        raise PromptError("expected prompts of at least one token, got an empty one")
    if limit is not None and longest + new_tokens > limit:
        raise PromptError(
            f"expected prompt and answer within {limit} tokens, got {longest} + {new_tokens}",
            hint="shorten the prompt or lower max_new_tokens",
        )
    return ids


def pad(base: BaseModel, ids: Sequence[Sequence[int]]) -> BatchEncoding:
    """`input_ids` and `attention_mask`, both (rows, longest), padded on the left, where they are computed."""
    padded: BatchEncoding = base.tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
    return padded.to(base.device)


def end_tokens(base: BaseModel) -> frozenset[int]:
    """Token ids that end an answer, from the generation settings and the tokenizer."""
    configured = base.model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in [*ids, base.tokenizer.eos_token_id] if token is not None)


def _ids(base: BaseModel, prompt: Prompt) -> list[int]:
    if isinstance(prompt, str):
        ids: list[int] = base.tokenizer(prompt)["input_ids"]
        return ids
    if base.tokenizer.chat_template is None:
        raise PromptError(
            f"{base.name} has no chat template, so messages cannot be written for it",
            hint="give the prompt as a string",
        )
    encoded = base.tokenizer.apply_chat_template(
        [dict(message) for message in prompt], add_generation_prompt=True, return_dict=True
    )
    return list(encoded["input_ids"])
