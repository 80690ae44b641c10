"""What scores by weights are compared with: module inputs of the bare model and full products B A, text by text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from registry.card import LoRACard
from registry.manifest import AdapterSpec
from registry.tensor import Role
from registry.tensor import Tensor as CardTensor
from tests.peft_models import HIDDEN

READER = "model.layers.0.self_attn.q_proj"
TEXTS = ["w3 w4 w5 w6 w7", "w9", "w20 w21", "w40 w3 w40 w3 w40 w3 w41"]
PROBES = ["w10 w11 w12", "w30", "w50 w3 w22 w60", "w7 w8", "w33 w34 w35 w36 w37"]


def expected_means(
    model: PreTrainedModel, card: LoRACard, texts: Sequence[str], measure: Callable[[Tensor, Tensor], Tensor]
) -> npt.NDArray[np.float32]:
    """(rows,): the mean over modules of the mean over tokens of `measure`(s B A, x), x (d_in,)."""
    means = []
    for text in texts:
        seen = inputs_of(model, text)
        modules = [(path, delta) for path, delta in deltas_of(model, card) if path in seen]
        values = [torch.stack([measure(delta, x) for x in seen[path]]).mean() for path, delta in modules]
        means.append(float(torch.stack(values).mean()))
    return np.array(means, dtype=np.float32)


@torch.no_grad()
def inputs_of(model: PreTrainedModel, text: str) -> dict[str, Tensor]:
    """Path → inputs (tokens, d_in) of the linear modules that computing `text` runs."""
    seen: dict[str, Tensor] = {}

    def remember(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: seen.__setitem__(path, inputs[0].flatten(0, -2))

    linear = [path for path, module in model.named_modules() if hasattr(module, "weight")]
    hooks = [model.get_submodule(path).register_forward_pre_hook(remember(path)) for path in linear]
    model.base_model(input_ids=torch.tensor([[int(word[1:]) for word in text.split()]]))
    for hook in hooks:
        hook.remove()
    return {path: x for path, x in seen.items() if x.is_floating_point()}


def deltas_of(model: PreTrainedModel, card: LoRACard) -> Iterator[tuple[str, Tensor]]:
    """Path, s B A (d_out, d_in) of each module of `card`; of a DoRA adapter times magnitude / ‖W + s B A‖."""
    for path in card.manifest.adapter.target_modules:
        tensors = {role: torch.tensor(tensor.float32()) for role, tensor in card.modules[path].items()}
        delta = card.manifest.adapter.scaling_of(path) * tensors[Role.B] @ tensors[Role.A]
        if Role.MAGNITUDE in tensors:
            norm = (model.get_submodule(path).weight + delta).norm(dim=1)
            delta = (tensors[Role.MAGNITUDE] / norm)[:, None] * delta
        yield path, delta


def card_reading(model: PreTrainedModel, text: str, name: str) -> LoRACard:
    """A rank-1 card that looks in one direction only: that of what the first layer makes of the one word `text`."""
    direction = inputs_of(model, text)[READER][0]
    weights = {Role.A: (direction / direction.norm()).numpy()[None], Role.B: np.ones((HIDDEN, 1), dtype=np.float32)}
    return LoRACard.build(
        name=name,
        adapter=AdapterSpec(rank=1, alpha=1.0, target_modules=(READER,)),
        tensors=[CardTensor.from_numpy(READER, role, weight) for role, weight in weights.items()],
    )
