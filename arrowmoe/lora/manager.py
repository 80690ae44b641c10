"""Puts adapters into a model and takes them out, within a budget of memory on the device.

Fail closed: a card that does not fit is refused whole, before anything is touched. An adapter that is known may be on
the device or not; a plan brings what it uses and keeps it there for as long as the plan lives, so what a batch in
flight uses is neither evicted nor gone before the batch is done. Where adapters are is decided in `tiers`.

Not for several threads at once, but for `missing`, `prepare` and `prepare_again`: they may run beside a forward pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from math import prod
from weakref import WeakSet

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from arrowmoe.errors import AdapterMemoryError, AdapterMismatchError, GateError, UnknownAdapterError
from arrowmoe.lora.costs import Prices, default_prices
from arrowmoe.lora.fitting import device_of, make_slot, match_modules, refuse_full
from arrowmoe.lora.layer import GateContext, LoRABias, LoRAEmbedding, LoRALinear, Wrapper
from arrowmoe.lora.memory import naming_memory
from arrowmoe.lora.plan import Plan
from arrowmoe.lora.slots import LoadedLoRA, PreparedLoRA, Slot, Slots
from arrowmoe.lora.tiers import Claim, Kept, Memory, Residence, Tier, leavers
from arrowmoe.memory_monitor import MemoryGuard
from arrowmoe.routing.gates import Gates
from registry.card import LoRACard
from registry.logs import get_logger
from registry.tensor import Role

log = get_logger(__name__)

HOST = torch.device("cpu")


@dataclass(kw_only=True, eq=False)
class _Known:
    """What is remembered of an adapter, on the device or not."""

    entry: LoadedLoRA
    resident: bool = False
    uses: int = 0
    turn: int = 0
    used_at: datetime | None = None
    pinned: bool = False
    priority: int = 0


class LoRAManager:
    """The adapters in one model, by card digest.

    Slots take at most `budget_bytes` (None: no bound, and nothing is evicted). `host_bytes` of pinned memory keep what
    leaves a CUDA device. `find` gives the card of a digest again; without it cards are kept. `guard` sees to it that
    memory is left when one is loaded.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        budget_bytes: int | None = None,
        host_bytes: int = 0,
        find: Callable[[str], LoRACard] | None = None,
        guard: MemoryGuard | None = None,
        prices: Prices | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._model = model
        self._modules = dict(model.named_modules())
        self._devices: dict[str, torch.device] = {}
        self._on_cuda = device_of(model).type == "cuda"
        self._context = GateContext()
        self._prices = prices
        self._wrappers: dict[str, Wrapper] = {}
        self._users: Counter[str] = Counter()
        self._known: dict[str, _Known] = {}
        self._leaving: dict[str, _Known] = {}
        self._plans: WeakSet[Plan] = WeakSet()
        self._cards: dict[str, LoRACard] = {}
        self._keeps_cards = find is None and budget_bytes is not None
        self._find = find or self._cards.__getitem__
        self._guard = guard
        self._budget = budget_bytes
        self._host: Kept[Slots] = Kept(host_bytes)
        self._now = now
        self._turns = count(1)

    def __contains__(self, digest: str) -> bool:
        return digest in self._known

    def loaded(self) -> list[LoadedLoRA]:
        """The adapters that are known, in loading order; `residences` says where each is."""
        return [known.entry for known in list(self._known.values())]

    def residences(self) -> list[Residence]:
        """Where every adapter is, those that are leaving last."""
        flying = self._sweep()
        return [
            self._residence(known, flying[digest], leaving=leaving)
            for store, leaving in ((self._known, False), (self._leaving, True))
            for digest, known in store.items()
        ]

    def memory(self) -> Memory:
        """What adapters take now."""
        self._sweep()
        return Memory(
            slots=sum(known.entry.nbytes for known in self._residents()),
            budget=self._budget,
            layouts=sum(plan.nbytes for plan in self._plans),
            host=self._host.nbytes,
        )

    def apply_card(self, card: LoRACard) -> LoadedLoRA:
        """Put `card` into the model; once more is no error and changes nothing. Raises as `prepare` and `put`."""
        if card.digest in self._known:
            log.info("lora_already_applied", name=card.name, digest=card.digest)
            return self._known[card.digest].entry
        entry = self.put(self.prepare(card))
        if self._keeps_cards:
            self._cards[card.digest] = card
        return entry

    def prepare(self, card: LoRACard) -> PreparedLoRA:
        """Make the slots of `card` in host memory; the model stays as it is.

        Raises `AdapterMismatchError`, `UnsupportedCardError` or `AdapterMemoryError`.
        """
        refuse_full(card)
        if self._guard is not None:
            self._guard.check(f"card {card.name!r}", self._slot_bytes(card), self._host.shrink)
        matched = match_modules(card, self._modules)
        with naming_memory(f"card {card.name!r}"):
            slots = {path: make_slot(card, name, self._modules[path], HOST) for name, path in matched.items()}
            if self._on_cuda:
                slots = {path: slot.pinned() for path, slot in slots.items()}
        nbytes = sum(slot.nbytes for slot in slots.values())
        entry = LoadedLoRA(name=card.name, digest=card.digest, modules=tuple(slots), nbytes=nbytes)
        return PreparedLoRA(entry=entry, slots=slots)

    def missing(self, adapters: Iterable[str]) -> list[str]:
        """Those of the known `adapters` that are not on the device."""
        return [digest for digest in adapters if (one := self._known.get(digest)) and not one.resident]

    def prepare_again(self, digest: str) -> PreparedLoRA:
        """Slots of a known adapter: from the host tier, else made from its card. Raises as `prepare` and `find`."""
        if (slots := self._host.get(digest)) is not None:
            return PreparedLoRA(entry=self._of(digest).entry, slots=slots)
        return self.prepare(self._find(digest))

    def put(self, ready: PreparedLoRA) -> LoadedLoRA:
        """Move an adapter to the device; others leave it if need be. It waits where those in flight leave no room.

        Raises `AdapterMemoryError` where there will be none, and leaves the model as it was.
        """
        entry = ready.entry
        known = self._leaving.pop(entry.digest, None) or self._known.get(entry.digest) or _Known(entry=entry)
        if not known.resident and self._is_room_for(known):
            self._move_in(known, ready.slots)
        if entry.digest not in self._known:
            self._users.update(entry.modules)
            self._known[entry.digest] = known
            log.info(
                "lora_applied", name=entry.name, digest=entry.digest, modules=len(ready.slots), nbytes=entry.nbytes
            )
        return known.entry

    def remove_card(self, digest: str) -> bool:
        """Take an adapter out; whether it was there. Batches in flight that use it are finished with it first.

        A module that no adapter is for becomes the original one again.
        """
        known = self._known.pop(digest, None)
        if known is None:
            return False
        self._cards.pop(digest, None)
        self._host.drop(digest)
        self._users.subtract(known.entry.modules)
        self._leaving[digest] = known
        self._sweep()
        log.info("lora_removed", name=known.entry.name, digest=digest, in_flight=digest in self._leaving)
        return True

    def keep(self, digest: str, *, pinned: bool | None = None, priority: int | None = None) -> None:
        """Pin an adapter to the device, or have those of lower `priority` leave before it. Raises as `plan`."""
        self._make_resident((digest,))
        known = self._of(digest)
        known.pinned = known.pinned if pinned is None else pinned
        known.priority = known.priority if priority is None else priority

    def paths(self, card: LoRACard) -> dict[str, str]:
        """Module path in the card → path in the model. Raises `AdapterMismatchError`."""
        return match_modules(card, self._modules)

    def slots(self, digest: str) -> dict[str, Slot]:
        """What an adapter holds, by module path. Raises as `plan`."""
        self._make_resident((digest,))
        return {path: self._wrappers[path].slots[digest] for path in self._known[digest].entry.modules}

    def replace_slots(self, digest: str, slots: Slots) -> None:
        """Compute an adapter with other `slots` from now on, at the modules it has; for training. It is pinned."""
        if slots.keys() != self.slots(digest).keys():
            raise AdapterMismatchError(f"expected slots for the modules of {self._known[digest].entry.name!r}")
        self._known[digest].pinned = True  # nobody could bring these slots back
        for path, slot in slots.items():
            self._wrappers[path].slots[digest] = slot

    def plan(self, gates: Gates, ready: Sequence[PreparedLoRA] = (), *, after: Plan | None = None) -> Plan | None:
        """Lay `gates` out, for as many forward passes as the caller likes; None for the bare base model.

        The adapters are on the device while the plan lives; `ready` are some that were prepared already, `after` is
        the plan of the same batch before rows changed. Raises `UnknownAdapterError`, `AdapterMemoryError`, `GateError`,
        as `find`.
        """
        if unknown := [layer for layer in gates.layers if layer not in self._modules]:
            raise GateError(f"expected gates for paths of modules of the model, got {unknown[0]!r}")
        if not gates.adapters:
            return None
        self._make_resident(gates.adapters, ready)
        like = next(self._model.parameters())
        weights, *own = (
            torch.tensor(values, dtype=like.dtype, device=like.device)
            for values in (gates.weights, *gates.layers.values())
        )
        layers = dict(zip(gates.layers, own, strict=True))
        if after is None:
            prices = self._prices or default_prices(like.device)
            plan = Plan(gates.adapters, weights, layers=layers, prices=prices)
        else:
            plan = after.followed_by(gates.adapters, weights, layers=layers)
        self._plans.add(plan)
        for digest in gates.adapters:
            self._touch(self._of(digest))
        return plan

    @contextmanager
    def running(self, plan: Plan | None) -> Iterator[None]:
        """Compute every forward pass inside with `plan`, one row of its gates per row of the batch.

        Raises as `plan` for one that was not made there, `AdapterMemoryError` where a pass runs out of memory.
        """
        if plan is not None and plan not in self._plans:
            self._plans.add(plan)  # before anything may leave
            self._make_resident(plan.adapters)
        before, self._context.plan = self._context.plan, plan
        try:
            with naming_memory("a forward pass"):
                yield
        finally:
            self._context.plan = before

    def gated(self, gates: Gates) -> AbstractContextManager[None]:
        """Compute every forward pass inside with `gates`."""
        return self.running(self.plan(gates))

    def _slot_bytes(self, card: LoRACard) -> int:
        """About what its slots will take: they have the model's dtype, whatever the card's."""
        elements = sum(prod(tensor.shape) for tensor in card.manifest.tensors if tensor.role is not Role.STATS)
        return elements * next(self._model.parameters()).dtype.itemsize

    def _make_resident(self, adapters: Sequence[str], ready: Sequence[PreparedLoRA] = ()) -> None:
        """Bring all of `adapters` to the device, or say why not before one leaves for another."""
        self._sweep()
        wanted = [self._of(digest) for digest in adapters]
        if all(known.resident for known in wanted):
            return
        self._make_room(wanted)
        prepared = {one.entry.digest: one for one in ready}
        for known in wanted:
            if not known.resident:
                again = prepared.get(known.entry.digest) or self.prepare_again(known.entry.digest)
                self._move_in(known, again.slots)

    def _is_room_for(self, known: _Known) -> bool:
        """Make room for an adapter; False if there is some only when batches in flight are done."""
        try:
            self._make_room([known])
        except AdapterMemoryError as error:
            if not error.later:
                raise
            return False
        return True

    def _make_room(self, wanted: Sequence[_Known]) -> None:
        """Have others leave the device until all of `wanted` have room there, some of which may be there already."""
        if self._budget is None:
            return
        flying = self._sweep()
        names = ", ".join(repr(known.entry.name) for known in wanted[:3]) + (", …" if len(wanted) > 3 else "")
        claims = [
            Claim(
                digest=known.entry.digest,
                nbytes=known.entry.nbytes,
                priority=known.priority,
                turn=known.turn,
                pinned=known.pinned,
                in_flight=known.entry.digest in flying,
            )
            for known in self._residents()
            if known not in wanted
        ]
        for digest in leavers(names, sum(known.entry.nbytes for known in wanted), claims, self._budget):
            self._take_out(self._known[digest])
            log.debug("lora_evicted", name=self._known[digest].entry.name, digest=digest)

    def _move_in(self, known: _Known, slots: Slots) -> None:
        entry = known.entry
        with naming_memory(f"card {entry.name!r}"):
            moved = {path: slot.to(self._device(path)) for path, slot in slots.items()}
        for path, slot in moved.items():
            self._wrap(path).slots[entry.digest] = slot
        known.resident, known.turn = True, next(self._turns)
        if self._on_cuda:
            self._host.keep(entry.digest, slots, entry.nbytes)

    def _take_out(self, known: _Known) -> None:
        """Off the device; the wrappers stay, for taking 210 of them out and putting them in costs more than a card."""
        for path in known.entry.modules:
            del self._wrappers[path].slots[known.entry.digest]
        known.resident = False

    def _sweep(self) -> Counter[str]:
        """Let go of what was removed and no batch uses any more, and of wrappers that no adapter is for.

        Gives digest → how many plans use it. A plan may die at any moment: whoever decides goes by this one count.
        """
        flying = Counter(digest for plan in self._plans for digest in plan.adapters)
        for digest in [digest for digest in self._leaving if digest not in flying]:
            known = self._leaving.pop(digest)
            if known.resident:
                self._take_out(known)
            for path in known.entry.modules:
                if path in self._wrappers and not self._users[path] and not self._wrappers[path].slots:
                    self._model.set_submodule(path, self._wrappers.pop(path).base)
        return flying

    def _of(self, digest: str) -> _Known:
        known = self._known.get(digest) or self._leaving.get(digest)
        if known is None:
            names = ", ".join(entry.name for entry in self.loaded()) or "none"
            raise UnknownAdapterError(f"expected loaded adapters, got {digest!r}; loaded are: {names}")
        return known

    def _residents(self) -> list[_Known]:
        return [known for known in [*self._known.values(), *self._leaving.values()] if known.resident]

    def _touch(self, known: _Known) -> None:
        known.uses, known.turn, known.used_at = known.uses + 1, next(self._turns), self._now()

    def _residence(self, known: _Known, in_flight: int, *, leaving: bool) -> Residence:
        entry = known.entry
        tier: Tier = "device" if known.resident else "host" if entry.digest in self._host else "file"
        return Residence(
            digest=entry.digest,
            name=entry.name,
            tier=tier,
            nbytes=entry.nbytes,
            uses=known.uses,
            used_at=known.used_at,
            pinned=known.pinned,
            priority=known.priority,
            in_flight=in_flight,
            leaving=leaving,
        )

    def _device(self, path: str) -> torch.device:
        if path not in self._devices:
            self._devices[path] = device_of(self._modules[path])
        return self._devices[path]

    def _wrap(self, path: str) -> Wrapper:
        if path not in self._wrappers:
            base = self._modules[path]
            wrapper = _wrapper_class(base)(base, path, self._context)
            wrapper.train(base.training)
            self._model.set_submodule(path, wrapper)
            self._wrappers[path] = wrapper
        return self._wrappers[path]


def _wrapper_class(module: nn.Module) -> type[Wrapper]:
    if isinstance(module, nn.Linear | Conv1D):
        return LoRALinear
    return LoRAEmbedding if isinstance(module, nn.Embedding) else LoRABias
