"""Requests, and each of their rows while it is generated: how a token is chosen, and the text that is certain so far.

Each row samples with a generator of its own, so what it draws does not depend on its neighbours.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from arrowmoe.base_model import BaseModel
from arrowmoe.generation import Chunk, FinishReason, Generation, Sampling, Timing, end_tokens
from arrowmoe.routing.gates import Gates

_GREEDY_BELOW = 1e-6  # log-probabilities divided by less than this overflow


@dataclass(kw_only=True, eq=False)
class Request:
    """The rows of one call: chunks that were made and not read yet, how many rows go on, and what ended it early.

    `submitted_s` and `deadline_s` are readings of one clock.
    """

    sampling: Sampling
    left: int
    submitted_s: float = 0.0
    deadline_s: float = math.inf
    chunks: deque[Chunk] = field(default_factory=deque)
    error: Exception | None = None
    closed: bool = False

    @property
    def is_over(self) -> bool:
        """Whether nothing more is to be computed for it."""
        return self.closed or self.error is not None or not self.left

    def read(self) -> Chunk | None:
        """The next chunk; None after the last one. Raises what ended the request early."""
        if self.chunks:
            return self.chunks.popleft()
        if self.error is not None:
            self.closed = True
            error, self.error = self.error, None
            try:
                raise error
            finally:
                del error  # its traceback holds this frame
        return None


class Row:
    """Row `index` of a request: its prompt, its adapters (`weights` by digest), and what was made of it so far.

    `finer` are its gates where tokens or layers have their own: one row of them, for as many tokens as the prompt has.
    """

    def __init__(
        self,
        base: BaseModel,
        request: Request,
        index: int,
        prompt: Sequence[int],
        weights: Mapping[str, float],
        finer: Gates | None = None,
    ) -> None:
        sampling = request.sampling
        self.request = request
        self.index = index
        self.prompt = prompt
        self.weights = weights
        self.finer = finer
        self.most_tokens = len(prompt) + sampling.max_new_tokens
        self.finish_reason: FinishReason | None = None
        self.started_s = self.first_token_s = request.submitted_s
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

    def choose(self, log_probs: Tensor, likeliest: int) -> int:
        """The next token out of log-probabilities (vocabulary,), of which `likeliest` is the largest."""
        if self._sampling.temperature < _GREEDY_BELOW:
            return likeliest
        probs = torch.softmax(log_probs / self._sampling.temperature, dim=-1)
        return int(torch.multinomial(_nucleus(probs, self._sampling.top_p), 1, generator=self._random))

    def take(self, token: int, logprob: float, now_s: float) -> Iterator[Chunk]:
        """Add a chosen token and yield the text that it makes certain."""
        if not self._tokens:
            self.first_token_s = now_s
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
            yield Chunk(row=self.index, text=piece, generation=self._result(text, now_s))

    def _text(self) -> str:
        tokens = self._tokens[:-1] if self._tokens[-1] in self._ends else self._tokens
        # Cleaning up spaces would change characters that were streamed already.
        text: str = self._base.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _result(self, text: str, now_s: float) -> Generation | None:
        if self.finish_reason is None:
            return None
        return Generation(
            text=text,
            tokens=tuple(self._tokens),
            prompt_tokens=len(self.prompt),
            logprob_nats=self._logprob,
            finish_reason=self.finish_reason,
            timing=Timing(
                queue_s=self.started_s - self.request.submitted_s,
                prefill_s=self.first_token_s - self.started_s,
                decode_s=now_s - self.first_token_s,
            ),
        )


def choose_tokens(rows: Sequence[Row | None], logits: Tensor) -> list[tuple[int, float]]:
    """Each row's next token and its log-probability in nats, out of logits (rows, vocabulary).

    The log-probability is NaN where the model's own numbers overflowed; the token then means nothing, and so it does
    where there is no row.
    """
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    best, likeliest = (found.tolist() for found in log_probs.max(dim=-1))
    tokens = [
        token if row is None or math.isnan(most) else row.choose(scores, token)
        for row, scores, token, most in zip(rows, log_probs, likeliest, best, strict=True)
    ]
    chosen = log_probs.gather(1, torch.tensor(tokens, device=log_probs.device)[:, None]).flatten().tolist()
    return list(zip(tokens, chosen, strict=True))


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
