"""A card in 8 or 4 bits: A and B packed, all else as it was, and what that costs said in the manifest.

The engine unpacks such a card when it loads it, so it saves disk and network, no memory of the device. Statistics for
the router stay: they are of the prompts. The evaluation does not: it was measured on the weights before.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from math import sqrt
from typing import Any, Literal

from registry import low_rank
from registry.card import LoRACard, check_finite
from registry.errors import QuantisingError
from registry.low_rank import Term
from registry.tensor import DType, Role, Tensor, packing_of

Bits = Literal[8, 4]
_DTYPES: dict[int, DType] = {8: DType.INT8, 4: DType.NF4}


def quantise(card: LoRACard, bits: Bits, *, name: str, **about: Any) -> LoRACard:
    """`card` with A and B in `bits` bits, unsigned; `about` are fields of its manifest, in place of what `card` says.

    4 bits are NF4, but for vectors of odd length, which take 8. `training["quantise"]` says what was lost: `error` is
    ‖before − after‖ / ‖before‖ (Frobenius) of all scaling · B A, `worst` that of the module where it is greatest.
    Raises `QuantisingError`, and `CardIntegrityError` for weights that are not finite.
    """
    if bits not in _DTYPES:
        raise QuantisingError(f"expected 8 or 4 bits, got {bits}")
    packed = sorted(tensor.name for tensor in card.tensors if tensor.dtype.bits is not None)
    if packed:
        parents = ", ".join(card.manifest.parents)
        raise QuantisingError(
            f"card {card.name!r} is quantised already ({packed[0]!r}), so its error would not be known",
            hint=f"quantise the card that it was made from{f', {parents}' if parents else ''}",
        )
    check_finite(card.tensors)
    made = LoRACard.build(
        name=name,
        adapter=card.manifest.adapter,
        tensors=(_packed(tensor, bits) if tensor.role in (Role.A, Role.B) else tensor for tensor in card.tensors),
        base_name=card.base_name,
        base_architecture=card.manifest.base.architecture,
        **_described(card) | about,
        parents=[card.digest],
    )
    told = {"bits": bits, **_errors(card, made)}
    return made.describe(training=made.manifest.training | {"quantise": told})


def _packed(tensor: Tensor, bits: Bits) -> Tensor:
    vectors = tensor.float32() if tensor.role is Role.A else tensor.float32().T
    dtype = DType.INT8 if vectors.shape[1] % 2 else _DTYPES[bits]
    packing = packing_of(tensor.role, dtype, tensor.shape)
    assert packing is not None
    return Tensor.of(tensor.name, tensor.role, dtype, tensor.shape, packing.pack(vectors))


def _described(card: LoRACard) -> dict[str, Any]:
    """What the manifest says of what the card is for, and PEFT's settings; who made it and when is not the same."""
    fields = json.loads(card.manifest_bytes)
    own = {"format", "name", "epoch", "publisher", "parents", "base", "adapter", "evaluation", "created", "tensors"}
    return {field: value for field, value in fields.items() if field not in own}


def _errors(before: LoRACard, after: LoRACard) -> dict[str, Any]:
    squares = {module: _squares(before, after, module) for module in before.manifest.adapter.target_modules}
    relative = {module: _relative([pair]) for module, pair in squares.items()}
    worst = max(relative, key=lambda module: relative[module], default=None)
    return {
        "error": _relative(squares.values()),
        "worst": None if worst is None else {"module": worst, "error": relative[worst]},
    }


def _squares(before: LoRACard, after: LoRACard, module: str) -> tuple[float, float]:
    """‖before − after‖² and ‖before‖² of scaling · B A."""
    one, other = _term(before, module), _term(after, module, sign=-1)
    return low_rank.concatenate([one, other]).wanted, low_rank.squared_norm(one)


def _term(card: LoRACard, module: str, sign: int = 1) -> Term:
    tensors = card.modules[module]
    factor = sign * card.manifest.adapter.scaling_of(module)
    return Term(a=tensors[Role.A].float32(), b=tensors[Role.B].float32(), factor=factor)


def _relative(squares: Iterable[tuple[float, float]]) -> float:
    missed, whole = (sum(column) for column in zip(*squares, strict=True))
    return sqrt(missed / whole) if whole else 0.0


__all__ = ["Bits", "quantise"]
