"""Adapters that waiting requests will use, made ready in host memory while a batch is computed.

One thread, which lives as long as there is something to load: there is nothing to start with an engine, and nothing to
stop. What cannot be loaded here is left to the batch that needs it: its own attempt says why, to its own requests.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from arrowmoe.lora.manager import LoRAManager
from arrowmoe.lora.slots import PreparedLoRA
from registry.errors import ArrowMoEError
from registry.logs import get_logger

log = get_logger(__name__)

ROOM_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class Loads:
    """Adapters that were loaded `ahead` of need, beside the computing, and those that a batch had to wait for."""

    ahead: int
    stalls: int
    stalled_s: float


class Loader:
    """Loads what is asked for into at most some `room_bytes` of host memory. Calls may come from any thread."""

    def __init__(
        self,
        manager: LoRAManager,
        *,
        room_bytes: int = ROOM_BYTES,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._manager = manager
        self._room = room_bytes
        self._now = now
        self._changed = threading.Condition()
        self._wanted: tuple[str, ...] = ()
        self._ready: dict[str, PreparedLoRA] = {}
        self._failed: set[str] = set()
        self._loading: str | None = None
        self._is_working = False
        self._ahead = self._stalls = 0
        self._stalled_s = 0.0

    def ask(self, wanted: Iterable[str]) -> None:
        """Load what of `wanted` is not on the device, first things first; whatever else was asked for is forgotten."""
        missing = tuple(self._manager.missing(dict.fromkeys(wanted)))
        with self._changed:
            self._wanted = missing
            self._ready = {digest: one for digest, one in self._ready.items() if digest in missing}
            self._failed.intersection_update(missing)
            if not self._is_working and self._next() is not None:
                threading.Thread(target=self._work, name="arrowmoe-loader").start()
                self._is_working = True

    def is_loading(self, adapters: Collection[str]) -> bool:
        """Whether one of `adapters`, which were asked for, is still to come."""
        with self._changed:
            coming = set(self._wanted) - self._ready.keys() - self._failed
        return any(digest in coming for digest in adapters)

    def bring(self, adapters: Collection[str]) -> list[PreparedLoRA]:
        """Those of `adapters` that are not on the device; what was not loaded ahead is loaded now.

        Raises as `LoRAManager.prepare_again`.
        """
        missing = self._manager.missing(adapters)
        started_s = self._now()
        with self._changed:
            late = [digest for digest in missing if digest not in self._ready]
            self._wanted = tuple(one for one in self._wanted if one not in late or one == self._loading)
            self._changed.wait_for(lambda: self._loading not in late)
            here = dict(self._ready)
        try:
            return [here.get(digest) or self._manager.prepare_again(digest) for digest in missing]
        finally:
            if late:
                with self._changed:
                    self._stalls += len(late)
                    self._stalled_s += self._now() - started_s

    def loads(self) -> Loads:
        """What was loaded so far."""
        with self._changed:
            return Loads(ahead=self._ahead, stalls=self._stalls, stalled_s=self._stalled_s)

    def _next(self) -> str | None:
        """What to load now; None if there is nothing, or no room until a batch takes what is ready."""
        if self._ready and sum(one.entry.nbytes for one in self._ready.values()) >= self._room:
            return None
        return next((one for one in self._wanted if one not in self._ready and one not in self._failed), None)

    def _work(self) -> None:
        while (digest := self._take()) is not None:
            ready = self._prepared(digest)
            with self._changed:
                self._loading = None
                if ready is None:
                    self._failed.add(digest)
                elif digest in self._wanted:
                    self._ready[digest] = ready
                    self._ahead += 1
                self._changed.notify_all()

    def _take(self) -> str | None:
        with self._changed:
            self._loading = self._next()
            self._is_working = self._loading is not None
            return self._loading

    def _prepared(self, digest: str) -> PreparedLoRA | None:
        """An adapter's slots; None if they cannot be made."""
        try:
            return self._manager.prepare_again(digest)
        except ArrowMoEError as error:
            log.info("load_ahead_failed", digest=digest, reason=str(error))
        except Exception:  # whatever a file or its store may raise: it is raised again where it is needed
            log.exception("load_ahead_failed", digest=digest)
        return None


__all__ = ["Loader", "Loads"]
