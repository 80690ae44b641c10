"""The engine: one frozen base model, and any number of adapters mixed freely within a batch.

    engine = ArrowEngine.from_pretrained("builtin:smollm2", registry=registry)
    engine.generate(["Rewrite as ISO: May 4th, 2025"], adapter="iso-dates")

Whatever an answer was made with is said in it. A card that does not fit, or a name that nobody knows, is an error;
the bare base model answers only where it was asked for, or where the router abstained and says so.
"""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, overload

import numpy as np

import arrowmoe
from arrowmoe.base_model import BaseModel, Kind, load_base_model
from arrowmoe.base_names import same_base
from arrowmoe.encoding import encode_batch
from arrowmoe.errors import AdapterMismatchError, EngineError, GateError, PromptError, RoutingError, UnknownAdapterError
from arrowmoe.features import Vectors
from arrowmoe.generation import Chunk, Generation, Prompt, Sampling, decode
from arrowmoe.lora.manager import LoadedLoRA, LoRAManager
from arrowmoe.lora.plan import Plan
from arrowmoe.routing.gates import Decision, Gates
from arrowmoe.routing.statistics import CardStatistics
from arrowmoe.swarm import Swarm
from federation.errors import FederationError
from federation.sync import SyncProgress, SyncReport
from registry.card import LoRACard
from registry.entries import CardEntry
from registry.errors import RegistryError
from registry.format import LoRAFormat
from registry.store import Registry

if TYPE_CHECKING:
    from arrowmoe.evolving import Evolution
    from arrowmoe.settings import EvolutionSettings
    from evolution.executors import Executor
    from evolution.protocols import Teacher
    from evolution.skill_distiller import Recipe
    from evolution.survey import Surveying

Mixture = Mapping[str, float]
Adapter = str | Mixture | Sequence["str | Mixture | None"] | Gates | None
BATCH_ROWS = 32


class TextRouter(Protocol):
    """What the engine asks for `adapter="auto"`."""

    def route_texts(self, texts: Sequence[str], *, base: str) -> Gates:
        """Gates with one row per text, over the cards made for base model `base`."""

    def register_card(self, card: CardEntry, statistics: CardStatistics | None = None) -> None:
        """A card arrived that may be chosen from now on."""


class Observer(Protocol):
    """What is told of every routed request (`arrowmoe.signalling`)."""

    def saw(self, base: str, text: str, decision: Decision, generation: Generation | None) -> str | None:
        """An id that feedback may refer to; None where the request was not kept."""


