"""Base models, and one router over the cards that are here and those that peers offer: what answers a request.

A node loads its models in the background, a command in the foreground; both ask here. Nothing heavy is imported until
a model is loaded: torch is reached through the lazy names of `arrowmoe`.
"""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import arrowmoe
from arrowmoe.base_names import logical_name
from arrowmoe.errors import EngineError
from arrowmoe.memory_monitor import MemoryGuard, read_memory
from arrowmoe.settings import Settings
from arrowmoe.swarm import Offer
from registry.card import LoRACard
from registry.digest import Digest
from registry.entries import CardEntry
from registry.errors import ArrowMoEError
from registry.logs import get_logger
from registry.manifest import ROUTES, RoutingSpec
from registry.store import Registry
from registry.tensor import Tensor

if TYPE_CHECKING:
    from arrowmoe.arguments import Adapter
    from arrowmoe.base_model import Kind
    from arrowmoe.engine import ArrowEngine
    from arrowmoe.features import Featurizer, Vectors
    from arrowmoe.generation import Generation
    from arrowmoe.request import Answer
    from arrowmoe.routing import Gates, LoRARouter, Opinion, Policy
    from arrowmoe.routing.by_weights import ByWeights
    from arrowmoe.routing.seams import Observer
    from arrowmoe.routing.statistics import CardStatistics

log = get_logger(__name__)
OPINIONS = "opinions.jsonl"
"""What agents said of prompts, in a home: a routing dataset that grows."""


Offers = Mapping[Digest, Offer]
Fetch = Callable[[str], LoRACard]
OfferedStatistics = Callable[[Digest], "tuple[RoutingSpec, Sequence[Tensor]] | None"]


