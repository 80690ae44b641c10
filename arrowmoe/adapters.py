"""The adapters of one engine: what a name means, where its card comes from, and who may compute with it when.

A name that was loaded means that card; any other is asked of the registry each time. Calls may come from several
threads; plans and forward passes take turns.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from arrowmoe.base_model import BaseModel
from arrowmoe.base_names import same_base
from arrowmoe.errors import AdapterMismatchError, UnknownAdapterError
from arrowmoe.lora.costs import Prices
from arrowmoe.lora.loader import Loader
from arrowmoe.lora.manager import LoRAManager
from arrowmoe.lora.plan import Plan
from arrowmoe.lora.slots import LoadedLoRA, PreparedLoRA
from arrowmoe.lora.tiers import Memory, Residence
from arrowmoe.memory_monitor import MemoryGuard
from arrowmoe.routing.gates import Gates
from registry.card import LoRACard
from registry.errors import UnknownCardError
from registry.format import LoRAFormat
from registry.store import Registry


class Adapters:
    """Adapters by name or digest; arguments as `ArrowEngine` takes them."""

    def __init__(
        self,
        base: BaseModel,
        *,
        registry: Registry | None,
        budget_bytes: int | None,
        host_bytes: int,
        prices: Prices | None,
        guard: MemoryGuard | None,
    ) -> None:
        self.registry = registry
        self._base = base
        self._manager = LoRAManager(
            base.model,
            budget_bytes=budget_bytes,
            host_bytes=host_bytes,
            find=self._card_again,
            guard=guard,
            prices=prices,
        )
        self.loader = Loader(self._manager)
        self._names: dict[str, str] = {}
        self._cards: dict[str, LoRACard] = {}
        self._lock = threading.RLock()

    def load(self, source: str | Path | LoRACard) -> str:
        """Load a card, a `.lora.arrow` file, or a card of the registry; its name, which then means this card."""
        card = self._card(source)
        ready = self._prepared(card)
        with self._lock:
            self._enter(card, ready)
            self._names[card.name] = card.digest
        return card.name

    def hold(self, card: LoRACard) -> LoadedLoRA:
        """Load a card that is asked for by its digest; what its name means stays as it is."""
        return self._enter(card, self._prepared(card))

    def remove(self, name: str) -> bool:
        """Take an adapter out, by name or digest; whether it was there. What the registry has still comes back."""
        with self._lock:
            meant = {self._names.pop(name)} if name in self._names else self._called(name)
            self._names = {known: digest for known, digest in self._names.items() if digest not in meant}
            removed = [self._manager.remove_card(digest) for digest in meant]
            for digest in meant:
                self._cards.pop(digest, None)
            return any(removed)

    def keep(self, name: str, *, pinned: bool | None, priority: int | None) -> None:
        """Pin an adapter to the device, or have those of lower `priority` leave before it."""
        digest = self.digest(name)
        with self._lock:
            self._manager.keep(digest, pinned=pinned, priority=priority)

    def loaded(self) -> list[LoadedLoRA]:
        """The loaded adapters, in loading order."""
        return self._manager.loaded()

    def residences(self) -> list[Residence]:
        """Where each adapter is, what it takes, and what uses it."""
        with self._lock:
            return self._manager.residences()

    def memory(self) -> Memory:
        """What adapters take of the device and the host."""
        with self._lock:
            return self._manager.memory()

    def digest(self, name: str) -> str:
        """The digest of the adapter that `name` (or a digest) means, loaded from the registry if need be.

        A name given to `load` means that card; any other is asked of the registry each time, so that a new version is
        used as soon as it is published. Raises `UnknownAdapterError` and as `hold`.
        """
        if (digest := self._names.get(name)) is not None:
            return digest
        if name in self._manager:
            return name
        if self.registry is None:
            raise UnknownAdapterError(
                f"no adapter {name!r} is loaded; loaded are: {', '.join(self._names) or 'none'}",
                hint="load it with load_lora(), or give the engine a registry",
            )
        digest = self.registry.entry(name).digest
        if digest not in self._manager:
            self._bring(self.registry, digest)
        return digest

    def plan(self, gates: Gates, *, after: Plan | None = None) -> Plan | None:
        """The plan of a batch. What is not on the device is made ready beside the forward passes of other batches."""
        ready = self.loader.bring(gates.adapters)
        with self._lock:
            return self._manager.plan(gates, ready, after=after)

    @contextmanager
    def running(self, plan: Plan | None) -> Iterator[None]:
        """Be the only caller that runs forward passes, with `plan`."""
        with self._lock, self._manager.running(plan):
            yield

    @contextmanager
    def computing(self, gates: Gates) -> Iterator[None]:
        """Be the only caller that runs forward passes, with `gates`: a row of them per row of the batch."""
        ready = self.loader.bring(gates.adapters)
        with self._lock, self._manager.running(self._manager.plan(gates, ready)):
            yield

    def _bring(self, registry: Registry, digest: str) -> None:
        """Load a card of the registry; one that is removed from there meanwhile does not stay."""
        card = registry.get(digest)
        self._put(card, self._prepared(card))
        try:
            registry.entry(digest)
        except UnknownCardError:
            with self._lock:
                if digest not in self._cards:
                    self._manager.remove_card(digest)
            raise

    def _prepared(self, card: LoRACard) -> PreparedLoRA | None:
        """A card's slots, made beside whatever is computed meanwhile; None if it is loaded."""
        self._check_base(card)
        return None if card.digest in self._manager else self._manager.prepare(card)

    def _put(self, card: LoRACard, ready: PreparedLoRA | None) -> LoadedLoRA:
        with self._lock:
            return self._manager.apply_card(card) if ready is None else self._manager.put(ready)

    def _enter(self, card: LoRACard, ready: PreparedLoRA | None) -> LoadedLoRA:
        """Load a card that was given, and that nobody else could give again."""
        with self._lock:
            loaded = self._put(card, ready)
            self._cards[card.digest] = card
            return loaded

    def _called(self, name: str) -> set[str]:
        """Digests of the loaded adapters of that name, or with that digest."""
        return {loaded.digest for loaded in self._manager.loaded() if name in (loaded.name, loaded.digest)}

    def _card_again(self, digest: str) -> LoRACard:
        """The card of an adapter that left the device: the one that was given, else the registry's."""
        if (card := self._cards.get(digest)) is not None:
            return card
        if self.registry is None:
            raise UnknownAdapterError(f"adapter {digest!r} was removed just now", hint="load it with load_lora()")
        return self.registry.get(digest)

    def _card(self, source: str | Path | LoRACard) -> LoRACard:
        if isinstance(source, LoRACard):
            return source
        if isinstance(source, Path) or str(source).endswith(".lora.arrow"):
            return LoRAFormat.load(source)
        if self.registry is None:
            raise UnknownAdapterError(
                f"expected a card, a .lora.arrow file, or a registry to find {source!r} in",
                hint="pass registry= to from_pretrained()",
            )
        return self.registry.get(source)

    def _check_base(self, card: LoRACard) -> None:
        trained_on = card.manifest.base.name
        if not same_base(trained_on, self._base.name):
            raise AdapterMismatchError(
                f"card {card.name!r} was trained on {trained_on}, the engine runs {self._base.name}",
                hint="load that base model (--base); from Python, from_pretrained(name=…) says that it is the same one",
            )


__all__ = ["Adapters"]
