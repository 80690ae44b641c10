"""One base model, its adapters and a router head as one differentiable whole: what Stages 2 and 3 train.

The base is the one that was given, never a copy. The head is this module's only submodule: its parameters are the
head's. Adapters live in a `LoRAManager` and are constants until `unfreeze_adapters`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from arrowmoe.base_model import BaseModel
from arrowmoe.errors import RoutingError, UnknownAdapterError, UnsupportedCardError
from arrowmoe.lora.manager import LoRAManager
from arrowmoe.lora.plan import Plan
from arrowmoe.lora.slots import Slot
from arrowmoe.routing.heads import RouterHead
from arrowmoe.routing.hidden import HiddenFeaturizer
from arrowmoe.routing.modes import Mode, gate, probabilities
from arrowmoe.routing.per_layer import PerLayerHead
from registry.card import LoRACard
from registry.tensor import Role
from registry.tensor import Tensor as CardTensor

_OWN_FIELDS = ("format", "name", "version", "base", "adapter", "tensors", "publisher", "created", "evaluation")


@dataclass(frozen=True, kw_only=True, eq=False)
class MixedOutput:
    """`output`: logits (rows, tokens, vocabulary), of an encoder its last hidden state (rows, tokens, d_model).

    `gates` (rows, [layers,] cards) is what was computed with; `gate_probs` and `gate_logits` are the head's, with the
    null expert's column if it has one.
    """

    output: Tensor
    gates: Tensor
    gate_probs: Tensor
    gate_logits: Tensor


class MultiLoRAWithRouter(nn.Module):
    """A base model whose K cards are mixed by a head: features → gates → the base with those gates."""

    def __init__(
        self,
        base: BaseModel,
        cards: Sequence[LoRACard],
        head: RouterHead | PerLayerHead,
        featurizer: HiddenFeaturizer,
        *,
        manager: LoRAManager | None = None,
    ) -> None:
        """`manager` is that of an engine which already runs this base. Raises `RoutingError`, or as `apply_card`."""
        super().__init__()
        if head.config.n_cards != len(cards):
            raise RoutingError(
                f"expected a card for each of the head's {head.config.n_cards} columns, got {len(cards)}"
            )
        self.head = head.to(base.device)
        self.cards = tuple(cards)
        self.base = base
        self._featurizer = featurizer
        self._manager = manager or LoRAManager(base.model)
        for card in cards:
            self._manager.apply_card(card)
        self._digests = tuple(card.digest for card in cards)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        images: Mapping[str, Tensor] | None = None,
        routing_mode: Mode = "top1",
        top_k: int | None = None,
        mask: Tensor | None = None,
        adapter: str | Sequence[str | None] | None = None,
        *,
        prompt_mask: Tensor | None = None,
        side: Tensor | None = None,
        temperature: float = 1.0,
        threshold: float = 0.3,
        max_experts: int = 4,
        hard_gumbel: bool = False,
        generator: torch.Generator | None = None,
    ) -> MixedOutput:
        """Route each row by its prompt and compute it with its cards; ids and masks (rows, tokens), padded right.

        `prompt_mask` is what the router may see (None: all that is attended); an answer that is trained on must not be
        in it. `images` are further arguments of the model, `side` (rows, d_side) further features of the head.
        `top_k` overrides the mode; `adapter`, a name or digest for all rows or one (or None) per row, overrides both.
        """
        seen = attention_mask if prompt_mask is None else prompt_mask
        logits = self.head(self.features(input_ids, seen, images), side)
        null, flat = self.head.config.null, logits.flatten(0, -2)
        allowed = mask.repeat_interleave(len(flat) // len(logits), 0) if mask is not None and mask.dim() == 2 else mask
        probs = probabilities(flat, mask=allowed, temperature=temperature, null=null)
        if adapter is not None:
            gates = self._named(adapter, logits)
        else:
            mode, threshold, max_experts = _chosen_by(routing_mode, top_k, threshold, max_experts)
            gates = gate(
                flat,
                mode,
                mask=allowed,
                temperature=temperature,
                threshold=threshold,
                max_experts=max_experts,
                null=null,
                hard_gumbel=hard_gumbel,
                generator=generator,
            ).view(*logits.shape[:-1], -1)
        return MixedOutput(
            output=self._compute(input_ids, attention_mask, images, gates),
            gates=gates,
            gate_probs=probs.view_as(logits),
            gate_logits=logits,
        )

    def features(self, input_ids: Tensor, mask: Tensor, images: Mapping[str, Tensor] | None = None) -> Tensor:
        """What the head reads of a batch, by the bare base: (rows, d_hidden)."""
        with self._manager.running(None):
            return self._featurizer.vectors(input_ids, mask, images)

    def unfreeze_adapters(self) -> list[nn.Parameter]:
        """Make every card's A and B trainable copies; returns them. Raises `UnsupportedCardError` for DoRA."""
        return [weight for digest in self._digests for weight in self._unfrozen(digest)]

    def freeze_adapters(self) -> None:
        """Make the adapters constants again, as they now are."""
        for digest in self._digests:
            frozen = {path: _detached(slot) for path, slot in self._manager.slots(digest).items()}
            self._manager.replace_slots(digest, frozen)

    def trained_cards(self, version: str) -> list[LoRACard]:
        """The adapters as they now are, as new unsigned cards of `version`, whose parents are the old ones."""
        return [self._read_back(card, version) for card in self.cards]

    def _compute(
        self, input_ids: Tensor, attention_mask: Tensor, images: Mapping[str, Tensor] | None, gates: Tensor
    ) -> Tensor:
        with self._manager.running(self._plan(gates.to(self.base.dtype))):
            output = self.base.model(
                input_ids=input_ids, attention_mask=attention_mask, **self._no_cache(), **(images or {})
            )
        found: Tensor = output.logits if "logits" in output else output.last_hidden_state
        return found

    def _no_cache(self) -> dict[str, bool]:
        return {"use_cache": False} if self.base.kind == "causal" else {}

    def _plan(self, gates: Tensor) -> Plan:
        if gates.dim() == 2:
            return Plan(self._digests, gates)
        assert isinstance(self.head, PerLayerHead)
        by_layer = dict(zip(self.head.layers, gates.unbind(dim=1), strict=True))
        # Modules outside the head's layers, if any, take the mean of all.
        return Plan(self._digests, gates.mean(dim=1), layers=by_layer)

    def _named(self, adapter: str | Sequence[str | None], logits: Tensor) -> Tensor:
        rows = logits.shape[0]
        names = [adapter] * rows if isinstance(adapter, str) else list(adapter)
        if len(names) != rows:
            raise RoutingError(f"expected one adapter for each of {rows} rows, got {len(names)}")
        gates = logits.new_zeros((rows, len(self.cards)))
        for row, name in enumerate(names):
            if name is not None:
                gates[row, self._column(name)] = 1
        return gates

    def _column(self, name: str) -> int:
        found = [column for column, card in enumerate(self.cards) if name in (card.name, card.digest)]
        if len(found) != 1:
            raise UnknownAdapterError(
                f"expected one card called {name!r}, got {len(found)} among {[card.name for card in self.cards]}"
            )
        return found[0]

    def _unfrozen(self, digest: str) -> list[nn.Parameter]:
        slots = self._manager.slots(digest)
        if any(slot.rescale is not None for slot in slots.values()):
            raise UnsupportedCardError(
                "a DoRA adapter's norms depend on its weights, so Stage 3 does not train it",
                hint="train plain LoRA adapters, or stop after Stage 2",
            )
        trainable = {path: _trainable(slot) for path, slot in slots.items()}
        self._manager.replace_slots(digest, trainable)
        return [tensor for slot in trainable.values() for tensor in slot.tensors() if isinstance(tensor, nn.Parameter)]

    def _read_back(self, card: LoRACard, version: str) -> LoRACard:
        slots = self._manager.slots(card.digest)
        paths = self._manager.paths(card)
        about = {key: value for key, value in json.loads(card.manifest_bytes).items() if key not in _OWN_FIELDS}
        return LoRACard.build(
            name=card.name,
            adapter=card.manifest.adapter,
            tensors=[
                _updated(tensor, slots[paths[tensor.name]]) if _trains(tensor) else tensor for tensor in card.tensors
            ],
            base_name=card.manifest.base.name,
            base_architecture=card.manifest.base.architecture,
            version=version,
            **about | {"parents": [card.digest]},
        )


