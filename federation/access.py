"""Who is answered: the peer book says so at every call, so that a decision acts on a running server at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from federation import limits, wire
from federation.errors import NotApprovedError
from federation.membership import ACTION_JOIN
from federation.peer import shown_id
from registry.logs import get_logger
from registry.peers import PeerBook, PeerState

_log = get_logger(__name__)

FOR_STRANGERS = frozenset({wire.ACTION_HEALTH, ACTION_JOIN})
"""Actions for every node that proves its id and is not blocked: to learn how things stand, and to show a join token."""


class Doorman:
    """Decides by `book` who is answered; with `open`, everyone who is not blocked."""

    def __init__(self, book: PeerBook, *, open: bool, own_id: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._book, self._open, self._own_id, self._clock = book, open, own_id, clock
        self._lock = threading.Lock()
        self._next_entry_s = -float("inf")

    def check(self, caller: str, call: str) -> bool:
        """Whether node `caller` is no stranger. Raises `NotApprovedError` unless its `call` is to be answered."""
        known = self._book.find(caller)
        state = PeerState.PENDING if known is None else known.state
        if known is None and not self._open:
            self._enter(caller)
        if not answers(state, call, open=self._open):
            raise _refusal(state, caller, self._own_id)
        return self._open or state is PeerState.APPROVED

    def _enter(self, caller: str) -> None:
        with self._lock:
            now = self._clock()
            if now < self._next_entry_s:
                return
            self._next_entry_s = now + limits.STRANGER_INTERVAL_S
        self._book.meet(caller, most_pending=limits.MAX_PENDING_PEERS)
        _log.info("peer_pending", node_id=caller)


def answers(state: PeerState, call: str, *, open: bool) -> bool:
    """Whether a node in that state is answered."""
    match state:
        case PeerState.APPROVED:
            return True
        case PeerState.PENDING:
            return open or call in FOR_STRANGERS
        case PeerState.BLOCKED:
            return False


def _refusal(state: PeerState, caller: str, own_id: str) -> NotApprovedError:
    if state is PeerState.BLOCKED:
        return NotApprovedError(f"node {shown_id(own_id)} has blocked node {shown_id(caller)}")
    return NotApprovedError(
        f"approval of node {shown_id(caller)} is pending on node {shown_id(own_id)}: "
        f"on that node run `arrowmoe peers approve {shown_id(caller)}`"
    )


__all__ = ["FOR_STRANGERS", "Doorman", "answers"]
