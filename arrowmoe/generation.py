"""Decoding: from a batch of prompts to text, one token for every row at a time.

Knows the base model and its cache, not adapters: whoever calls it has set the gates. Each row samples with a generator
of its own, so what a row draws does not depend on its neighbours.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from transformers import BatchEncoding, DynamicCache

from arrowmoe.base_model import BaseModel
from arrowmoe.errors import EngineError, PromptError

Message = Mapping[str, str]
Prompt = str | Sequence[Message]
FinishReason = Literal["stop", "length"]
Computing = Callable[[], AbstractContextManager[object]]
_GREEDY_BELOW = 1e-6  # log-probabilities divided by less than this overflow


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


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A piece of row `row`'s text as it is made; the last one of a row carries its whole `generation`."""

    row: int
    text: str
    generation: Generation | None = None


def tokenise(base: BaseModel, prompts: Sequence[Prompt], new_tokens: int) -> BatchEncoding:
    """Prompts as a batch padded on the left: a string as it is, messages through the model's chat template.

    Raises `PromptError` for an empty prompt, or where prompt and new tokens exceed the model's context.
    """
    tokenizer = base.tokenizer
    ids = [_ids(base, prompt) for prompt in prompts]
    longest, limit = max(map(len, ids)), base.max_positions
    if min(map(len, ids)) == 0:
        raise PromptError("expected prompts of at least one token, got an empty one")
    if limit is not None and longest + new_tokens > limit:
        raise PromptError(
            f"expected prompt and answer within {limit} tokens, got {longest} + {new_tokens}",
            hint="shorten the prompt or lower max_new_tokens",
        )
    padded: BatchEncoding = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
    return padded.to(base.device)


@torch.inference_mode()
def decode(
    base: BaseModel, prompts: Sequence[Prompt], sampling: Sampling, computing: Computing = nullcontext
) -> Iterator[Chunk]:
    """Generate every row; chunks come as text becomes certain, the last of each row with its `Generation`.

    Each forward pass runs within `computing()`, and nothing else does: between two chunks the model is anybody's.
    """
    batch = tokenise(base, prompts, sampling.max_new_tokens)
    rows = [_Row(base, index, sampling) for index in range(len(prompts))]
    for row, mask in zip(rows, batch["attention_mask"], strict=True):
        row.prompt_tokens = int(mask.sum())
    for logits in _steps(base, batch, rows, sampling.max_new_tokens, computing):
        log_probs = torch.log_softmax(logits.float(), dim=-1)
        _check_finite(log_probs)
        tokens = [row.choose(log_probs[row.index]) for row in rows]
        for row, token in zip(rows, tokens, strict=True):
            if row.finish_reason is None:
                yield from row.take(token, float(log_probs[row.index, token]))
        if all(row.finish_reason for row in rows):
            return


def _check_finite(log_probs: Tensor) -> None:
    """Raise `EngineError` for NaN, which the model's own numbers overflowed into."""
    if bool(log_probs.amax(dim=-1).isnan().any()):
        raise EngineError(
            "expected finite logits, got NaN, so there is no answer",
            hint="an adapter's weight is too large, or the dtype too narrow for this model",
        )


def _steps(
    base: BaseModel, batch: BatchEncoding, rows: list[_Row], steps: int, computing: Computing
) -> Iterator[Tensor]:
    """Logits (rows, vocabulary) of each step; between two of them the rows have chosen their tokens."""
    known = inspect.signature(base.model.forward).parameters
    if "past_key_values" not in known:  # it would go unread, and each step see one token only
        raise EngineError(f"{base.name}: expected a model with a key-value cache, got {base.architecture}")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    cache = DynamicCache(config=base.model.config)
    for _ in range(steps):
        optional = {"position_ids": positions, "logits_to_keep": 1}
        with computing():
            output = base.model(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
                **{name: value for name, value in optional.items() if name in known},
            )
        yield output.logits[:, -1]
        ids = torch.tensor([[row.last] for row in rows], device=ids.device)
        mask = torch.cat([mask, mask.new_ones((len(rows), 1))], dim=-1)
        positions = positions[:, -1:] + 1


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


def end_tokens(base: BaseModel) -> frozenset[int]:
    """Token ids that end an answer, from the generation settings and the tokenizer."""
    configured = base.model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in [*ids, base.tokenizer.eos_token_id] if token is not None)


class _Row:
    """One row's state while it is generated."""

    def __init__(self, base: BaseModel, index: int, sampling: Sampling) -> None:
        self.index = index
        self.prompt_tokens = 0
        self.last = base.tokenizer.pad_token_id or 0
        self.finish_reason: FinishReason | None = None
        self._base = base
        self._sampling = sampling
        self._ends = end_tokens(base)
        self._tokens: list[int] = []
        self._logprob = 0.0
        self._sent = 0
        self._random = torch.Generator(device=base.device)
        if sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed((sampling.seed + index) % 2**64)

    def choose(self, log_probs: Tensor) -> int:
        """The next token out of log-probabilities (vocabulary,); a finished row repeats its last one."""
        if self.finish_reason is not None:
            return self.last
        if self._sampling.temperature < _GREEDY_BELOW:
            return int(log_probs.argmax())
        probs = torch.softmax(log_probs / self._sampling.temperature, dim=-1)
        return int(torch.multinomial(_nucleus(probs, self._sampling.top_p), 1, generator=self._random))

    def take(self, token: int, logprob: float) -> Iterator[Chunk]:
        """Add a chosen token and yield the text that it makes certain."""
        self.last = token
        self._tokens.append(token)
        self._logprob += logprob
        text = self._text()
        stopped = [at for at in map(text.find, self._sampling.stop) if at >= 0]
        if token in self._ends or stopped:
            self.finish_reason = "stop"
            text = text[: min(stopped)] if stopped else text
        elif len(self._tokens) >= self._sampling.max_new_tokens:
            self.finish_reason = "length"
        certain = len(text) if self.finish_reason else _certain(text, self._sampling.stop)
        piece, self._sent = text[self._sent : certain], max(self._sent, certain)
        if piece or self.finish_reason:
            yield Chunk(row=self.index, text=piece, generation=self._result(text) if self.finish_reason else None)

    def _text(self) -> str:
        tokens = self._tokens[:-1] if self._tokens[-1] in self._ends else self._tokens
        # Cleaning up spaces would change characters that were streamed already.
        text: str = self._base.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _result(self, text: str) -> Generation:
        assert self.finish_reason is not None
        return Generation(
            text=text,
            tokens=tuple(self._tokens),
            prompt_tokens=self.prompt_tokens,
            logprob_nats=self._logprob,
            finish_reason=self.finish_reason,
        )


def _certain(text: str, stop: Sequence[str]) -> int:
    """How many characters of `text` no later token can change: not half a character, not the start of a stop string."""
    end = len(text.rstrip("\ufffd"))
    for word in stop:
        for size in range(min(len(word) - 1, end), 0, -1):
            if text[:end].endswith(word[:size]):
                end -= size
                break
    return end


def _nucleus(probs: Tensor, top_p: float) -> Tensor:
    """`probs` (vocabulary,) with everything outside the nucleus set to zero; not renormalised."""
    if top_p == 1.0:
        return probs
    ordered, order = probs.sort(descending=True)
    outside = ordered.cumsum(dim=0) - ordered >= top_p
    return probs.index_fill(0, order[outside], 0.0)
