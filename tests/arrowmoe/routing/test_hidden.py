"""Hidden-state features against a plain forward pass of the model, text by text."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from arrowmoe.errors import RoutingError
from arrowmoe.routing.hidden import HiddenFeaturizer, Pool
from tests.arrowmoe import tiny
from tests.peft_models import tiny_bert, tiny_llama

TEXTS = ["w3 w4 w5 w6 w7", "w9", "w20 w21"]
MODELS = {"llama": tiny_llama, "bert": tiny_bert}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("pool", ["mean", "cls", "last"])
def test_vectors_equal_each_text_computed_alone(model: str, layer: int, pool: Pool) -> None:
    base = tiny.base(MODELS[model]())
    found = HiddenFeaturizer(base, layer=layer, pool=pool).features(TEXTS)
    for text, vector in zip(TEXTS, found.vectors, strict=True):
        ids = torch.tensor([[int(word[1:]) for word in text.split()]])
        states = base.model.base_model(input_ids=ids, output_hidden_states=True).hidden_states[layer][0]
        expected = {"mean": states.mean(dim=0), "cls": states[0], "last": states[-1]}[pool].numpy()
        np.testing.assert_allclose(vector, expected / np.linalg.norm(expected), rtol=1e-4, atol=1e-6)


def test_features_say_what_they_are_of() -> None:
    featurizer = HiddenFeaturizer(tiny.base(tiny_llama()), layer=1, pool="last")
    assert featurizer.embedder == "tiny#layer1-last"
    features = featurizer.features(TEXTS)
    assert (features.embedder, features.texts) == ("tiny#layer1-last", tuple(TEXTS))
    assert features.vectors.dtype == np.float32


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_layer_that_the_model_lacks_is_refused(layer: int) -> None:
    with pytest.raises(RoutingError, match=f"tiny has 2 layers: expected layer 0 to 2, got {layer}"):
        HiddenFeaturizer(tiny.base(tiny_llama()), layer=layer)
