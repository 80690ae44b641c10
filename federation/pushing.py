"""The push: gives a peer cards of this node, in small parts, each of which the peer asked for by its last answer.

The peer decides what comes: it says what it lacks and what it refuses (`federation.uploads`). A line that breaks is
tried again, and goes on where the peer is. One failing card never stops the others.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

from federation import limits
from federation.errors import FederationError, NotApprovedError, PeerError, PushRefusedError, TransportError
from federation.pace import Pace
from federation.uploads import (
    ACTION_PUSH,
    ACTION_PUT,
    PushRequest,
    PutHead,
    Standing,
    decode_standing,
    encode_push,
    encode_put,
)
from registry.card import LoRACard
from registry.digest import Digest
from registry.logs import get_logger

_log = get_logger(__name__)


class Receiver(Protocol):
    """What a push needs of a peer's client."""

    def ask(self, action: str, body: bytes = b"", *, more_s: float = 0.0) -> Generator[bytes, None, None]:
        """The results of an action. Raises `FederationError`."""


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """What became of one card. `error`: why the peer has not got it. `quarantined`: why it waits there, if it does.

    `bytes_moved`: of its manifest and its tensors, those sent again included; 0 for one that was there before.
    """

    digest: Digest
    label: str
    nbytes: int
    bytes_moved: int = 0
    quarantined: str | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class PushProgress:
    """Where a push is, in bytes of one card."""

    card: str
    bytes_done: int
    bytes_total: int


def push(
    client: Receiver,
    cards: Iterable[LoRACard],
    *,
    pace: Pace | None = None,
    on_progress: Callable[[PushProgress], None] | None = None,
    wait: Callable[[float], object] = time.sleep,
) -> tuple[Pushed, ...]:
    """Give the peer of `client` the `cards` that it lacks; what became of each, in their order.

    Raises `PushRefusedError` and `NotApprovedError` from a peer that takes nothing from this node.
    """
    return tuple(_Push(client, card, pace or Pace(None), on_progress, wait).outcome() for card in cards)


class _Push:
    """One card on its way."""

    def __init__(
        self,
        client: Receiver,
        card: LoRACard,
        pace: Pace,
        on_progress: Callable[[PushProgress], None] | None,
        wait: Callable[[float], object],
    ) -> None:
        self._client, self._card, self._pace, self._on_progress, self._wait = client, card, pace, on_progress, wait
        self._label = f"{card.name}@{card.version}"
        self._ends = [*accumulate(tensor.nbytes for tensor in card.tensors)]
        self._moved = self._failures = 0

    def outcome(self) -> Pushed:
        """Push the card, or say why not. Raises `PushRefusedError` and `NotApprovedError`."""
        try:
            standing, error = self._pushed(), None
        except (PushRefusedError, NotApprovedError):
            raise
        except FederationError as failure:
            standing, error = Standing(kept=False), str(failure)
            _log.warning("card_not_pushed", card=self._label, digest=self._card.digest, error=error)
        return Pushed(
            digest=self._card.digest,
            label=self._label,
            nbytes=self._card.nbytes,
            bytes_moved=self._moved,
            quarantined=standing.quarantined,
            error=error,
        )

    def _pushed(self) -> Standing:
        while True:
            try:
                return self._attempt()
            except TransportError as error:
                self._failures += 1
                if self._failures >= limits.MAX_LINE_FAILURES:
                    raise
                _log.warning("push_interrupted", card=self._label, error=str(error))
                self._wait(limits.RETRY_DELAY_S * 2 ** (self._failures - 1))

    def _attempt(self) -> Standing:
        """Offer the card, and send what the peer asks for until it has all. Raises `FederationError`."""
        signature = None if self._card.signature is None else str(self._card.signature)
        request = PushRequest(
            digest=self._card.digest, manifest_bytes=len(self._card.manifest_bytes), signature=signature
        )
        standing = self._asked(ACTION_PUSH, encode_push(request))
        while not standing.kept:
            head, data = self._next(standing)
            self._check_sent(len(data))
            standing = self._asked(ACTION_PUT, encode_put(head, data))
            self._failures = 0
            self._pace.spend(len(data), self._wait)
            self._tell(standing)
        return standing

    def _next(self, standing: Standing) -> tuple[PutHead, bytes]:
        """What the peer lacks next, a chunk of it. Raises `PeerError` if there is no such thing."""
        digest, manifest = self._card.digest, self._card.manifest_bytes
        if standing.manifest < len(manifest):
            start = standing.manifest
            head = PutHead(digest=digest, part="manifest", offset=start)
            return head, manifest[start : start + limits.UPLOAD_CHUNK_BYTES]
        if not standing.gaps or not 0 <= standing.gaps[0][0] < standing.gaps[0][1] <= self._card.nbytes:
            raise PeerError(f"expected the peer to keep {self._label} or to say what it lacks of it, got neither")
        start, end = standing.gaps[0]
        end = min(end, start + limits.UPLOAD_CHUNK_BYTES)
        return PutHead(digest=digest, part="tensors", offset=start), b"".join(self._bytes(start, end))

    def _bytes(self, start: int, end: int) -> Iterable[memoryview]:
        """The card's tensor bytes [start, end), as views."""
        index = bisect_right(self._ends, start)
        while start < end:
            data, until = self._card.tensors[index].data, self._ends[index]
            first = until - len(data)
            yield data[start - first : min(end, until) - first]
            start, index = min(end, until), index + 1

    def _check_sent(self, nbytes: int) -> None:
        """Raise `PeerError` if the peer has all bytes sent to it over and over."""
        self._moved += nbytes
        if self._moved > limits.MAX_LINE_FAILURES * (self._card.nbytes + len(self._card.manifest_bytes)):
            raise PeerError(f"expected the peer to take {self._label}, got the same requests over and over")

    def _asked(self, action: str, body: bytes) -> Standing:
        more_s = self._card.nbytes / limits.SLOWEST_DISK_BYTES_PER_S
        with closing(self._client.ask(action, body, more_s=more_s)) as results:
            answer = next(results, None)
        if answer is None:
            raise PeerError(f"expected an answer to {action!r}, got none")
        return decode_standing(answer)

    def _tell(self, standing: Standing) -> None:
        if self._on_progress is None:
            return
        total = self._card.nbytes
        first = standing.gaps[0][0] if standing.gaps else 0
        self._on_progress(
            PushProgress(card=self._label, bytes_done=total if standing.kept else first, bytes_total=total)
        )


__all__ = ["PushProgress", "Pushed", "Receiver", "push"]
