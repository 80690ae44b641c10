"""Decoding constrained to a set of strings, with the probability of every one of them, in a single forward pass.

The strings, each with the end token, form a trie of tokens. The trie's tokens stand behind the prompt all at once, and
an attention mask lets each see the prompt and its own ancestors only (tree attention, SpecInfer, arXiv:2305.09781), so
one pass gives the logits at every node. The model must take a four-dimensional mask: eager or SDPA attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from arrowmoe.base_model import BaseModel
from arrowmoe.errors import PromptError
from arrowmoe.generation import Computing, Prompt, tokenise

ROOT = 0
"""The node of the empty string: the prompt's last token."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Choices:
    """`log_probs_nats` (rows, strings): log P(string, end | prompt), over all that the model could have written.

    `greedy` (rows,) is the string that choosing the likeliest allowed token at a time ends with, which need not be the
    likeliest string.
    """

    strings: tuple[str, ...]
    log_probs_nats: Tensor
    greedy: tuple[str, ...]

    @property
    def probs(self) -> Tensor:
        """(rows, strings): the probabilities, normalised over the strings."""
        return self.log_probs_nats.softmax(dim=-1)


class Trie:
    """Strings as paths of tokens. Node 0 is the root; node i holds token `tokens[i - 1]` and follows its parent."""

    def __init__(self, base: BaseModel, strings: Sequence[str]) -> None:
        self.strings = tuple(strings)
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.end = int(base.tokenizer.eos_token_id)
        self.children: list[dict[int, int]] = [{}]
        self.paths = [self._add(base.tokenizer(string, add_special_tokens=False)["input_ids"]) for string in strings]
        if not strings or len({path[-1] for path in self.paths}) < len(strings):
            raise PromptError(f"expected at least one string, all of different tokens, got {list(strings)}")
        self._ends = {path[-1]: string for path, string in zip(self.paths, strings, strict=True)}

    @property
    def ancestors(self) -> Tensor:
        """(nodes - 1, nodes - 1) bool: whether row's node sees column's node, itself or one that it follows."""
        seen = torch.eye(len(self.tokens), dtype=torch.bool)
        for node, parent in enumerate(self.parents):
            if parent != ROOT:
                seen[node] |= seen[parent - 1]
        return seen

    @property
    def depths(self) -> Tensor:
        """(nodes - 1,): how many tokens a node is behind the prompt's last, from 1."""
        return self.ancestors.sum(dim=-1)

    def score(self, log_probs: Tensor) -> Tensor:
        """(rows, strings) out of the next token's log-probabilities at every node, (rows, nodes, vocabulary)."""
        scores = []
        for path in self.paths:
            steps = [log_probs[:, at, self.tokens[to - 1]] for at, to in pairwise(path)]
            scores.append(sum(steps, log_probs[:, path[-1], self.end]))
        return torch.stack(scores, dim=-1)

    def walk(self, log_probs: Tensor) -> str:
        """The greedy string out of log-probabilities (nodes, vocabulary)."""
        at = ROOT
        while True:
            allowed = [*self.children[at], *([self.end] if at in self._ends else [])]
            token = max(allowed, key=lambda token: float(log_probs[at, token]))
            if token == self.end:
                return self._ends[at]
            at = self.children[at][token]

    def _add(self, tokens: Sequence[int]) -> list[int]:
        """The nodes from the root along `tokens`, made where they are missing."""
        path = [ROOT]
        for token in tokens:
            if token not in self.children[path[-1]]:
                self.children[path[-1]][token] = len(self.children)
                self.children.append({})
                self.tokens.append(token)
                self.parents.append(path[-1])
            path.append(self.children[path[-1]][token])
        return path


@torch.inference_mode()
def choose(base: BaseModel, prompts: Sequence[Prompt], trie: Trie, computing: Computing = nullcontext) -> Choices:
    """Score every string of `trie` as the answer to each prompt; the forward pass runs within `computing()`.

    Raises `PromptError` as `tokenise` does.
    """
    batch = tokenise(base, prompts, len(trie.tokens))
    ids, mask, positions = _behind(batch["input_ids"], batch["attention_mask"], trie)
    nodes = torch.arange(batch["input_ids"].shape[1] - 1, ids.shape[1], device=ids.device)
    with computing():
        logits = base.model(
            input_ids=ids,
            attention_mask=_additive(mask, base.dtype),
            position_ids=positions,
            use_cache=False,
            logits_to_keep=nodes,
        ).logits
    log_probs = logits.float().log_softmax(dim=-1)  # (rows, nodes, vocabulary)
    return Choices(
        strings=trie.strings,
        log_probs_nats=trie.score(log_probs),
        greedy=tuple(trie.walk(row) for row in log_probs),
    )


def _behind(prompt: Tensor, attended: Tensor, trie: Trie) -> tuple[Tensor, Tensor, Tensor]:
    """Ids (rows, seq + nodes - 1), who sees whom (rows, seq + nodes - 1, same), positions like ids."""
    rows, length = prompt.shape
    tokens = torch.tensor(trie.tokens, dtype=prompt.dtype, device=prompt.device)
    total = length + len(tokens)
    mask = torch.zeros((rows, total, total), dtype=torch.bool, device=prompt.device)
    mask[:, :length, :length] = torch.ones((length, length), device=prompt.device).tril().bool()
    mask[:, length:, :length] = True
    mask[:, :, :length] &= attended.bool()[:, None]
    mask[:, length:, length:] = trie.ancestors.to(prompt.device)
    before = (attended.cumsum(dim=-1) - 1).clamp(min=0)
    after = before[:, -1:] + trie.depths.to(prompt.device)
    return torch.cat([prompt, tokens.expand(rows, -1)], dim=-1), mask, torch.cat([before, after], dim=-1)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """(rows, 1, to, from): 0 where seen, the least number elsewhere; every form of attention but flash takes it."""
    hidden = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return hidden.masked_fill(~mask, torch.finfo(dtype).min)[:, None]


__all__ = ["Choices", "Trie", "choose"]
