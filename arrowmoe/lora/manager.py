"""Puts adapters into a model and takes them out: which modules a card means, whether it fits, and the wrappers.

Fail closed: a card that does not fit is refused whole, before anything is touched, with the module and shapes that
differ. Taking the last adapter out of a module puts the original module back.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from arrowmoe.errors import AdapterMismatchError, UnknownAdapterError, UnsupportedCardError
from arrowmoe.lora.kernels import LowRank
from arrowmoe.lora.layer import GateContext, LoRABias, LoRAEmbedding, LoRALinear, Wrapper, dense_weight, shape_of
from arrowmoe.lora.plan import Plan
from arrowmoe.lora.slots import Slot
from arrowmoe.lora.tensors import to_torch
from arrowmoe.routing.gates import Gates
from registry.card import LoRACard
from registry.logs import get_logger
from registry.tensor import Role
from registry.tensor import Tensor as CardTensor

log = get_logger(__name__)

Tensors = Mapping[Role, CardTensor]


@dataclass(frozen=True, kw_only=True)
class LoadedLoRA:
    """An adapter that a model holds: its card, the modules it is in, and the bytes its slots take."""

    name: str
    digest: str
    modules: tuple[str, ...]
    nbytes: int


class LoRAManager:
    """The adapters in one model, by card digest."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._context = GateContext()
        self._wrappers: dict[str, Wrapper] = {}
        self._loaded: dict[str, LoadedLoRA] = {}

    def __contains__(self, digest: str) -> bool:
        return digest in self._loaded

    def loaded(self) -> list[LoadedLoRA]:
        """What is loaded, in loading order."""
        return list(self._loaded.values())

    def apply_card(self, card: LoRACard) -> LoadedLoRA:
        """Put `card` into the model; once more is no error and changes nothing.

        Raises `AdapterMismatchError` or `UnsupportedCardError` and leaves the model as it was.
        """
        if card.digest in self._loaded:
            log.info("lora_already_applied", name=card.name, digest=card.digest)
            return self._loaded[card.digest]
        _refuse_full(card)
        modules = self._modules()
        matched = match_modules(card, modules)
        slots = {path: make_slot(card, name, modules[path]) for name, path in matched.items()}
        for path, slot in slots.items():
            self._wrap(path).slots[card.digest] = slot
        entry = LoadedLoRA(name=card.name, digest=card.digest, modules=tuple(slots), nbytes=_slot_bytes(slots))
        self._loaded[card.digest] = entry
        log.info("lora_applied", name=card.name, digest=card.digest, modules=len(slots), nbytes=entry.nbytes)
        return entry

    def remove_card(self, digest: str) -> bool:
        """Take an adapter out; whether it was there. A module without adapters becomes the original one again."""
        entry = self._loaded.pop(digest, None)
        if entry is None:
            return False
        for path in entry.modules:
            wrapper = self._wrappers[path]
            del wrapper.slots[digest]
            if not wrapper.slots:
                self._model.set_submodule(path, wrapper.base)
                del self._wrappers[path]
        log.info("lora_removed", name=entry.name, digest=digest)
        return True

    def paths(self, card: LoRACard) -> dict[str, str]:
        """Module path in the card → path in the model. Raises `AdapterMismatchError`."""
        return match_modules(card, self._modules())

    def slots(self, digest: str) -> dict[str, Slot]:
        """What an adapter holds, by module path. Raises `UnknownAdapterError`."""
        self._check_loaded((digest,))
        return {path: self._wrappers[path].slots[digest] for path in self._loaded[digest].modules}

    def replace_slots(self, digest: str, slots: Mapping[str, Slot]) -> None:
        """Compute an adapter with other `slots` from now on, at the modules it has; for training."""
        if slots.keys() != self.slots(digest).keys():
            raise AdapterMismatchError(f"expected slots for the modules of {self._loaded[digest].name!r}")
        for path, slot in slots.items():
            self._wrappers[path].slots[digest] = slot

    def plan(self, gates: Gates) -> Plan | None:
        """Lay `gates` out, for as many forward passes as the caller likes; None for the bare base model."""
        if not gates.adapters:
            return None
        self._check_loaded(gates.adapters)
        like = next(self._model.parameters())
        return Plan(gates.adapters, torch.tensor(gates.weights, dtype=like.dtype, device=like.device))

    @contextmanager
    def running(self, plan: Plan | None) -> Iterator[None]:
        """Compute every forward pass inside with `plan`, one row of its gates per row of the batch.

        Raises `UnknownAdapterError` if an adapter was removed since it was laid out.
        """
        if plan is not None:
            self._check_loaded(plan.adapters)
        before, self._context.plan = self._context.plan, plan
        try:
            yield
        finally:
            self._context.plan = before

    def gated(self, gates: Gates) -> AbstractContextManager[None]:
        """Compute every forward pass inside with `gates`."""
        return self.running(self.plan(gates))

    def _check_loaded(self, adapters: tuple[str, ...]) -> None:
        missing = [digest for digest in adapters if digest not in self._loaded]
        if missing:
            names = ", ".join(entry.name for entry in self.loaded()) or "none"
            raise UnknownAdapterError(f"expected loaded adapters, got {missing[0]!r}; loaded are: {names}")

    def _modules(self) -> dict[str, nn.Module]:
        """Path → original module of everything in the model, without the wrappers' insides."""
        inside = tuple(f"{path}.base" for path in self._wrappers)
        return {
            path: self._wrappers[path].base if path in self._wrappers else module
            for path, module in self._model.named_modules()
            if not (inside and path.startswith(inside))
        }

    def _wrap(self, path: str) -> Wrapper:
        if path not in self._wrappers:
            base = self._model.get_submodule(path)
            wrapper = _wrapper_class(base)(base, path, self._context)
            wrapper.train(base.training)
            self._model.set_submodule(path, wrapper)
            self._wrappers[path] = wrapper
        return self._wrappers[path]


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


