"""Decoding: greedy text equals transformers' and PEFT's own; sampling, stopping and streaming keep their word."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast

from arrowmoe.base_model import BaseModel
from arrowmoe.batching import Batching
from arrowmoe.errors import EngineError, PromptError
from arrowmoe.generation import Chunk, Prompt, Sampling
from arrowmoe.lora.manager import LoRAManager
from registry.card import LoRACard
from tests.arrowmoe.causal_models import SIZES, greedy, tiny_bloom, tiny_mistral
from tests.arrowmoe.tiny import base
from tests.peft_models import VOCABULARY, load_peft, make_peft, tiny_gpt2, tiny_llama

PROMPTS = ["w5 w9 w12 w7", "w30", "w8 w8 w40"]
NEW = 12
IMPOSSIBLE = [
    {"max_new_tokens": 0},
    {"temperature": -1.0},
    {"temperature": float("nan")},
    {"temperature": float("inf")},
    {"top_p": 0.0},
    {"top_p": 1.1},
    {"stop": ("a", "")},
]


def decode(
    tiny: BaseModel,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    manager: LoRAManager | None = None,
    weights: Sequence[Mapping[str, float]] | None = None,
) -> Iterator[Chunk]:
    """Chunks of one call that has a batch for itself, with the bare base unless `weights` say other."""
    manager = manager or LoRAManager(tiny.model)
    batching = Batching(tiny, plan=manager.plan, running=manager.running)
    return batching.generate(prompts, weights or [{}] * len(prompts), sampling)


def made(chunks: Iterator[Chunk], rows: int) -> list[list[int]]:
    done = {chunk.row: chunk.generation for chunk in chunks if chunk.generation}
    return [list(done[row].tokens) for row in range(rows)]


def tokens(tiny: BaseModel, prompts: list[str] = PROMPTS, **sampling: object) -> list[list[int]]:
    return made(decode(tiny, prompts, Sampling(**{"max_new_tokens": NEW, **sampling})), len(prompts))


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_mistral, tiny_bloom])
def test_greedy_decoding_of_a_padded_batch_equals_transformers(make) -> None:
    torch.manual_seed(0)
    tiny = base(make())
    assert tokens(tiny) == [greedy(tiny.model, tiny, prompt, NEW) for prompt in PROMPTS]


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_greedy_decoding_of_mixed_rows_equals_peft(make, tmp_path: Path) -> None:
    model = make()
    paths = [make_peft(model, tmp_path / f"a{seed}", seed=seed, r=2 + seed) for seed in range(2)]
    expected = [
        greedy(load_peft(model, paths[0]), base(model), PROMPTS[0], NEW),
        greedy(model, base(model), PROMPTS[1], NEW),
        greedy(load_peft(model, paths[1]), base(model), PROMPTS[2], NEW),
    ]
    cards = [LoRACard.from_peft(path) for path in paths]
    manager = LoRAManager(model)
    for card in cards:
        manager.apply_card(card)
    weights: list[dict[str, float]] = [{cards[0].digest: 1.0}, {}, {cards[1].digest: 1.0}]
    found = made(decode(base(model), PROMPTS, Sampling(max_new_tokens=NEW), manager, weights), len(PROMPTS))
    assert found == expected
    assert tokens(base(model)) != expected


def test_logprob_is_the_sum_over_the_new_tokens() -> None:
    tiny = base(tiny_llama())
    (generation,) = [c.generation for c in decode(tiny, ["w5 w9"], Sampling(max_new_tokens=4)) if c.generation]
    prompt = tiny.tokenizer("w5 w9")["input_ids"]
    logits = tiny.model(input_ids=torch.tensor([prompt + list(generation.tokens)])).logits[0]
    steps = torch.log_softmax(logits, dim=-1)[len(prompt) - 1 : -1]
    expected = sum(float(step[token]) for step, token in zip(steps, generation.tokens, strict=True))
    assert generation.logprob_nats == pytest.approx(expected, rel=1e-4)
    assert generation.prompt_tokens == 2


def test_a_sampled_row_does_not_depend_on_its_neighbours_and_repeats_with_its_seed() -> None:
    tiny = base(tiny_llama())
    together = tokens(tiny, temperature=1.0, top_p=0.9, seed=7)
    assert together == tokens(tiny, temperature=1.0, top_p=0.9, seed=7)
    assert together[0] == tokens(tiny, PROMPTS[:1], temperature=1.0, top_p=0.9, seed=7)[0]
    assert together != tokens(tiny, temperature=1.0, top_p=0.9, seed=8)


def test_a_nucleus_of_one_token_is_greedy() -> None:
    tiny = base(tiny_llama())
    assert tokens(tiny, temperature=1.0, top_p=1e-6, seed=1) == tokens(tiny)


def test_a_temperature_near_zero_is_greedy() -> None:
    tiny = base(tiny_llama())
    assert tokens(tiny, temperature=1e-40) == tokens(tiny)


@pytest.mark.parametrize("seed", [-1, 2**64 - 1, 2**70])
def test_any_integer_is_a_seed(seed: int) -> None:
    tiny = base(tiny_llama())
    assert tokens(tiny, temperature=1.0, seed=seed) == tokens(tiny, temperature=1.0, seed=seed)


def test_a_stop_string_ends_the_row_and_is_cut_off() -> None:
    tiny = base(tiny_llama())
    (whole,) = [c.generation for c in decode(tiny, ["w5 w9"], Sampling(max_new_tokens=NEW)) if c.generation]
    words = whole.text.split()
    stop = words[3]
    (cut,) = [c.generation for c in decode(tiny, ["w5 w9"], Sampling(max_new_tokens=NEW, stop=(stop,))) if c.generation]
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert len(cut.tokens) < len(whole.tokens)


def test_streamed_pieces_make_up_the_text_and_never_show_a_stop_string() -> None:
    tiny = base(tiny_llama())
    (whole,) = [c.generation for c in decode(tiny, ["w5 w9"], Sampling(max_new_tokens=NEW)) if c.generation]
    stop = " ".join(whole.text.split()[4:6])
    chunks = list(decode(tiny, ["w5 w9", "w30"], Sampling(max_new_tokens=NEW, stop=(stop,))))
    for row in (0, 1):
        final = [c.generation for c in chunks if c.row == row and c.generation]
        assert len(final) == 1
        assert "".join(c.text for c in chunks if c.row == row) == final[0].text
        assert stop not in final[0].text


def test_streamed_pieces_make_up_the_text_of_a_tokenizer_that_would_clean_up_spaces() -> None:
    backend = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, " ": 62, ".": 63}, unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    cleaning = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", clean_up_tokenization_spaces=True
    )
    tiny = replace(base(tiny_llama()), tokenizer=cleaning)
    only = torch.full((VOCABULARY,), -1e4).index_fill(0, torch.tensor([62, 63]), 0.0)
    tiny.model.lm_head.bias = torch.nn.Parameter(only)
    chunks = list(decode(tiny, [" "], Sampling(max_new_tokens=NEW, temperature=1.0, seed=0)))
    whole = chunks[-1].generation
    assert whole is not None
    assert " ." in whole.text
    assert "".join(chunk.text for chunk in chunks) == whole.text


def test_a_model_without_a_key_value_cache_is_refused() -> None:
    tiny = base(MambaForCausalLM(MambaConfig(**SIZES, state_size=4)).eval())
    with pytest.raises(EngineError, match="key-value cache, got MambaForCausalLM"):
        tokens(tiny)


def test_messages_go_through_the_chat_template() -> None:
    tiny = base(tiny_llama())
    said = [{"role": "user", "content": "w5 w9"}, {"role": "user", "content": "w12"}]
    assert tokens(tiny, [said]) == tokens(tiny, ["w5 w9 w12"])


@pytest.mark.parametrize(
    ("prompts", "settings", "words"),
    [
        ([""], {}, "empty"),
        (["w5"], {"max_new_tokens": 128}, r"within 128 tokens, got 1 \+ 128"),
    ],
)
def test_prompts_that_cannot_be_computed_are_refused(prompts: list[str], settings: dict, words: str) -> None:
    with pytest.raises(PromptError, match=words):
        tokens(base(tiny_llama()), prompts, **settings)


@pytest.mark.parametrize("settings", IMPOSSIBLE)
def test_impossible_sampling_is_refused(settings: dict) -> None:
    with pytest.raises(PromptError):
        Sampling(**settings)