def _chosen_by(mode: Mode, top_k: int | None, threshold: float, max_experts: int) -> tuple[Mode, float, int]:
    """Mode, threshold and most experts, with `top_k` said in them."""
    if top_k is None and mode == "manual":
        raise RoutingError("routing_mode 'manual' needs an adapter", hint="pass adapter= with the name of a card")
    if top_k is None:
        return mode, threshold, max_experts
    return ("top1", threshold, 1) if top_k == 1 else ("threshold", 0.0, top_k)


def _trainable(slot: Slot) -> Slot:
    if slot.low_rank is None:
        return slot
    a, b = (nn.Parameter(weight.detach().clone()) for weight in (slot.low_rank.a, slot.low_rank.b))
    return replace(slot, low_rank=replace(slot.low_rank, a=a, b=b))


def _detached(slot: Slot) -> Slot:
    if slot.low_rank is None:
        return slot
    return replace(slot, low_rank=replace(slot.low_rank, a=slot.low_rank.a.detach(), b=slot.low_rank.b.detach()))


def _trains(tensor: CardTensor) -> bool:
    return tensor.role in (Role.A, Role.B)


def _updated(tensor: CardTensor, slot: Slot) -> CardTensor:
    """A card's A (r, d_in) or B (d_out, r), float32, out of a slot, which keeps B as (r, d_out)."""
    assert slot.low_rank is not None
    weight = slot.low_rank.a if tensor.role is Role.A else slot.low_rank.b.T
    return CardTensor.from_numpy(tensor.name, tensor.role, weight.detach().float().cpu().contiguous().numpy())
