"""The node: the composition root, where registry, federation and engines meet, and whose lifetimes one stack owns.

Without base models a node only serves and syncs, and never imports torch. With some, it loads them in the background
and answers as well. One thread watches the peers: what they offer and is not here becomes a virtual candidate.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Self, TypeVar

import arrowmoe
from arrowmoe.control import ControlServer
from arrowmoe.following import Follower, pace_of, wanted_of
from arrowmoe.home import NodeError, NodeRecord, home_lock, make_home, now
from arrowmoe.inference import Inference
from arrowmoe.operations import node_handlers
from arrowmoe.settings import Settings
from arrowmoe.signalling import SignalRecorder, signal_store
from arrowmoe.swarm import Swarm
from arrowmoe.trust import policy_of
from evolution.journal import SCHEDULE, Journal
from federation import care
from federation.care import Healing
from federation.diff import SyncFilter
from federation.peer import Peer, is_loopback
from federation.sync import PeerReport, SyncProgress, SyncReport
from registry.card import LoRACard
from registry.digest import Digest
from registry.errors import ArrowMoEError
from registry.logs import get_logger
from registry.store import Registry

if TYPE_CHECKING:
    from arrowmoe.arguments import Adapter
    from arrowmoe.evolving import Evolution
    from arrowmoe.features import Vectors
    from arrowmoe.request import Answer
    from arrowmoe.routing import Gates

END_TIMEOUT_S = 10.0
JITTER = 0.2
"""Share by which the pauses between looks differ, so that nodes that start together do not ask together."""
log = get_logger(__name__)
_Part = TypeVar("_Part")


class Node:
    """A node of the swarm, between `start` and `close`. Raises `HomeHeldError` if another one has the home."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._stack = ExitStack()
        self._stopping = threading.Event()
        self._record: NodeRecord | None = None
        self._registry: Registry | None = None
        self._inference: Inference | None = None
        self._swarm: Swarm | None = None
        self._evolution: Evolution | None = None
        self._follower = Follower(self.sync, wanted_of(settings.sync))
        self._lock = threading.RLock()
        self._started_s = 0.0

    def start(self) -> NodeRecord:
        """Hold the home, serve its cards, answer commands; models and peers follow in the background."""
        make_home(self.settings.home)
        with ExitStack() as stack:
            stack.enter_context(home_lock(self.settings.home))
            self._record = self._open(stack)
            self._started_s = time.monotonic()
            self._record.write(self.settings.home)
            self._stack = stack.pop_all()
        log.info("node_started", name=self.record.name, node_id=self.record.node_id, address=self.record.address)
        return self._record

    def close(self) -> None:
        """Say goodbye, close every server, and let go of the home."""
        self.stop()
        self._stack.close()
        log.info("node_ended", name=self.settings.name)

    def stop(self) -> None:
        """Ask the node to end; `wait` returns."""
        self._stopping.set()

    def wait(self) -> None:
        """Until `stop` is called."""
        self._stopping.wait()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def record(self) -> NodeRecord:
        """Who and where this node is."""
        return _started(self._record)

    @property
    def registry(self) -> Registry:
        """The cards of the home."""
        return _started(self._registry)

    @property
    def swarm(self) -> Swarm:
        """Its peers."""
        return _started(self._swarm)

    @property
    def inference(self) -> Inference:
        """What answers requests."""
        return _started(self._inference)

    def status(self) -> dict[str, Any]:
        """What the node is doing, as JSON."""
        record, here = self.record, self.registry.digests()
        return {
            "running": True,
            "name": record.name,
            "node_id": record.node_id,
            "address": record.address,
            "home": str(self.settings.home),
            "pid": record.pid,
            "started": record.started,
            "uptime_s": round(time.monotonic() - self._started_s, 1),
            "cards": len(here),
            "offers": len(self.inference.offers.keys() - here),
            "discovery": self.swarm.discovery_state,
            "models": self.inference.models(),
        }

    def peers(self) -> tuple[PeerReport, ...]:
        """Every known peer, asked just now what it offers; one that does not answer has an `error`."""
        return self._look(everyone=True).peers

    def sync(
        self,
        peers: Sequence[str | Peer] | None = None,
        *,
        wanted: SyncFilter = SyncFilter(),  # noqa: B008  # a frozen value
        dry_run: bool = False,
        on_progress: Callable[[SyncProgress], None] | None = None,
        cancelled: threading.Event | None = None,
    ) -> SyncReport:
        """Copy what of the `wanted` cards `peers` (or addresses; None: all known) offer and is not here."""
        report = self.swarm.sync(
            peers, wanted=wanted, dry_run=dry_run, on_progress=on_progress, cancelled=cancelled or self._stopping
        )
        self.inference.refresh()
        return report

    def restore(self, digest: str) -> Healing:
        """Mend a lost or damaged card with a peer's copy."""
        return care.mend(self.registry, digest, self._fetch_anew)

    def route(self, text: str, *, base: str | None = None) -> Gates:
        """Which cards fit `text`."""
        return self.inference.route(text, base=base)

    def ask(self, prompt: str, adapter: Adapter = "auto", *, base: str | None = None, **sampling: Any) -> Answer:
        """Answer `prompt`, with the card that fits it unless `adapter` says which."""
        return self.inference.ask(prompt, adapter=adapter, base=base, **sampling)

    def encode(self, texts: Sequence[str], adapter: Adapter = None, *, base: str | None = None) -> Vectors:
        """Texts → (n, d) float32."""
        return self.inference.encode(texts, adapter=adapter, base=base)

    @property
    def evolution(self) -> Evolution:
        """What grows experts here, made when it is first needed, for its imports take seconds."""
        with self._lock:
            if self._evolution is None:
                made = arrowmoe.evolution_of_node(self.registry, self.settings, self.inference, fetch=self._bring)
                self._evolution = self._stack.enter_context(made)
            return self._evolution

    def watch_nights(self) -> None:
        """Have nights begin by themselves, if there is a schedule or something to carry on; else do nothing."""
        journal = Journal(self.registry.database)
        noted = journal.note(SCHEDULE)
        expression = self.settings.evolution.schedule if noted is None else noted["expression"]
        if (expression or any(night.ended is None for night in journal.nights())) and not self._stopping.is_set():
            log.info("nights_watched", schedule=expression)
            _ = self.evolution

    def _bring(self, digest: str) -> None:
        """Fetch a peer's card into the registry."""
        self.swarm.fetch(digest)
        self.inference.refresh()

    def _open(self, stack: ExitStack) -> NodeRecord:
        settings = self.settings
        self._registry = registry = stack.enter_context(Registry.open(settings.home, **settings.stores))
        self._swarm = swarm = Swarm(
            registry,
            name=settings.name,
            host=settings.host,
            port=settings.flight_port,
            open=settings.open,
            peers=settings.peers,
            discovery=settings.discovery,
            interfaces=settings.interfaces,
            policy=policy_of(settings.trust, open=settings.open or is_loopback(settings.host)),
            pace=pace_of(settings.sync),
            push_from=settings.trust.push_from,
        )
        stack.enter_context(swarm)
        routes = bool(settings.bases)
        self._inference = Inference(
            registry,
            settings,
            bases=settings.bases,
            route=routes,
            fetch=swarm.fetch,
            offered_statistics=swarm.statistics,
            observer=SignalRecorder(signal_store(registry.database, settings.evolution)),
        )
        control = stack.enter_context(ControlServer(node_handlers(self)))
        if routes:
            stack.enter_context(_background("load", self._load))
        if settings.sync.auto:
            stack.enter_context(_background("follow", self._follower.run))
            stack.callback(self._follower.end)
        stack.enter_context(_background("watch", self._watch))
        if settings.scrub_mib_per_s:
            stack.enter_context(_background("scrub", self._scrub))
        stack.callback(self.stop)
        return NodeRecord(
            pid=os.getpid(),
            port=control.port,
            token=control.token,
            address=swarm.address,
            node_id=registry.identity.id,
            name=settings.name,
            started=now(),
        )

    def _load(self) -> None:
        self.inference.load()
        for model in self.inference.models():
            event = log.error if model["error"] else log.info
            event("model_state", model=model["model"], state=model["state"], error=model["error"])
        self.watch_nights()

    def _watch(self) -> None:
        """Announce the node, look at the peers at once and then about at the interval, until the node ends."""
        self.swarm.announce()
        work = self._sync_first if self.settings.sync_on_start else self._look_around
        while not self._stopping.is_set():
            try:
                work()
            except ArrowMoEError as error:  # a locked catalog, a damaged file: the next round may do better
                log.warning("peers_not_watched", error=str(error), kind=type(error).__name__)
            except Exception:  # a bug in one round must not end the watching
                log.exception("peers_not_watched")
            work = self._look_around
            self._stopping.wait(self.settings.peer_interval_s * random.uniform(1 - JITTER, 1 + JITTER))

    def _scrub(self) -> None:
        """Read every card again and again, slowly, and mend what is damaged."""
        pace = self.settings.scrub_mib_per_s * (1 << 20)
        care.Scrub(self.registry, bytes_per_s=pace, fetch=self._fetch_anew).run(self._stopping)

    def _fetch_anew(self, digest: Digest) -> LoRACard:
        swarm = self.swarm
        return care.from_peers(lambda: swarm.company().asked, swarm.circle.connect)(digest)

    def _sync_first(self) -> None:
        self.sync(wanted=wanted_of(self.settings.sync))

    def _look_around(self) -> None:
        report = self._look(everyone=False)
        if self.settings.sync.auto:
            self._follower.heard(report)

    def _look(self, *, everyone: bool) -> SyncReport:
        """Ask known peers what they offer; what is not here becomes a virtual candidate."""
        report = self.swarm.look(everyone=everyone)
        self.inference.offers = self.swarm.offers if self.settings.route_to_offers else {}
        self.inference.refresh()
        return report


def serve(settings: Settings, on_ready: Callable[[Node], None]) -> None:
    """Run a node until SIGTERM, SIGINT or `node stop`; to be called from the main thread."""
    node = Node(settings)
    before = {number: signal.signal(number, lambda *_: node.stop()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with node:
            on_ready(node)
            node.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _started(part: _Part | None) -> _Part:
    if part is None:
        raise NodeError("the node is not started", hint="call start(), or use it as a context manager")
    return part


@contextmanager
def _background(name: str, work: Callable[[], None]) -> Iterator[None]:
    """A thread that is waited for at the end; the signal to end must have been given by then."""
    thread = threading.Thread(target=work, name=f"arrowmoe-{name}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join(END_TIMEOUT_S)
        if thread.is_alive():
            log.warning("thread_abandoned", thread=thread.name)


__all__ = ["Node", "serve"]
