"""Care for the cards that are here: each is read again from time to time, and a damaged one is fetched anew.

Disks rot in silence, and a card that nobody loads would be found damaged only on the day it is needed.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self, TypeAlias

from federation import limits
from federation.errors import FederationError
from federation.peer import Peer
from federation.sync import connect
from registry.card import LoRACard
from registry.digest import Digest, is_digest
from registry.entries import VerifyReport
from registry.errors import ArrowMoEError, UnknownCardError
from registry.files import written_whole
from registry.logs import get_logger
from registry.store import Registry

_log = get_logger(__name__)
_POSITION = "scrub.json"
_SHORTEST_WAIT_S = 0.01
_UNNOTED_BYTES = 64 << 20
"""What is read again at the most after a kill."""


class Giver(Protocol):
    """What healing needs of a peer."""

    def fetch_skill(self, digest: Digest) -> LoRACard:
        """A card, verified. Raises `FederationError`."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


Fetch: TypeAlias = Callable[[Digest], LoRACard]
"""A verified card from whoever has it. Raises `ArrowMoEError` if nobody gives it."""


@dataclass(frozen=True, kw_only=True)
class Healing:
    """What became of a card that was lost or damaged, for `reason`; `error` says why it still is."""

    digest: Digest
    reason: str | None
    error: str | None = None

    @property
    def ok(self) -> bool:
        """Whether the card is whole again."""
        return self.error is None


def from_peers(peers: Callable[[], Iterable[Peer]], connect: Callable[[Peer, float], Giver] = connect) -> Fetch:
    """Fetches a card from the first of `peers`, as they are then, that gives it."""

    def fetch(digest: Digest) -> LoRACard:
        failures = []
        for peer in peers():
            try:
                with connect(peer, limits.CALL_TIMEOUT_S) as client:
                    return client.fetch_skill(digest)
            except FederationError as error:
                failures.append(f"{peer}: {error}")
        raise FederationError(
            f"no peer gives card {digest}: {'; '.join(failures) or 'none is known'}",
            hint="name a peer that has it with --peer HOST:PORT, or import the card again",
        )

    return fetch


def heal(registry: Registry, reports: Iterable[VerifyReport], fetch: Fetch) -> list[Healing]:
    """Fetch the cards anew that `reports` call damaged; a file without a row is nobody's card and stays as it is."""
    return [_healed(registry, report, fetch) for report in reports if not report.ok and report.entry is not None]


def mend(registry: Registry, ref: str, fetch: Fetch) -> Healing:
    """Fetch the card behind `ref` anew if it is lost or damaged. Raises `UnknownCardError`, `AmbiguousCardError`."""
    entry = registry.entry(ref, quarantined=True)
    return next(iter(heal(registry, registry.verify(entry.digest), fetch)), Healing(digest=entry.digest, reason=None))


def _healed(registry: Registry, report: VerifyReport, fetch: Fetch) -> Healing:
    digest, reason = report.digest, report.reason
    try:
        registry.restore(fetch(digest))
        left = [str(again.reason) for again in registry.verify(digest) if not again.ok]
    except (ArrowMoEError, OSError) as error:
        left = [str(error)]
    if left:
        _log.error("card_not_healed", digest=digest, reason=reason, error=left[0])
        return Healing(digest=digest, reason=reason, error=left[0])
    _log.warning("card_healed", digest=digest, reason=reason)
    return Healing(digest=digest, reason=reason)


class Scrub:
    """Passes over all cards, one after another, at `bytes_per_s` on the average, and heals what it finds damaged.

    After a restart it carries on where it was.
    """

    def __init__(self, registry: Registry, *, bytes_per_s: float, fetch: Fetch) -> None:
        self._registry, self._bytes_per_s, self._fetch = registry, bytes_per_s, fetch
        self._path = registry.home / _POSITION

    def run(self, stop: threading.Event, *, idle_s: float = 6 * 3600.0) -> None:
        """Until `stop` is set; `idle_s` lies between two passes."""
        while not stop.is_set():
            try:
                self._pass(stop)
            except (ArrowMoEError, OSError) as error:  # the disk is full, or the database is away
                _log.error("scrub_failed", error=str(error))
            stop.wait(idle_s)

    def _pass(self, stop: threading.Event) -> None:
        with closing(self.rest_of_pass()) as reports:
            for report in reports:
                nbytes = 0 if report.entry is None else report.entry.nbytes
                if stop.wait(max(_SHORTEST_WAIT_S, nbytes / self._bytes_per_s)):
                    return

    def rest_of_pass(self) -> Generator[VerifyReport]:
        """Check the cards that this pass has not seen yet, each when it is asked for; then the next pass begins."""
        done, unnoted = _position(self._path), 0
        try:
            for digest in sorted(self._registry.digests(quarantined=True)):
                if digest <= done:
                    continue
                report, done = self._checked(digest), digest
                if report is None:
                    continue
                unnoted += 0 if report.entry is None else report.entry.nbytes
                if unnoted >= _UNNOTED_BYTES:
                    self._note(done)
                    unnoted = 0
                yield report
            done = ""
        finally:
            self._note(done)

    def _checked(self, digest: Digest) -> VerifyReport | None:
        """What is wrong with the card, healed if possible; None if it was removed meanwhile."""
        try:
            reports = self._registry.verify(digest)
        except UnknownCardError:
            return None
        for report in reports:
            if not report.ok:
                _log.error("card_damaged", digest=digest, reason=report.reason)
                heal(self._registry, [report], self._fetch)
        return reports[0] if reports else None

    def _note(self, done: str) -> None:
        with written_whole(self._path) as file:
            file.write(json.dumps({"done": done}).encode())


def _position(path: Path) -> str:
    """The last card that was checked in this pass; empty at its start, and where the file says nothing of use."""
    try:
        done = json.loads(path.read_bytes())["done"]
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, KeyError, TypeError) as error:
        _log.warning("scrub_position_lost", error=str(error))
        return ""
    return done if isinstance(done, str) and is_digest(done) else ""


__all__ = ["Fetch", "Healing", "Scrub", "from_peers", "heal"]
