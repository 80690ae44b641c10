"""Constrained decoding: every string's probability is that of a plain forward pass over prompt and string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from transformers import PreTrainedModel

from arrowmoe.base_model import BaseModel
from arrowmoe.errors import PromptError
from arrowmoe.routing.constrained import Trie, choose
from tests.arrowmoe import tiny
from tests.peft_models import tiny_gpt2, tiny_llama

END = 1
STRINGS = ("w5 w6", "w5", "w5 w6 w7", "w9", "w8 w6 w7")
PROMPTS = ("w10 w11 w12 w13", "w14", "w15 w16 w5")


def llama() -> BaseModel:
    return tiny.base(tiny_llama())


def ids(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


@torch.inference_mode()
def next_log_probs(base: BaseModel, tokens: Sequence[int]) -> torch.Tensor:
    return base.model(input_ids=torch.tensor([list(tokens)])).logits[0].log_softmax(dim=-1)


def plain_score(base: BaseModel, prompt: str, string: str) -> float:
    asked, answer = ids(prompt), [*ids(string), END]
    log_probs = next_log_probs(base, [*asked, *answer])
    return sum(float(log_probs[len(asked) - 1 + at, token]) for at, token in enumerate(answer))


def plain_greedy(base: BaseModel, prompt: str, strings: Sequence[str]) -> str:
    allowed = {(*ids(string), END): string for string in strings}
    said: list[int] = []
    while tuple(said) not in allowed:
        here = {answer[len(said)] for answer in allowed if list(answer[: len(said)]) == said}
        log_probs = next_log_probs(base, [*ids(prompt), *said])[-1]
        said.append(max(here, key=lambda token: float(log_probs[token])))
    return allowed[tuple(said)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_scores_are_those_of_one_plain_pass_per_string(build: Callable[[], PreTrainedModel], attention: str) -> None:
    base = tiny.base(build())
    base.model.set_attn_implementation(attention)
    choices = choose(base, PROMPTS, Trie(base, STRINGS))
    expected = torch.tensor([[plain_score(base, prompt, string) for string in STRINGS] for prompt in PROMPTS])
    torch.testing.assert_close(choices.log_probs_nats, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(choices.probs, expected.softmax(dim=-1), rtol=1e-4, atol=1e-5)


def test_the_greedy_string_takes_the_likeliest_allowed_token_at_a_time() -> None:
    base = llama()
    prompts = [f"w{first} w{second}" for first in range(3, 40, 3) for second in (10, 45)]
    choices = choose(base, prompts, Trie(base, STRINGS))
    assert list(choices.greedy) == [plain_greedy(base, prompt, STRINGS) for prompt in prompts]
    assert len(set(choices.greedy)) > 1


def test_greedy_need_not_be_the_likeliest_string() -> None:
    base = llama()
    trie = Trie(base, ("w3 w4", "w5"))
    log_probs = torch.full((len(trie.tokens) + 1, 64), -9.0)
    log_probs[0, 3], log_probs[0, 5] = -0.5, -1.0  # w3 begins better, but nothing likely follows it
    log_probs[trie.paths[1][-1], END] = -0.1
    assert trie.walk(log_probs) == "w3 w4"
    assert trie.score(log_probs[None]).argmax().item() == 1


def test_strings_share_the_tokens_of_a_common_beginning() -> None:
    assert Trie(llama(), ("w5 w6", "w5 w7", "w5")).tokens == [5, 6, 7]


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    base = llama()
    trie = Trie(base, STRINGS)
    together = choose(base, PROMPTS, trie).log_probs_nats
    alone = torch.cat([choose(base, [prompt], trie).log_probs_nats for prompt in PROMPTS])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("strings", [(), ("w5", "w5"), ("w5", "w5  ")])
def test_strings_that_cannot_be_told_apart_are_refused(strings: tuple[str, ...]) -> None:
    with pytest.raises(PromptError, match="all of different tokens"):
        Trie(llama(), strings)