def make_slot(card: LoRACard, name: str, module: nn.Module) -> Slot:
    """The slot of `card` for `module`, in the module's dtype and on its device. Raises `AdapterMismatchError`."""
    tensors = card.modules[name]
    low_rank = _low_rank(card, name, tensors, module) if Role.A in tensors else None
    rescale = _dora_factor(tensors, low_rank, module) if Role.MAGNITUDE in tensors else None
    if rescale is not None and low_rank is not None:
        low_rank = LowRank(a=low_rank.a, b=low_rank.b * rescale, scaling=low_rank.scaling)
    return Slot(
        low_rank=low_rank,
        rescale=None if rescale is None else rescale - 1,
        bias=_bias_change(card, name, tensors[Role.BIAS], module) if Role.BIAS in tensors else None,
    )


def _low_rank(card: LoRACard, name: str, tensors: Tensors, module: nn.Module) -> LowRank:
    a, b = tensors[Role.A], tensors[Role.B]
    embedding = name in card.manifest.adapter.embeddings
    expected = shape_of(module) if isinstance(module, nn.Embedding) == embedding else None
    if expected != (a.shape[1], b.shape[0]):
        raise AdapterMismatchError(
            f"card {card.name!r}, module {name!r}: made for {'an embedding' if embedding else 'a linear module'} "
            f"{a.shape[1]} → {b.shape[0]}, the base model has {_describe(module)}",
            hint=f"the card was trained on {card.manifest.base.name or 'an unnamed base'}",
        )
    like = module.get_parameter("weight")
    return LowRank(
        a=to_torch(a, like),
        b=to_torch(b, like).T,
        scaling=card.manifest.adapter.scaling_of(name) * _output_scale(module),
    )


def _output_scale(module: nn.Module) -> float:
    """The factor on what an embedding gives (Gemma's √d), which the adapter's part takes as well."""
    scale = getattr(module, "embed_scale", 1.0)
    return float(torch.as_tensor(scale).to(module.get_parameter("weight").dtype))


def _dora_factor(tensors: Tensors, low_rank: LowRank | None, module: nn.Module) -> torch.Tensor:
    """Magnitude / ‖W + s B A‖, row by row (d_out,): DoRA, arXiv:2402.09353, eq. 5."""
    if low_rank is None or not isinstance(module, nn.Linear | Conv1D):
        raise UnsupportedCardError(f"DoRA is computed for linear modules only, got {type(module).__name__}")
    weight = dense_weight(module)
    norm = torch.linalg.norm(weight + low_rank.scaling * (low_rank.b.T @ low_rank.a), dim=1)
    factor: torch.Tensor = to_torch(tensors[Role.MAGNITUDE], module.weight) / norm
    return factor


def _bias_change(card: LoRACard, name: str, bias: CardTensor, module: nn.Module) -> torch.Tensor:
    own = getattr(module, "bias", None)
    if not isinstance(own, torch.Tensor) or tuple(own.shape) != bias.shape:
        have = tuple(own.shape) if isinstance(own, torch.Tensor) else "none"
        raise AdapterMismatchError(
            f"card {card.name!r}, module {name!r}: made for a bias of shape {bias.shape}, the base model has {have}"
        )
    return to_torch(bias, own) - own.detach()


def _match(name: str, modules: Mapping[str, nn.Module], by_leaf: Mapping[str, list[str]]) -> str | None:
    if name in modules:
        return name
    ends = [path for path in by_leaf[name.rpartition(".")[2]] if _is_suffix(name, path) or _is_suffix(path, name)]
    return ends[0] if len(ends) == 1 else None


def _is_suffix(short: str, long: str) -> bool:
    return long.endswith(f".{short}")


def _is_module(card: LoRACard, name: str) -> bool:
    return not card.modules[name].keys() <= {Role.FULL, Role.STATS}


def _refuse_full(card: LoRACard) -> None:
    full = [tensor.name for tensor in card.tensors if tensor.role is Role.FULL]
    if full:
        raise UnsupportedCardError(
            f"card {card.name!r} replaces whole parameters of the base model ({full[0]!r} and {len(full) - 1} more), "
            "which the engine does not compute",
            hint="train the adapter without modules_to_save, or export it and use it with PEFT",
        )


def _wrapper_class(module: nn.Module) -> type[Wrapper]:
    if isinstance(module, nn.Linear | Conv1D):
        return LoRALinear
    return LoRAEmbedding if isinstance(module, nn.Embedding) else LoRABias


def _slot_bytes(slots: Mapping[str, Slot]) -> int:
    return sum(tensor.nbytes for slot in slots.values() for tensor in slot.tensors())


def _describe(module: nn.Module) -> str:
    shape = shape_of(module)
    return f"{type(module).__name__} {shape[0]} → {shape[1]}" if shape else type(module).__name__