class ArrowEngine:
    """A base model with adapters. Calls may come from several threads; forward passes run one at a time."""

    def __init__(self, base: BaseModel, *, registry: Registry | None = None, router: TextRouter | None = None) -> None:
        self.base = base
        self.registry = registry
        self.router = router
        self.observer: Observer | None = None
        self._manager = LoRAManager(base.model)
        self._names: dict[str, str] = {}
        self._swarm: Swarm | None = None
        self._lock = threading.RLock()

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        device: str = "auto",
        dtype: str = "float32",
        name: str | None = None,
        kind: Kind | None = None,
        registry: Registry | None = None,
    ) -> ArrowEngine:
        """Load a base model: a hub id, a directory, a `.gguf` file, `builtin:smollm2` or `builtin:minilm`.

        `name` overrides the logical name that cards are compared with. Raises `ModelLoadError`.
        """
        return cls(load_base_model(model, device=device, dtype=dtype, name=name, kind=kind), registry=registry)

    @property
    def name(self) -> str:
        """The base model's logical name."""
        return self.base.name

    def load_lora(self, source: str | Path | LoRACard) -> str:
        """Load a card, a `.lora.arrow` file, or a card of the registry by name or digest; returns the card's name.

        The name then means this card. Raises `UnknownAdapterError`, `AdapterMismatchError`, `UnsupportedCardError`,
        or the registry's and the format's own errors.
        """
        card = self._card(source)
        with self._lock:
            self.hold(card)
            self._names[card.name] = card.digest
        return card.name

    def hold(self, card: LoRACard) -> LoadedLoRA:
        """Load a card that is asked for by its digest; what its name means stays as it is. Raises as `load_lora`."""
        self._check_base(card)
        with self._lock:
            return self._manager.apply_card(card)

    def remove_lora(self, name: str) -> bool:
        """Take an adapter out, by name or digest; whether it was there. Without adapters the base is bit-identical."""
        with self._lock:
            meant = {self._names.pop(name)} if name in self._names else self._called(name)
            self._names = {known: digest for known, digest in self._names.items() if digest not in meant}
            removed = [self._manager.remove_card(digest) for digest in meant]
            return any(removed)

    def list_loras(self) -> list[LoadedLoRA]:
        """The loaded adapters, in loading order."""
        return self._manager.loaded()

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Texts → (n, d) float32, by the bare base model."""
        return self.encode_with_lora(texts, adapter=None)

    def encode_with_lora(self, texts: Sequence[str], adapter: Adapter = "auto") -> Vectors:
        """Texts → (n, d) float32. `adapter` is as for `generate`."""
        _refuse_one_string("texts", texts)
        gates = self.resolve(adapter, texts)
        vectors = np.zeros((len(texts), self.base.d_model), dtype=np.float32)
        by_length = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        for start in range(0, len(texts), BATCH_ROWS):
            rows = by_length[start : start + BATCH_ROWS]
            with self._lock:
                plan = self._manager.plan(gates.rows(rows))
            with self._computing(plan):
                vectors[rows] = encode_batch(self.base, [texts[row] for row in rows])
        for row, text in enumerate(texts):
            self._saw(text, gates, row)
        return vectors

    @overload
    def generate(
        self,
        prompts: Sequence[Prompt],
        adapter: Adapter = ...,
        *,
        max_new_tokens: int = ...,
        temperature: float = ...,
        top_p: float = ...,
        stop: Sequence[str] = ...,
        seed: int | None = ...,
        stream: Literal[False] = ...,
    ) -> list[Generation]: ...

    @overload
    def generate(
        self,
        prompts: Sequence[Prompt],
        adapter: Adapter = ...,
        *,
        max_new_tokens: int = ...,
        temperature: float = ...,
        top_p: float = ...,
        stop: Sequence[str] = ...,
        seed: int | None = ...,
        stream: Literal[True],
    ) -> Iterator[Chunk]: ...

    def generate(
        self,
        prompts: Sequence[Prompt],
        adapter: Adapter = None,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        seed: int | None = None,
        stream: bool = False,
    ) -> list[Generation] | Iterator[Chunk]:
        """Answer `prompts` as one batch, whose rows may use different adapters.

        A prompt is a string, completed as it is, or a list of `{"role", "content"}` messages. `adapter` is None (the
        bare base), a name, a mixture {name: weight}, a list with one of these per row, "auto" (routed) or `Gates`.
        With `stream`, chunks come as they are made; between two of them the engine is free for other calls.
        """
        if self.base.kind != "causal":
            raise EngineError(f"{self.base.name} is an encoder, so it cannot generate", hint="use encode_with_lora()")
        _refuse_one_string("prompts", prompts)
        _refuse_one_string("stop strings", stop)
        sampling = Sampling(
            max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, stop=tuple(stop), seed=seed
        )
        if not prompts:
            return iter(()) if stream else []
        gates = self.resolve(adapter, [prompt_text(prompt) for prompt in prompts])
        chunks = self._chunks(prompts, gates, sampling)
        if stream:
            return chunks
        done = {chunk.row: chunk.generation for chunk in chunks if chunk.generation is not None}
        return [done[row] for row in range(len(prompts))]

    def start_federation(
        self,
        *,
        name: str | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        peers: Sequence[str] = (),
        discovery: bool = True,
        open: bool = False,
    ) -> Swarm:
        """Serve the registry's cards and find peers, until the returned `Swarm` is closed; arguments are its own.

        Raises `RegistryError` without a registry, `FederationError` where serving is refused.
        """
        if self.registry is None:
            raise RegistryError("an engine without a registry has no cards to share", hint="give it registry=")
        if self._swarm is not None:
            self._swarm.close()
        swarm = Swarm(
            self.registry,
            name=name or platform.node() or "engine",
            host=host,
            port=port,
            open=open,
            peers=peers,
            discovery=discovery,
        )
        self._swarm = swarm.start()
        swarm.announce()
        return swarm

    def sync_remote_skills(
        self, peers: Sequence[str] | None = None, *, on_progress: Callable[[SyncProgress], None] | None = None
    ) -> SyncReport:
        """Copy what `peers` (addresses; None: all known) offer and the registry lacks, and route to it from now on."""
        if self._swarm is None:
            raise FederationError("the federation is not started", hint="call start_federation() first")
        report = self._swarm.sync(peers, on_progress=on_progress)
        if self.router is not None and self.registry is not None:
            for entry in report.fetched:
                self.router.register_card(entry, CardStatistics.of_card(self.registry.get(entry.digest)))
        return report

    def enable_evolution(
        self,
        *,
        teacher: Teacher,
        model: str | None = None,
        settings: EvolutionSettings | None = None,
        recipe: Recipe | None = None,
        surveying: Surveying | None = None,
        executor: Executor | None = None,
    ) -> Evolution:
        """Notice from now on what no card fits, and learn it from `teacher`: `run()` a night, or `start()` the clock.

        `model` is how another process loads this base (default: its name); the other arguments replace parts.
        Raises `RegistryError` without a registry, `RoutingError` without a `LoRARouter`.
        """
        return arrowmoe.evolution_of_engine(
            self,
            teacher=teacher,
            model=model or self.name,
            settings=settings,
            recipe=recipe,
            surveying=surveying,
            executor=executor,
        )

    def resolve(self, adapter: Adapter, texts: Sequence[str]) -> Gates:
        """What `adapter` means for rows with these `texts`: gates over loaded adapters, loaded here if need be."""
        if isinstance(adapter, Gates):
            gates = adapter
        elif adapter == "auto":
            gates = self._route(texts)
        else:
            rows = _per_row(adapter, len(texts))
            digests = {name: self._digest(name) for name in dict.fromkeys(name for row in rows for name in row)}
            names = {loaded.digest: loaded.name for loaded in self._manager.loaded()}
            gates = Gates.of([_by_digest(row, digests) for row in rows], names)
        if len(gates) != len(texts):
            raise GateError(f"expected gates for {len(texts)} rows, got {len(gates)}")
        for digest in gates.adapters:
            self._digest(digest)
        return gates

    @contextmanager
    def computing(self, gates: Gates) -> Iterator[None]:
        """Be the only caller that runs forward passes, with `gates`: a row of them per row of the batch."""
        with self._lock, self._manager.gated(gates):
            yield

    def _called(self, name: str) -> set[str]:
        """Digests of the loaded adapters of that name, or with that digest."""
        return {loaded.digest for loaded in self._manager.loaded() if name in (loaded.name, loaded.digest)}

    def _chunks(self, prompts: Sequence[Prompt], gates: Gates, sampling: Sampling) -> Iterator[Chunk]:
        with self._lock:
            plan = self._manager.plan(gates)
        for chunk in decode(self.base, prompts, sampling, lambda: self._computing(plan)):
            if chunk.generation is None:
                yield chunk
            else:
                made = replace(chunk.generation, adapters=gates.attribution(chunk.row))
                signal = self._saw(prompt_text(prompts[chunk.row]), gates, chunk.row, made) if gates.decisions else None
                yield replace(chunk, generation=replace(made, signal=signal))

    def _saw(self, text: str, gates: Gates, row: int, generation: Generation | None = None) -> str | None:
        """Tell the observer of a request that a router decided."""
        if self.observer is None or not gates.decisions:
            return None
        return self.observer.saw(self.name, text, gates.decisions[row], generation)

    @contextmanager
    def _computing(self, plan: Plan | None) -> Iterator[None]:
        """One forward pass at a time, with the gates of `plan`."""
        with self._lock, self._manager.running(plan):
            yield

    def _route(self, texts: Sequence[str]) -> Gates:
        if self.router is None:
            raise RoutingError(
                "adapter='auto' needs a router, and this engine has none",
                hint="set engine.router, or name an adapter",
            )
        return self.router.route_texts(texts, base=self.base.name)

    def _digest(self, name: str) -> str:
        """The digest of the adapter that `name` (or a digest) means, loaded from the registry if need be.

        A name given to `load_lora` means that card; any other is asked of the registry each time, so that a new
        version is used as soon as it is published.
        """
        if name in self._names:
            return self._names[name]
        if name in self._manager:
            return name
        if self.registry is None:
            raise UnknownAdapterError(
                f"no adapter {name!r} is loaded; loaded are: {', '.join(self._names) or 'none'}",
                hint="load it with load_lora(), or give the engine a registry",
            )
        digest = self.registry.entry(name).digest
        if digest not in self._manager:
            self.hold(self.registry.get(digest))
        return digest

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
        if not same_base(trained_on, self.base.name):
            raise AdapterMismatchError(
                f"card {card.name!r} was trained on {trained_on}, the engine runs {self.base.name}",
                hint="load that base model; if it is the same one under another name, pass name= to from_pretrained()",
            )


def prompt_text(prompt: Prompt) -> str:
    """What a router reads of a prompt: the string, or the last message of a user."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Mapping):
        raise PromptError("expected a string or a list of messages, got one message", hint="put it in a list")
    said = [message["content"] for message in prompt if message["role"] == "user"]
    if not said:
        raise PromptError("expected at least one message with role 'user'")
    return said[-1]


def _refuse_one_string(what: str, given: Sequence[object]) -> None:
    if isinstance(given, str):
        raise PromptError(f"expected a list of {what}, got one string", hint="put it in a list")


def _per_row(adapter: str | Mixture | Sequence[str | Mixture | None] | None, rows: int) -> list[Mixture]:
    """One mixture per row: the same for all, or one entry each."""
    if adapter is None or isinstance(adapter, str | Mapping):
        return [_mixture(adapter)] * rows
    if len(adapter) != rows:
        raise GateError(f"expected one adapter per row ({rows}), got {len(adapter)}")
    return [_mixture(entry) for entry in adapter]


def _mixture(entry: str | Mixture | None) -> Mixture:
    if entry is None:
        return {}
    return {entry: 1.0} if isinstance(entry, str) else entry


def _by_digest(row: Mixture, digests: Mapping[str, str]) -> dict[str, float]:
    """Weights by digest; two names for one card add up."""
    weights: dict[str, float] = {}
    for name, weight in row.items():
        weights[digests[name]] = weights.get(digests[name], 0.0) + weight
    return weights
