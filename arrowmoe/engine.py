"""The engine: one frozen base model, and any number of adapters mixed freely within a batch.

    engine = ArrowEngine.from_pretrained("builtin:smollm2", registry=registry)
    engine.generate(["Rewrite as ISO: May 4th, 2025"], adapter="iso-dates")

Whatever an answer was made with is said in it. A card that does not fit, or a name that nobody knows, is an error;
the bare base model answers only where it was asked for, or where the router abstained and says so.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, overload

import numpy as np

import arrowmoe
from arrowmoe.adapters import Adapters
from arrowmoe.arguments import Adapter, by_digest, listed, per_row, prompt_text, strings
from arrowmoe.base_model import BaseModel, Kind, load_base_model
from arrowmoe.batching import Batching, BatchLimits
from arrowmoe.encoding import encode_batch, token_counts
from arrowmoe.errors import EngineError, GateError, RoutingError
from arrowmoe.features import Vectors
from arrowmoe.generation import Chunk, Generation, Prompt, Sampling
from arrowmoe.lora.costs import Prices
from arrowmoe.lora.loader import Loads
from arrowmoe.lora.memory import device_memory
from arrowmoe.lora.slots import LoadedLoRA
from arrowmoe.lora.tiers import Memory, Residence
from arrowmoe.memory_monitor import MemoryGuard
from arrowmoe.quantised_bases import Quantise
from arrowmoe.routing.gates import Gates
from arrowmoe.routing.seams import Observer, TextRouter
from arrowmoe.routing.statistics import CardStatistics
from arrowmoe.row_gates import check_tokens
from arrowmoe.swarm import Swarm
from federation.errors import FederationError
from federation.sync import SyncProgress, SyncReport
from registry.card import LoRACard
from registry.errors import RegistryError
from registry.store import Registry

if TYPE_CHECKING:
    from arrowmoe.evolving import Evolution
    from arrowmoe.settings import EvolutionSettings
    from evolution.executors import Executor
    from evolution.protocols import Teacher
    from evolution.skill_distiller import Recipe
    from evolution.survey import Surveying

BATCH_ROWS = 32
HOST_BYTES = 4 << 30


class ArrowEngine:
    """A base model with adapters. Calls may come from several threads; forward passes run one at a time."""

    def __init__(
        self,
        base: BaseModel,
        *,
        registry: Registry | None = None,
        router: TextRouter | None = None,
        budget_bytes: int | None = None,
        host_bytes: int = HOST_BYTES,
        prices: Prices | None = None,
        limits: BatchLimits | None = None,
        guard: MemoryGuard | None = None,
    ) -> None:
        """Adapters take at most `budget_bytes` of the device (None: no bound); the least used make room for others.

        Beside a CUDA device, `host_bytes` of pinned memory keep those that left it. `prices` are what was measured here
        (`arrowmoe bench tune`). `limits` bound the running batch and who waits to join it. `guard` keeps memory free
        when adapters are loaded; without one there is no floor.
        """
        self.base = base
        self.router = router
        self.observer: Observer | None = None
        self._adapters = Adapters(
            base, registry=registry, budget_bytes=budget_bytes, host_bytes=host_bytes, prices=prices, guard=guard
        )
        self._swarm: Swarm | None = None
        self._batching = Batching(
            base,
            plan=self._adapters.plan,
            running=self._adapters.running,
            loader=self._adapters.loader,
            limits=limits,
        )

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        device: str = "auto",
        dtype: str = "float32",
        name: str | None = None,
        kind: Kind | None = None,
        quantise: Quantise | None = None,
        registry: Registry | None = None,
    ) -> ArrowEngine:
        """Load a base model: a hub id, a directory, a `.gguf` file, `builtin:smollm2` or `builtin:minilm`.

        `name` overrides the logical name that cards are compared with; `quantise` as `load_base_model` takes it.
        Raises `ModelLoadError`.
        """
        base = load_base_model(model, device=device, dtype=dtype, name=name, kind=kind, quantise=quantise)
        return cls(base, registry=registry)

    @property
    def name(self) -> str:
        """The base model's logical name."""
        return self.base.name

    @property
    def registry(self) -> Registry | None:
        """Where adapters are found that nobody loaded."""
        return self._adapters.registry

    @registry.setter
    def registry(self, registry: Registry | None) -> None:
        self._adapters.registry = registry

    def load_lora(self, source: str | Path | LoRACard) -> str:
        """Load a card, a `.lora.arrow` file, or a card of the registry by name or digest; returns the card's name.

        The name then means this card. Raises `UnknownAdapterError`, `AdapterMismatchError`, `UnsupportedCardError`,
        or the registry's and the format's own errors.
        """
        return self._adapters.load(source)

    def hold(self, card: LoRACard) -> LoadedLoRA:
        """Load a card that is asked for by its digest; what its name means stays as it is. Raises as `load_lora`."""
        return self._adapters.hold(card)

    def remove_lora(self, name: str) -> bool:
        """Take an adapter out, by name or digest; whether it was there. Without adapters the base is bit-identical."""
        return self._adapters.remove(name)

    def list_loras(self) -> list[LoadedLoRA]:
        """The loaded adapters, in loading order, wherever they are now (`residences`)."""
        return self._adapters.loaded()

    def keep_lora(self, name: str, *, pinned: bool | None = None, priority: int | None = None) -> None:
        """Pin an adapter, by name or digest, to the device, or have those of lower `priority` (0) leave before it.

        Raises as `generate` does for an adapter.
        """
        self._adapters.keep(name, pinned=pinned, priority=priority)

    def residences(self) -> list[Residence]:
        """Where each adapter is, what it takes, and what uses it."""
        return self._adapters.residences()

    def memory(self) -> Memory:
        """What adapters take of the device and the host."""
        return self._adapters.memory()

    def device_memory(self) -> tuple[int, int] | None:
        """(free, total) bytes of a CUDA device; None where the model has no device of its own."""
        return device_memory(self.base.device)

    def loads(self) -> Loads:
        """Adapters that were loaded while others computed, and those that were waited for."""
        return self._adapters.loader.loads()

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Texts → (n, d) float32, by the bare base model."""
        return self.encode_with_lora(texts, adapter=None)

    def encode_with_lora(self, texts: Sequence[str], adapter: Adapter = "auto") -> Vectors:
        """Texts → (n, d) float32. `adapter` is as for `generate`."""
        texts = strings("texts", texts)
        gates = self.resolve(adapter, texts)
        tokens = [0] * len(texts) if gates.tokens is None else token_counts(self.base, texts)
        check_tokens(gates, tokens)
        vectors = np.zeros((len(texts), self.base.d_model), dtype=np.float32)
        by_length = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        for start in range(0, len(texts), BATCH_ROWS):
            rows = by_length[start : start + BATCH_ROWS]
            with self.computing(gates.rows(rows).columns(0, max(tokens[row] for row in rows))):
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
        timeout_s: float | None = ...,
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
        timeout_s: float | None = ...,
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
        timeout_s: float | None = None,
        stream: bool = False,
    ) -> list[Generation] | Iterator[Chunk]:
        """Answer `prompts`, whose rows may use different adapters; calls of several threads are computed together.

        A prompt is a string, completed as it is, or a list of `{"role", "content"}` messages. `adapter` is None (the
        bare base), a name, a mixture {name: weight}, a list with one of these per row, "auto" (routed) or `Gates`.
        With `stream`, chunks come as they are made; between two of them the engine is free for other calls. Raises
        `BusyError` where too many rows wait, and `DeadlineError` after `timeout_s`.
        """
        if self.base.kind != "causal":
            raise EngineError(
                f"{self.base.name} is an encoder, so it cannot generate",
                hint="ask a causal model; an encoder turns texts into vectors: encode()",
            )
        prompts = listed("prompts", prompts)
        sampling = Sampling(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            stop=tuple(strings("stop strings", stop)),
            seed=seed,
        )
        if not prompts:
            return iter(()) if stream else []
        gates = self.resolve(adapter, [prompt_text(prompt) for prompt in prompts])
        chunks = self._chunks(prompts, gates, sampling, timeout_s)
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
        """What `adapter` means for rows with these `texts`: gates over known adapters, loaded here if they are new."""
        if isinstance(adapter, Gates):
            gates = adapter
        elif isinstance(adapter, str) and adapter == "auto":
            gates = self._route(texts)
        else:
            rows = per_row(adapter, len(texts))
            digests = {
                name: self._adapters.digest(name) for name in dict.fromkeys(name for row in rows for name in row)
            }
            names = {digest: name for name, digest in digests.items()}  # where it was removed since
            names |= {loaded.digest: loaded.name for loaded in self._adapters.loaded()}
            gates = Gates.of([by_digest(row, digests) for row in rows], names)
        if len(gates) != len(texts):
            raise GateError(f"expected gates for {len(texts)} rows, got {len(gates)}")
        for digest in gates.adapters:
            self._adapters.digest(digest)
        return gates

    def computing(self, gates: Gates) -> AbstractContextManager[None]:
        """Be the only caller that runs forward passes, with `gates`: a row of them per row of the batch."""
        return self._adapters.computing(gates)

    def _chunks(
        self, prompts: Sequence[Prompt], gates: Gates, sampling: Sampling, timeout_s: float | None
    ) -> Iterator[Chunk]:
        weights = [gates.weights_of(row) for row in range(len(gates))]
        finer = gates if gates.layers or gates.tokens is not None else None
        for chunk in self._batching.generate(prompts, weights, sampling, finer=finer, timeout_s=timeout_s):
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

    def _route(self, texts: Sequence[str]) -> Gates:
        if self.router is None:
            raise RoutingError(
                "adapter='auto' needs a router, and this engine has none",
                hint="set engine.router, or name an adapter",
            )
        return self.router.route_texts(texts, base=self.base.name)
