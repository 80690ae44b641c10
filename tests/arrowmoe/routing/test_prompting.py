"""Prompts and answers as batches, and features of prompts against a plain forward pass."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch

from arrowmoe.errors import RoutingError
from arrowmoe.routing.dataset import RoutingExample
from arrowmoe.routing.prompting import PromptFeaturizer, answer_batch, balanced_batches, held_out, prompt_ids
from arrowmoe.routing.training import IGNORED
from tests.arrowmoe import tiny
from tests.peft_models import tiny_llama

BASE = tiny.base(tiny_llama())
EXAMPLES = [
    RoutingExample(text="w3 w4 w5", card="a", answer="w20"),
    RoutingExample(text="w6", card="b", answer="w21 w22"),
]


def test_features_are_the_mean_hidden_state_of_the_asked_prompt() -> None:
    texts = ["w3 w4 w5", "w6", "w7 w8"]
    featurizer = PromptFeaturizer(BASE, layer=1)
    found = featurizer.features(texts)
    for text, vector in zip(texts, found.vectors, strict=True):
        ids = BASE.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        states = tiny_llama()(input_ids=ids, output_hidden_states=True).hidden_states[1][0]
        mean = states.mean(dim=0).detach().numpy()
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-5)
    assert found.embedder == featurizer.embedder == "tiny#layer1-mean-asked"


def test_a_featurizer_is_made_again_from_its_name() -> None:
    made = PromptFeaturizer.called("org/tiny#layer2-mean-asked", BASE)
    assert made.embedder == "tiny#layer2-mean-asked"
    for name in ("other#layer2-mean-asked", "tiny", "tiny#layer2-mean"):
        with pytest.raises(RoutingError, match="expected a head for hidden states of tiny"):
            PromptFeaturizer.called(name, BASE)


def test_a_batch_labels_the_answers_alone() -> None:
    batch = answer_batch(BASE, EXAMPLES)
    assert batch.input_ids.tolist() == [[3, 4, 5, 20, 1], [6, 21, 22, 1, 0]]
    assert batch.attention_mask.tolist() == [[1] * 5, [1, 1, 1, 1, 0]]
    assert batch.labels.tolist() == [[IGNORED] * 3 + [20, 1], [IGNORED, 21, 22, 1, IGNORED]]
    assert batch.prompt_mask.tolist() == [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]
    assert prompt_ids(BASE, "w3 w4 w5") == [3, 4, 5]


def test_training_sees_the_features_that_routing_sees() -> None:
    featurizer, batch = PromptFeaturizer(BASE, layer=1), answer_batch(BASE, EXAMPLES)
    trained = featurizer.hidden.vectors(batch.input_ids, batch.prompt_mask)
    torch.testing.assert_close(trained, torch.from_numpy(featurizer.features([row.text for row in EXAMPLES]).vectors))


def test_batches_hold_every_card_equally_often() -> None:
    rows = [*[EXAMPLES[0]] * 9, EXAMPLES[1]]
    first = Counter(
        int(ids[0]) for batch in islice(balanced_batches(BASE, rows, 4, seed=0), 3) for ids in batch.input_ids
    )
    assert first == {3: 6, 6: 6}


def test_a_share_of_every_card_is_held_out() -> None:
    rows = [RoutingExample(text=str(index), card="ab"[index < 25]) for index in range(35)]
    train, held = held_out(rows, 0.1, seed=0)
    assert Counter(row.card for row in held) == {"a": 1, "b": 2}
    assert sorted(row.text for row in [*train, *held]) == sorted(row.text for row in rows)
    assert held_out(rows, 0.1, seed=0) == (train, held)
