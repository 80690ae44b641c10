"""Whether a card fits a base model, and what it holds for each of its modules.

Fail closed: a card that does not fit is refused whole, with the module and shapes that differ.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from arrowmoe.errors import AdapterMismatchError, UnsupportedCardError
from arrowmoe.lora.layer import dense_weight, dtype_of, shape_of
from arrowmoe.lora.slots import Slot
from arrowmoe.lora.tensors import to_torch
from evolution.gated import LowRank
from registry.card import LoRACard
from registry.tensor import Role
from registry.tensor import Tensor as CardTensor

Tensors = Mapping[Role, CardTensor]


def match_modules(card: LoRACard, modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Module path in the card → path in the model: the same path, or the only one that one ends in the other.

    An adapter trained on a bare backbone says `layers.0.q_proj` where the whole model says `model.layers.0.q_proj`.
    Raises `AdapterMismatchError` naming what is missing, or what several modules could be.
    """
    by_leaf: dict[str, list[str]] = defaultdict(list)
    for path in modules:
        by_leaf[path.rpartition(".")[2]].append(path)
    matched = {name: _match(name, modules, by_leaf) for name in card.modules if _is_module(card, name)}
    missing = sorted(name for name, path in matched.items() if path is None)
    if missing:
        raise AdapterMismatchError(
            f"card {card.name!r} targets {len(missing)} of {len(matched)} modules that the base model lacks, "
            f"first {missing[0]!r}",
            hint=f"the card was trained on {card.manifest.base.name or 'an unnamed base'}; load that base model",
        )
    found = {name: path for name, path in matched.items() if path is not None}
    if len(set(found.values())) < len(found):
        raise AdapterMismatchError(f"card {card.name!r}: two of its modules are the same module of the base model")
    return found


def make_slot(card: LoRACard, name: str, module: nn.Module, device: torch.device | None = None) -> Slot:
    """The slot of `card` for `module`, in the module's dtype and on its device, unless another one is given.

    Raises `AdapterMismatchError` or `UnsupportedCardError`.
    """
    tensors = card.modules[name]
    where = device_of(module) if device is None else device
    low_rank = _low_rank(card, name, module, where) if Role.A in tensors else None
    rescale = _dora_factor(tensors, low_rank, module) if Role.MAGNITUDE in tensors else None
    if rescale is not None and low_rank is not None:
        low_rank = LowRank(a=low_rank.a, b=low_rank.b * rescale, scaling=low_rank.scaling)
    return Slot(
        low_rank=low_rank,
        rescale=None if rescale is None else rescale - 1,
        bias=_bias_change(card, name, module, where) if Role.BIAS in tensors else None,
    )


def device_of(module: nn.Module) -> torch.device:
    """The device of a module's parameters; the CPU for one without any."""
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


def _low_rank(card: LoRACard, name: str, module: nn.Module, device: torch.device) -> LowRank:
    a, b = card.modules[name][Role.A], card.modules[name][Role.B]
    embedding = name in card.manifest.adapter.embeddings
    expected = shape_of(module) if isinstance(module, nn.Embedding) == embedding else None
    if expected != (a.shape[1], b.shape[0]):
        raise AdapterMismatchError(
            f"card {card.name!r}, module {name!r}: made for {'an embedding' if embedding else 'a linear module'} "
            f"{a.shape[1]} → {b.shape[0]}, the base model has {_describe(module)}",
            hint=f"the card was trained on {card.manifest.base.name or 'an unnamed base'}",
        )
    dtype = dtype_of(module)
    return LowRank(
        a=to_torch(a, dtype, device),
        b=to_torch(b, dtype, device).T,
        scaling=card.manifest.adapter.scaling_of(name) * _output_scale(module),
    )


def _output_scale(module: nn.Module) -> float:
    """The factor on what an embedding gives (Gemma's √d), which the adapter's part takes as well."""
    scale = getattr(module, "embed_scale", None) if isinstance(module, nn.Embedding) else None
    if scale is None:
        return 1.0
    return float(torch.as_tensor(scale).to(module.get_parameter("weight").dtype))


def _dora_factor(tensors: Tensors, low_rank: LowRank | None, module: nn.Module) -> torch.Tensor:
    """Magnitude / ‖W + s B A‖, row by row (d_out,): DoRA, arXiv:2402.09353, eq. 5."""
    if low_rank is None or not isinstance(module, nn.Linear | Conv1D):
        raise UnsupportedCardError(f"DoRA is computed for linear modules only, got {type(module).__name__}")
    weight = dense_weight(module)
    a, b = low_rank.a.to(weight.device), low_rank.b.to(weight.device)
    norm = torch.linalg.norm(weight + low_rank.scaling * (b.T @ a), dim=1)
    factor: torch.Tensor = to_torch(tensors[Role.MAGNITUDE], weight.dtype, weight.device) / norm
    return factor.to(low_rank.a.device)


def _bias_change(card: LoRACard, name: str, module: nn.Module, device: torch.device) -> torch.Tensor:
    bias = card.modules[name][Role.BIAS]
    own = getattr(module, "bias", None)
    if not isinstance(own, torch.Tensor) or tuple(own.shape) != bias.shape:
        have = tuple(own.shape) if isinstance(own, torch.Tensor) else "none"
        raise AdapterMismatchError(
            f"card {card.name!r}, module {name!r}: made for a bias of shape {bias.shape}, the base model has {have}"
        )
    return to_torch(bias, own.dtype, device) - own.detach().to(device)


def _match(name: str, modules: Mapping[str, nn.Module], by_leaf: Mapping[str, list[str]]) -> str | None:
    if name in modules:
        return name
    ends = [path for path in by_leaf[name.rpartition(".")[2]] if _is_suffix(name, path) or _is_suffix(path, name)]
    return ends[0] if len(ends) == 1 else None


def _is_suffix(short: str, long: str) -> bool:
    return long.endswith(f".{short}")


def _is_module(card: LoRACard, name: str) -> bool:
    return not card.modules[name].keys() <= {Role.FULL, Role.STATS}


def refuse_full(card: LoRACard) -> None:
    """Raise `UnsupportedCardError` for a card that replaces whole parameters of the base model."""
    full = [tensor.name for tensor in card.tensors if tensor.role is Role.FULL]
    if full:
        raise UnsupportedCardError(
            f"card {card.name!r} replaces whole parameters of the base model ({full[0]!r} and {len(full) - 1} more), "
            "which the engine does not compute",
            hint="train the adapter without modules_to_save, or export it and use it with PEFT",
        )


def _describe(module: nn.Module) -> str:
    shape = shape_of(module)
    return f"{type(module).__name__} {shape[0]} → {shape[1]}" if shape else type(module).__name__
