"""Gates for each token and each layer, through the engine, against hooks that add the plain formula."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from arrowmoe.engine import ArrowEngine
from arrowmoe.errors import GateError
from arrowmoe.routing.gates import Gates
from registry.card import LoRACard
from tests.arrowmoe.tiny import base, card_for
from tests.peft_models import tiny_bert, tiny_llama

PROMPTS = ["w5 w9 w12 w7 w33", "w21 w4", "w60 w18 w11"]
TOKENS = 5
FIRST, SECOND = "model.layers.0", "model.layers.1"
NAMES = ("one", "two")
GIVEN: dict[str, LoRACard] = {}
"""What engines were given, by digest."""
Weigh = Callable[[str], np.ndarray]


@pytest.fixture
def causal(tmp_path: Path) -> ArrowEngine:
    return loaded(ArrowEngine(base(tiny_llama())), tmp_path)


@pytest.fixture
def encoder(tmp_path: Path) -> ArrowEngine:
    return loaded(ArrowEngine(base(tiny_bert())), tmp_path, target_modules=r".*(query|key|value|layer.*dense)")


def loaded(engine: ArrowEngine, path: Path, **config: object) -> ArrowEngine:
    for seed, name in enumerate(NAMES):
        card = card_for(engine, path, name, seed, r=2 + 3 * seed, **config)
        GIVEN[card.digest] = card
        engine.load_lora(card)
    return engine


def gates(engine: ArrowEngine, weights: np.ndarray, **layers: np.ndarray) -> Gates:
    return Gates(
        adapters=tuple(one.digest for one in engine.list_loras()),
        names=NAMES,
        weights=weights.astype(np.float32),
        layers={path.replace("__", "."): own.astype(np.float32) for path, own in layers.items()},
    )


def hooked(model: torch.nn.Module, cards: list[LoRACard], weigh: Weigh) -> torch.nn.Module:
    """`model` with Σₖ gₖ sₖ Bₖ Aₖ x added at each module; `weigh` gives gates ([tokens,] adapters) for a path.

    What follows the last of the gates' tokens has the last one's gates.
    """
    for path, module in model.named_modules():
        adapters = [parts(card, path) for card in cards if path in card.modules]
        if adapters:
            module.register_forward_hook(added(adapters, weigh(path)))
    return model


def parts(card: LoRACard, path: str) -> tuple[torch.Tensor, torch.Tensor, float]:
    a, b = (torch.tensor(np.array(tensor.float32())) for _, tensor in sorted(card.modules[path].items()))
    spec = card.manifest.adapter
    return a, b, spec.alpha / spec.rank


def added(adapters: list[tuple[torch.Tensor, torch.Tensor, float]], own: np.ndarray) -> Callable[..., torch.Tensor]:
    def hook(module: torch.nn.Module, given: tuple[torch.Tensor], y: torch.Tensor) -> torch.Tensor:
        (x,) = given
        last = np.atleast_2d(own)
        spread = torch.tensor(np.stack([last[min(at, len(last) - 1)] for at in range(x.shape[1])]))
        for k, (a, b, scaling) in enumerate(adapters):
            y = y + spread[:, k, None] * scaling * (x @ a.T @ b.T)
        return y

    return hook


def written(engine: ArrowEngine, row: int, weigh: Weigh, new_tokens: int) -> list[int]:
    """Greedy search by the plain formula, all tokens computed anew at each step."""
    model = hooked(tiny_llama(), [GIVEN[one.digest] for one in engine.list_loras()], weigh)
    ids = engine.base.tokenizer(PROMPTS[row])["input_ids"]
    made: list[int] = []
    for _ in range(new_tokens):
        with torch.no_grad():
            made.append(int(model(torch.tensor([[*ids, *made]])).logits[0, -1].argmax()))
        if made[-1] == 1:
            break
    return made


def random_weights(*shape: int) -> np.ndarray:
    return np.random.default_rng(7).uniform(-1, 2, (*shape, 2)).astype(np.float32)


def lengths(engine: ArrowEngine) -> list[int]:
    return [len(engine.base.tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]


def of_layer(path: str, layers: Mapping[str, np.ndarray], other: np.ndarray) -> np.ndarray:
    return next((own for layer, own in layers.items() if path.startswith(layer)), other)


def test_tokens_of_a_prompt_have_gates_of_their_own_and_new_ones_the_last_ones(causal: ArrowEngine) -> None:
    own = random_weights(3, TOKENS)
    made = causal.generate(PROMPTS, adapter=gates(causal, own), max_new_tokens=8)
    for row, count in enumerate(lengths(causal)):
        expected = written(causal, row, lambda _, row=row, count=count: own[row, :count], 8)
        assert list(made[row].tokens) == expected
    uniform = causal.generate(PROMPTS, adapter=gates(causal, own[:, 0]), max_new_tokens=8)
    assert [one.tokens for one in made] != [one.tokens for one in uniform]


def test_layers_have_gates_of_their_own(causal: ArrowEngine) -> None:
    own, first = random_weights(3), random_weights(3)[::-1].copy()
    given = gates(causal, own, model__layers__0=first)
    made = causal.generate(PROMPTS, adapter=given, max_new_tokens=8)
    for row in range(3):
        expected = written(causal, row, lambda path, row=row: of_layer(path, {FIRST: first[row]}, own[row]), 8)
        assert list(made[row].tokens) == expected


def test_rows_with_and_without_gates_of_their_own_share_a_batch(causal: ArrowEngine) -> None:
    tokens, layer = random_weights(1, TOKENS), random_weights(1)
    calls = {
        0: gates(causal, tokens),
        1: gates(causal, np.array([[1.0, 0.0]]), model__layers__1=layer),
        2: gates(causal, np.array([[0.0, 1.0]])),
    }
    ways: dict[int, Weigh] = {
        0: lambda _: tokens[0],
        1: lambda path: of_layer(path, {SECOND: layer[0]}, np.array([1.0, 0.0], np.float32)),
        2: lambda _: np.array([0.0, 1.0], np.float32),
    }
    expected = {row: written(causal, row, weigh, 12) for row, weigh in ways.items()}
    streams = {
        row: causal.generate([PROMPTS[row]], adapter=given, max_new_tokens=12, stream=True)
        for row, given in calls.items()
    }
    made = {row: [next(stream)] for row, stream in streams.items()}
    for row, stream in streams.items():
        made[row].extend(stream)
    assert {row: list(chunks[-1].generation.tokens) for row, chunks in made.items()} == expected


def test_a_prompt_in_pieces_has_the_gates_of_each_piece(causal: ArrowEngine) -> None:
    own = random_weights(1, TOKENS)
    object.__setattr__(causal._batching._limits, "prompt_tokens", 2)
    other = causal.generate(["w30 w31"], max_new_tokens=30, stream=True)
    next(other)
    made = causal.generate(PROMPTS[:1], adapter=gates(causal, own), max_new_tokens=8)
    assert list(made[0].tokens) == written(causal, 0, lambda _: own[0], 8)


def test_texts_are_encoded_with_gates_for_each_token_and_layer(encoder: ArrowEngine) -> None:
    own, layer = random_weights(3, TOKENS), random_weights(3)
    given = gates(encoder, own, encoder__layer__1=layer)
    vectors = encoder.encode_with_lora(PROMPTS, adapter=given)
    cards = [GIVEN[one.digest] for one in encoder.list_loras()]
    for row, count in enumerate(lengths(encoder)):
        layers = {"encoder.layer.1": layer[row]}
        model = hooked(
            tiny_bert(), cards, lambda path, row=row, n=count, own_=layers: of_layer(path, own_, own[row, :n])
        )
        ids = torch.tensor([encoder.base.tokenizer(PROMPTS[row])["input_ids"]])
        with torch.no_grad():
            mean = model(ids).last_hidden_state[0].mean(dim=0)
        np.testing.assert_allclose(vectors[row], mean / mean.norm(), rtol=1e-4, atol=1e-5)


def test_an_answer_says_the_weight_that_is_farthest_from_zero(causal: ArrowEngine) -> None:
    own = np.zeros((1, TOKENS, 2))
    own[0, 1, 0], own[0, 2, 0] = 0.5, -0.75
    given = gates(causal, own, model__layers__0=np.array([[0.0, 0.25]]))
    (made,) = causal.generate(PROMPTS[:1], adapter=given, max_new_tokens=2)
    assert made.adapters == {"one": -0.75, "two": 0.25}


def test_gates_that_do_not_fit_are_refused_by_name(causal: ArrowEngine, encoder: ArrowEngine) -> None:
    for tokens in (TOKENS - 1, TOKENS + 1):
        with pytest.raises(GateError, match=f"each of 5 tokens.* got {tokens}"):
            causal.generate(PROMPTS, adapter=gates(causal, random_weights(3, tokens)), max_new_tokens=2)
        with pytest.raises(GateError, match=f"each of 5 tokens.* got {tokens}"):
            encoder.encode_with_lora(PROMPTS, adapter=gates(encoder, random_weights(3, tokens)))
    with pytest.raises(GateError, match=r"paths of modules.*'model\.layer\.0'"):
        causal.generate(
            PROMPTS, adapter=gates(causal, random_weights(3), model__layer__0=random_weights(3)), max_new_tokens=2
        )
    with pytest.raises(GateError, match=r"layer 'model\.layers\.0': expected weights \(3, 2\)"):
        gates(causal, random_weights(3), model__layers__0=random_weights(2))
    with pytest.raises(GateError, match="finite"):
        gates(causal, random_weights(3), model__layers__0=np.full((3, 2), np.nan))
    assert causal.generate(PROMPTS, max_new_tokens=2)
