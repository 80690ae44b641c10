"""Following peers: what a look finds that is wanted and not here is fetched in the background, without being asked."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from queue import SimpleQueue
from typing import Protocol

from arrowmoe.settings import SyncSettings
from federation import limits
from federation.backoff import Backoff
from federation.diff import SyncFilter
from federation.pace import Pace
from federation.peer import Peer, parse_id
from federation.sync import SyncReport
from registry.errors import ArrowMoEError
from registry.logs import get_logger

log = get_logger(__name__)


class Fetch(Protocol):
    """Copies cards from peers."""

    def __call__(self, peers: list[Peer], *, wanted: SyncFilter, cancelled: threading.Event) -> SyncReport:
        """A sync with `peers` of the cards that are `wanted`, until `cancelled` is set."""


class Follower:
    """Fetches what the looks it hears of found missing, in `run`, until `end`.

    A card that does not come is tried again later and later; other cards do not wait for it.
    """

    def __init__(self, fetch: Fetch, wanted: SyncFilter, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._fetch, self._wanted, self._clock = fetch, wanted, clock
        self._backoff = Backoff(first_s=limits.FIRST_CARD_BACKOFF_S, most_s=limits.MAX_CARD_BACKOFF_S)
        self._news: SimpleQueue[SyncReport | None] = SimpleQueue()
        self._ended = threading.Event()

    def heard(self, look: SyncReport) -> None:
        """A look found this."""
        self._news.put(look)

    def end(self) -> None:
        """Make `run` return soon; what has come of a card by then is kept for the next time."""
        self._ended.set()
        self._news.put(None)

    def run(self) -> None:
        """Fetch, until `end`."""
        while (look := self._latest()) is not None and not self._ended.is_set():
            try:
                self.follow(look)
            except ArrowMoEError as error:  # a locked catalog, a full disk: the next look comes soon
                log.warning("peers_not_followed", error=str(error), kind=type(error).__name__)
            except Exception:  # a bug in one round must not end the following
                log.exception("peers_not_followed")

    def follow(self, look: SyncReport) -> SyncReport | None:
        """Fetch what `look` found and is due; None if there is nothing."""
        self._backoff.keep_only(frozenset(entry.digest for peer in look.peers for entry in peer.missing))
        wanted = replace(self._wanted, but=self._backoff.waiting(self._clock()))
        peers = [peer.peer for peer in look.peers if any(map(wanted.wants, peer.missing))]
        if not peers:
            return None
        report = self._fetch(peers, wanted=wanted, cancelled=self._ended)
        self._heed(report)
        return report

    def _latest(self) -> SyncReport | None:
        look = self._news.get()
        while look is not None and not self._news.empty():
            look = self._news.get()
        return look

    def _heed(self, report: SyncReport) -> None:
        """Leave what failed alone for a while."""
        came = {entry.digest for entry in report.fetched}
        reasons = {digest: reason for peer in report.peers for digest, reason in peer.failed if digest not in came}
        for digest, reason in reasons.items():
            wait_s = self._backoff.failed(digest, self._clock())
            log.warning("card_backed_off", digest=digest, wait_s=round(wait_s, 1), reason=reason)


def wanted_of(settings: SyncSettings) -> SyncFilter:
    """What a node fetches by itself, as its owner set it. Raises `FederationError` for what is no node id."""
    return SyncFilter(
        names=settings.names,
        bases=settings.bases,
        publishers=tuple(map(parse_id, settings.publishers)),
        domains=settings.domains,
        max_bytes=None if settings.max_mib is None else int(settings.max_mib * (1 << 20)),
    )


def pace_of(settings: SyncSettings) -> Pace:
    """How fast cards may come and go; what shares it shares the rate."""
    return Pace(settings.mib_per_s * (1 << 20) or None)


__all__ = ["Fetch", "Follower", "pace_of", "wanted_of"]