class Inference:
    """Answers with `bases`; the router works in the space of the settings' embedder. Calls may come from any thread."""

    def __init__(
        self,
        registry: Registry,
        settings: Settings,
        *,
        bases: Sequence[str],
        route: bool = True,
        fetch: Fetch | None = None,
        offered_statistics: OfferedStatistics | None = None,
        observer: Observer | None = None,
    ) -> None:
        self._registry, self._settings, self._fetch, self._observer = registry, settings, fetch, observer
        self._offered_statistics = offered_statistics
        self.bases = tuple(dict.fromkeys(bases))
        models = [*self.bases, settings.embedder] if route else self.bases
        self._engines: dict[str, Future[ArrowEngine]] = {model: Future() for model in dict.fromkeys(models)}
        self._router: Future[LoRARouter] = Future()
        self._routes = route
        if not route:
            self._router.set_exception(EngineError("no router is loaded", hint="load a base model with --base MODEL"))
        self._lock = threading.Lock()
        self._weighers: dict[ArrowEngine, ByWeights] = {}
        self._indexed: tuple[set[Digest], set[Digest]] | None = None
        self.offers: Offers = {}

    def load(self, on_model: Callable[[str], None] | None = None) -> None:
        """Load every model, the embedder last; an error is kept, and raised to whoever asks for that model."""
        for model, future in self._engines.items():
            if on_model is not None:
                on_model(model)
            future.set_running_or_notify_cancel()
            try:
                future.set_result(self._load_engine(model))
            except ArrowMoEError as error:
                future.set_exception(error)
            except Exception as error:
                log.exception("base_model_failed", model=model)
                future.set_exception(error)
        if self._routes:
            self._make_router()

    def engine(self, base: str | None = None, *, kind: Kind = "causal") -> ArrowEngine:
        """The engine of `base` (as it was asked for, or its logical name), else the first of `kind`; waits for it."""
        names, errors = [], []
        for model, future in self._engines.items():
            if base in self._engines and base != model:
                continue
            if (error := future.exception()) is not None:
                errors.append(error)
                continue
            engine = future.result()
            if base in (model, engine.name) or (base is None and engine.base.kind == kind):
                return engine
            names.append(engine.name)
        if errors:
            raise errors[0]
        wanted = f"base model {base}" if base else f"base model of kind {kind!r}"
        raise EngineError(
            f"no {wanted} is loaded; loaded are: {', '.join(names) or 'none'}",
            hint="load one with --base MODEL, for example --base builtin:smollm2",
        )

    def ask(
        self,
        prompt: str,
        *,
        base: str | None = None,
        adapter: Adapter = "auto",
        opinion: Opinion | None = None,
        policy: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> Answer:
        """Answer `prompt`; see `arrowmoe.ask`. `policy` changes settings of the router for this prompt."""
        engine = self.engine(base)
        router = self._current_router() if adapter == "auto" else None
        self._forget_removed(engine)
        answer = arrowmoe.ask(
            prompt,
            engine=engine,
            router=router,
            adapter=adapter,
            fetch=self._fetch,
            policy=self._policy(policy),
            opinion=opinion,
            **sampling,
        )
        self._keep(prompt, opinion)
        return answer

    def generate(
        self, prompts: Sequence[str], *, base: str | None = None, adapter: Adapter = None, **sampling: Any
    ) -> list[Generation]:
        """Answer `prompts` as one batch: `adapter` may be one for all, "auto", or a list with one per row."""
        engine = self.engine(base)
        self._forget_removed(engine)
        if adapter == "auto":
            adapter = self._routed(engine, prompts)
        chat = engine.base.tokenizer.chat_template is not None
        messages = [[{"role": "user", "content": prompt}] if chat else prompt for prompt in prompts]
        made: list[Generation] = engine.generate(messages, adapter=adapter, **sampling)
        return made

    def route(
        self,
        text: str,
        *,
        base: str | None = None,
        opinion: Opinion | None = None,
        policy: Mapping[str, Any] | None = None,
    ) -> Gates:
        """Gates for `text`, over the cards made for base model `base` (None: any)."""
        router = self._current_router()
        gates = router.route(
            router.features([text]),
            mask=None if base is None else router.for_base(logical_name(base)),
            policy=self._policy(policy),
            opinions=() if opinion is None else (opinion,),
        )
        self._keep(text, opinion)
        return gates

    def encode(self, texts: Sequence[str], *, base: str | None = None, adapter: Adapter = None) -> Vectors:
        """Texts → (n, d) float32. A routed `adapter` chooses among the cards made for this encoder."""
        engine = self.engine(base, kind="encoder")
        self._forget_removed(engine)
        if adapter == "auto":
            adapter = self._routed(engine, texts)
        return engine.encode_with_lora(texts, adapter=adapter)

    def cut(self, texts: Sequence[str], *, base: str | None = None, **_: Any) -> list[bool]:
        """Whether each of `texts` is too long for the encoder, which then reads only its beginning."""
        found: list[bool] = arrowmoe.encoding.cut(self.engine(base, kind="encoder").base, texts)
        return found

    @property
    def featurizer(self) -> Featurizer:
        """What the router sees prompts with; waits for the embedder."""
        return self._router.result().featurizer

    def policy(self) -> Policy:
        """How the settings want prompts routed."""
        return arrowmoe.Policy(**self._settings.router.model_dump())

    def model_of(self, base: str) -> str:
        """What `base`, a logical name, was asked for as. Raises `EngineError` if it is not loaded."""
        engine = self.engine(base)
        return next(model for model, future in self._engines.items() if _is_ready(future) and future.result() is engine)

    def index_into(self, router: LoRARouter) -> None:
        """Have another router choose among the cards that are here and offered now."""
        with self._lock:
            self._index(router, self._registry.digests(), dict(self.offers))

    def refresh(self) -> None:
        """Bring the router's index in line with the catalog and with `offers`, if there is a router yet."""
        if self._router.done() and self._router.exception() is None:
            self._current_router()

    def models(self) -> list[dict[str, Any]]:
        """Each model, its state (waiting, loading, ready, error), and the adapters it holds."""
        return [self._model_state(model, future) for model, future in self._engines.items()]

    def adapters(self) -> list[dict[str, Any]]:
        """Of each model that is ready: what its adapters take, and where each of them is."""
        engines = [future.result() for future in self._engines.values() if _is_ready(future)]
        now = read_memory()
        return [
            arrowmoe.views.adapters(
                engine.name, engine.memory(), engine.residences(), engine.loads(), now, engine.device_memory()
            )
            for engine in engines
        ]

    def _policy(self, changes: Mapping[str, Any] | None) -> Policy | None:
        """The settings' policy with `changes`; None for the router's own."""
        return dataclasses.replace(self.policy(), **changes) if changes else None

    def _keep(self, text: str, opinion: Opinion | None) -> None:
        """Keep what an agent said as a row of a routing dataset, in this home."""
        if opinion is not None:
            row = {"text": text, "card": opinion.card, "confidence": opinion.confidence, "use": opinion.use}
            with self._lock, (self._registry.home / OPINIONS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def _routed(self, engine: ArrowEngine, texts: Sequence[str]) -> Gates:
        """Gates for `texts` on `engine`, with every card that they name at hand."""
        router = self._current_router()
        gates = router.route_texts(texts, base=engine.name)
        for digest in gates.adapters:
            if self._fetch is not None and router.is_virtual(digest):
                engine.hold(self._fetch(digest))
        return gates

    def _model_state(self, model: str, future: Future[ArrowEngine]) -> dict[str, Any]:
        done = future.done()  # asked once: it may change at any moment
        error = future.exception() if done else None
        engine = future.result() if done and error is None else None
        waiting = "loading" if future.running() else "waiting"
        return {
            "model": model,
            "role": "base" if model in self.bases else "embedder",
            "state": "error" if error else "ready" if engine else waiting,
            "error": str(error) if error else None,
            "name": engine.name if engine else None,
            "kind": engine.base.kind if engine else None,
            "adapters": [loaded.name for loaded in engine.list_loras()] if engine else [],
        }

    def _load_engine(self, model: str) -> ArrowEngine:
        settings = self._settings
        base = arrowmoe.load_base_model(
            model,
            device=settings.device,
            dtype=settings.dtype,
            cache=settings.cache_dir,
            # Cards' statistics are in the space of the whole embedder.
            quantise=None if model == settings.embedder else settings.engine.quantised,
        )
        engine = arrowmoe.ArrowEngine(
            base,
            registry=self._registry,
            budget_bytes=None if settings.engine.budget_mib is None else int(settings.engine.budget_mib * 2**20),
            host_bytes=int(settings.engine.host_mib * 2**20),
            prices=arrowmoe.bench_commands.prices(settings, base),
            limits=arrowmoe.BatchLimits(rows=settings.engine.rows, waiting=settings.engine.waiting),
            guard=MemoryGuard(int(settings.engine.floor_mib * 2**20)),
        )
        engine.observer = self._observer
        return engine

    def _make_router(self) -> None:
        embedder = self._engines[self._settings.embedder]
        if (error := embedder.exception()) is not None:
            self._router.set_exception(error)
            return
        try:
            featurizer = arrowmoe.TextFeaturizer(embedder.result())
            router = arrowmoe.LoRARouter(featurizer, policy=self.policy(), cache=self._settings.cache_dir)
        except Exception as error:  # else whoever asks would wait for ever
            log.exception("router_failed")
            self._router.set_exception(error)
            return
        self._router.set_result(router)
        self.refresh()

    def _current_router(self) -> LoRARouter:
        """The router, its index up to date."""
        router = self._router.result()
        with self._lock:
            here, offers = self._registry.digests(), dict(self.offers)
            if self._indexed != (here, set(offers)):
                self._index(router, here, offers)
                self._indexed = (here, set(offers))
        return router

    def _index(self, router: LoRARouter, here: set[Digest], offers: Offers) -> None:
        wanted = {entry.digest: entry for entry in self._registry.newest()}  # older versions are used by name only
        for digest in router.digests() - wanted.keys() - offers.keys():
            router.unregister(digest)
        for digest, entry in wanted.items():
            if digest not in router or router.is_virtual(digest):
                card = self._card(digest)
                if card is None or ROUTES not in card.manifest.training:  # a router is no expert
                    router.register_card(entry, None if card is None else self._statistics(card))
        for digest, offer in offers.items():
            if digest not in here and digest not in router:
                router.register_virtual_candidate(offer.entry, offer.source, self._statistics_of_offer(offer))
        self._judge_by_weights(router, wanted)
        log.info("router_indexed", cards=len(here), virtual=len(offers.keys() - here))

    def _judge_by_weights(self, router: LoRARouter, here: Mapping[Digest, CardEntry]) -> None:
        """Have the cards of which only the name is known judged by what they do to a prompt, on the engine they fit."""
        profiles = router.profiles()
        silent = [entry for digest, entry in here.items() if digest in profiles and profiles[digest].evidence == "name"]
        for engine in [future.result() for future in self._engines.values() if _is_ready(future)]:
            fitting = [entry for entry in silent if entry.digest in router.for_base(engine.name)]
            if fitting and engine not in self._weighers:
                self._weighers[engine] = arrowmoe.ByWeights(engine)
            if engine in self._weighers:
                self._weighers[engine].keep([card for entry in fitting if (card := self._card(entry.digest))])
        router.by_weights = tuple(self._weighers.values())

    def _statistics(self, card: LoRACard) -> CardStatistics | None:
        """The statistics inside a card; None if it has none, or none that can be used, which is logged."""
        try:
            return arrowmoe.CardStatistics.of_card(card)
        except ArrowMoEError as error:
            log.warning("statistics_unusable", card=card.name, error=str(error))
            return None

    def _card(self, digest: Digest) -> LoRACard | None:
        """A card of the registry; None if it is damaged or gone, which is logged."""
        try:
            return self._registry.get(digest)
        except ArrowMoEError as error:
            log.warning("card_unreadable", digest=digest, error=str(error))
            return None

    def _statistics_of_offer(self, offer: Offer) -> CardStatistics | None:
        """The statistics of a peer's card, fetched without its weights."""
        if self._offered_statistics is None or not offer.entry.has_statistics:
            return None
        found = self._offered_statistics(offer.entry.digest)
        try:
            return None if found is None else arrowmoe.CardStatistics.of(found[0], {one.name: one for one in found[1]})
        except ArrowMoEError as error:
            log.warning("statistics_unusable", digest=offer.entry.digest, peer=offer.source, error=str(error))
            return None

    def _forget_removed(self, engine: ArrowEngine) -> None:
        """Unload adapters whose card was removed from the registry."""
        held = engine.list_loras()  # before the catalog is read: what is fetched and loaded meanwhile is in neither
        here = self._registry.digests()
        for loaded in held:
            if loaded.digest not in here:
                engine.remove_lora(loaded.digest)


def _is_ready(future: Future[ArrowEngine]) -> bool:
    return future.done() and future.exception() is None


__all__ = ["Inference", "Offers"]
