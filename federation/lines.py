"""The lines of a node to its peers that stay open between calls: a new one takes two TLS handshakes."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from federation import limits
from federation.line import Line
from federation.peer import Peer


class Lines:
    """At most `MAX_KEPT_LINES`, one for each address and the node that is expected there; safe to share.

    `make` makes one that is not connected yet. Unless they are opened none is kept, and beyond the limit each taker
    gets a line of its own. One that has failed is closed when nobody uses it any more.
    """

    def __init__(self, make: Callable[[Peer], Line]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._kept: dict[Peer, Line] = {}
        self._takers: Counter[Line] = Counter()
        self._keeps = False

    def open(self) -> None:
        """Keep lines from now on."""
        self._keeps = True

    def close(self) -> None:
        """Close those that are kept, calls in progress included, and keep none any more."""
        self._keeps = False
        self.drop(lambda peer: True)

    def drop(self, unwanted: Callable[[Peer], bool]) -> None:
        """Close those to peers that are `unwanted`, calls in progress included."""
        with self._lock:
            lines = [self._kept.pop(peer) for peer in [*self._kept] if unwanted(peer)]
        for line in lines:
            line.close()

    @contextmanager
    def to(self, peer: Peer) -> Iterator[Line]:
        """A line to the peer, while the context is open."""
        line = self._taken(Peer(host=peer.host, port=peer.port, node_id=peer.node_id))
        try:
            yield line
        finally:
            self._given_back(line)

    def _taken(self, place: Peer) -> Line:
        with self._lock:
            line = self._kept.get(place) or self._make(place)
            if self._keeps and len(self._kept) < limits.MAX_KEPT_LINES:
                self._kept[place] = line
            if line.calls >= limits.LINE_CALLS and not self._takers[line]:
                line.renew()
            self._takers[line] += 1
            return line

    def _given_back(self, line: Line) -> None:
        with self._lock:
            self._takers[line] -= 1
            if self._takers[line]:
                return
            del self._takers[line]
            if line.is_connected and line in self._kept.values():
                return
            self._kept = {place: kept for place, kept in self._kept.items() if kept is not line}
        line.close()


__all__ = ["Lines"]
