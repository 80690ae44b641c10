"""The Flight client: asks one peer who it is, what it has, and fetches cards that are verified before anyone sees them.

A card's digest is the digest of its manifest, and the manifest says how large every tensor is. So a fetch reads the
manifest first and, once that is known to be the one asked for, believes its sizes and holds the peer to them. Tensors
come as plain bytes: Arrow never reads what a peer sends, for it could inflate to any size before one may look at it.
What goes wrong is named by `federation.line`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import replace
from itertools import chain, groupby, islice
from typing import Self

import numpy as np
from pyarrow import flight

from federation import limits, wire
from federation.credentials import Credentials
from federation.errors import IdentityError, PeerError, PeerUnreachableError, TransferError, TransportError
from federation.line import Line, Proven
from federation.promise import promised
from federation.sightings import Sightings
from registry.card import LoRACard, check_tensor
from registry.changes import Position
from registry.digest import Digest
from registry.errors import CardError
from registry.manifest import Manifest, TensorSpec
from registry.tensor import Role, Tensor


class LoRAFlightClient:
    """One peer's cards. Connects at the first call; safe to share between threads; must not outlive a `fork`.

    With `credentials` it speaks TLS, proves who this node is, and makes sure that node `node_id` answers (empty:
    whichever does); `sightings`, shared by a node's clients, notice a copied home. Without, it speaks plaintext and
    nobody proves anything: for the loopback, and tests.
    `timeout_s` bounds every call that moves no tensors; a transfer gets time for its promised bytes on top. `line` is
    one that others use too (`federation.lines`), to be given back at the end.
    """

    def __init__(
        self,
        address: str,
        *,
        credentials: Credentials | None = None,
        node_id: str = "",
        sightings: Sightings | None = None,
        timeout_s: float = limits.CALL_TIMEOUT_S,
        line: AbstractContextManager[Line] | None = None,
    ) -> None:
        own = Line(address, credentials=credentials, node_id=node_id, sightings=sightings, timeout_s=timeout_s)
        self._stack = ExitStack()
        self._line = self._stack.enter_context(line or closing(own))
        self.address = self._line.address
        self._timeout_s = timeout_s
        self._secured = credentials is not None

    def proven(self) -> Proven:
        """Which node answers there, which TLS has proven. Raises `PeerUnreachableError`, `PeerError`."""
        return self._line.proven()

    def health(self) -> wire.Health:
        """Who answers there. Raises `PeerUnreachableError`, `PeerError`."""
        with closing(self.ask(wire.ACTION_HEALTH)) as results:
            answer = next(results, None)
        if answer is None:
            raise PeerError(f"expected a health answer from {self.address}, got none")
        health = wire.decode_health(answer)
        if self._secured and health.node_id != self.proven().node_id:
            raise IdentityError(f"{self.address} calls itself {health.node_id}, and is {self.proven().node_id}")
        return health

    def changes(self, known: Position) -> wire.ChangesPage:
        """What changed there since what is `known`, or since 0. Raises `PeerUnreachableError`, `PeerError`."""
        with closing(self.ask(wire.ACTION_CHANGES, wire.encode_changes_request(known))) as results:
            answer = next(results, None)
        if answer is None:
            raise PeerError(f"expected a page of changes from {self.address}, got none")
        return wire.decode_changes(answer, known)

    def list_remote_skills(self) -> list[wire.InventoryEntry]:
        """What the peer says it has. Raises `PeerUnreachableError`, `PeerError`."""
        found: dict[Digest, wire.InventoryEntry] = {}
        known, size = Position(), 0
        for _ in range(limits.MAX_PAGES):
            page = self.changes(known)
            size += sum(len(wire.encode_entry(entry)) for entry in page.added)
            if size > limits.MAX_INVENTORY_CHARS:
                break
            found = {**(found if page.since else {}), **{entry.digest: entry for entry in page.added}}
            for digest in page.gone:
                found.pop(digest, None)
            if not page.more:
                return [*found.values()]
            known = page.position
        raise PeerError(
            f"expected an inventory of at most {limits.MAX_PAGES} pages and {limits.MAX_INVENTORY_CHARS} characters "
            f"from {self.address}, got more"
        )

    def fetch_skill(self, digest: Digest, on_bytes: Callable[[int], None] | None = None) -> LoRACard:
        """The card with `digest`, every tensor verified as it arrives; `on_bytes` hears of tensor bytes as they come.

        Raises `PeerError` if anything is not what the digest and the manifest promise, `TransferError` or
        `PeerUnreachableError` if the line fails. Memory: one message and the card's promised bytes.
        """
        with self._card_errors(digest):
            card = self._without_tensors(digest)
            tensors = self._tensors(wire.CardRequest(digest=digest), card.manifest.tensors, on_bytes)
        return replace(card, tensors=tensors)

    def describe(self, digest: Digest) -> LoRACard:
        """The card with `digest`, manifest and signature checked; a small one may have its tensors already, verified.

        Else it has none. Raises as `fetch_skill`.
        """
        with self._card_errors(digest):
            return self._described(digest, limits.SMALL_CARD_BYTES)

    def read(self, digest: Digest, offset: int, nbytes: int) -> Generator[memoryview, None, None]:
        """`nbytes` of the card's tensor bytes from `offset` on, as they come; nobody has checked them.

        Closing it early ends the call. Raises `TransferError`, or `PeerError` for a peer that refuses.
        """
        request = wire.CardRequest(digest=digest, offset=offset, nbytes=nbytes)
        action = flight.Action(wire.ACTION_TENSORS, wire.encode_card_request(request))
        return self._results(action, self._timeout_s + nbytes / limits.SLOWEST_BYTES_PER_S, TransferError, nbytes)

    def fetch_statistics(self, digest: Digest) -> tuple[Manifest, tuple[Tensor, ...]]:
        """The manifest of the card with `digest` and its tensors of role `STATS`, verified, without its weights.

        Raises as `fetch_skill` does. Memory: one message and `MAX_STATISTICS_BYTES`.
        """
        with self._card_errors(digest):
            manifest = self._without_tensors(digest).manifest
            runs = [self._tensors(request, specs) for request, specs in _statistics_in(manifest, digest)]
        return manifest, tuple(tensor for run in runs for tensor in run)

    def ask(self, action: str, body: bytes = b"", *, more_s: float = 0.0) -> Generator[bytes, None, None]:
        """The results of an action that fetches no tensors; the peer may take `more_s` longer than `timeout_s`.

        Raises `PeerUnreachableError`, `PeerError`.
        """
        timeout_s = self._timeout_s + more_s
        with closing(self._results(flight.Action(action, body), timeout_s, PeerUnreachableError)) as results:
            yield from map(bytes, results)

    def close(self) -> None:
        """Close the connection, unless others use it too."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _without_tensors(self, digest: Digest) -> LoRACard:
        """What is known of the card before its tensors come: manifest and signature, both checked."""
        return self._described(digest, 0)

    def _described(self, digest: Digest, nbytes: int) -> LoRACard:
        """The card without its tensors, or with all of them if they are no more than `nbytes` and the peer likes to."""
        request = wire.CardRequest(digest=digest, nbytes=nbytes)
        action = flight.Action(wire.ACTION_MANIFEST, wire.encode_card_request(request))
        room = limits.MAX_MESSAGE_BYTES + nbytes
        with closing(self._results(action, self._timeout_s, PeerUnreachableError, room)) as results:
            parts = [bytes(part) for part in islice(results, 2)]
            more = next(results, None)
            if not parts:
                raise PeerError(f"expected the manifest of card {digest}, got nothing")
            unsigned = len(parts) == 1 or (more is not None and not parts[1])
            card = promised(digest, parts[0], None if unsigned else parts[1])
            if more is None:
                return card
            if card.nbytes > nbytes:
                raise PeerError(f"expected the manifest of card {digest} and at most a signature, got more")
            chunks = _ByteStream(chain([more], results), None)
            return replace(card, tensors=_received(chunks, card.manifest.tensors))

    def _tensors(
        self, request: wire.CardRequest, specs: Sequence[TensorSpec], on_bytes: Callable[[int], None] | None = None
    ) -> tuple[Tensor, ...]:
        """The tensors that `request` asks for, which are those of `specs`."""
        action = flight.Action(wire.ACTION_TENSORS, wire.encode_card_request(request))
        nbytes = sum(spec.nbytes for spec in specs)
        deadline_s = self._timeout_s + nbytes / limits.SLOWEST_BYTES_PER_S
        with closing(self._results(action, deadline_s, TransferError, nbytes)) as chunks:
            return _received(_ByteStream(chunks, on_bytes), specs)

    def _results(
        self,
        action: flight.Action,
        timeout_s: float,
        broken: type[TransportError],
        nbytes: int = limits.MAX_MESSAGE_BYTES,
    ) -> Generator[memoryview, None, None]:
        """The results of an action, `nbytes` in sum, one by one; closing the iterator early cancels the call."""
        return self._line.call(action, timeout_s, broken, nbytes)

    @contextmanager
    def _card_errors(self, digest: Digest) -> Iterator[None]:
        try:
            yield
        except CardError as error:
            raise PeerError(f"{self.address} sent card {digest} damaged or forged: {error}") from error


def probe(address: str, *, timeout_s: float = limits.PROBE_TIMEOUT_S) -> wire.Health:
    """Whether a node is alive at `address`, and which. Raises `PeerUnreachableError`, `PeerError`."""
    with LoRAFlightClient(address, timeout_s=timeout_s) as client:
        return client.health()


class _ByteStream:
    """The bytes of a stream of chunks, taken in whatever portions the reader likes."""

    def __init__(self, chunks: Iterator[memoryview], on_bytes: Callable[[int], None] | None) -> None:
        self._chunks, self._on_bytes = chunks, on_bytes
        self._waiting = memoryview(b"")

    def take(self, count: int) -> memoryview:
        """The next `count` bytes. Raises `PeerError` if the stream ends before, or if there is no memory for them."""
        data, filled = _untouched(count), 0
        while filled < count:
            part = self._next()[: count - filled]
            data[filled : filled + len(part)] = part
            filled, self._waiting = filled + len(part), self._waiting[len(part) :]
            if self._on_bytes is not None:
                self._on_bytes(len(part))
        return data

    def end(self) -> None:
        """Raise `PeerError` if anything is left."""
        if self._waiting or next(self._chunks, None) is not None:
            raise PeerError("expected as many bytes as the manifest promises, got more, so the transfer was stopped")

    def _next(self) -> memoryview:
        if not self._waiting:
            chunk = next(self._chunks, None)
            if not chunk:  # at the end, or an empty message, of which there could be no end
                raise PeerError("expected more tensor bytes, got none, so the card is not whole")
            self._waiting = chunk
        return self._waiting


def _untouched(count: int) -> memoryview:
    """Room for `count` bytes, of which the system gives a page when it is written to: a promise alone costs nothing."""
    try:
        return np.empty(count, dtype=np.uint8).data
    except MemoryError as error:
        raise PeerError(f"expected a tensor that fits into memory, got one of {count} bytes") from error


def _received(stream: _ByteStream, specs: Sequence[TensorSpec]) -> tuple[Tensor, ...]:
    """The promised tensors out of `stream`, each checked as soon as it is whole."""
    tensors = []
    for spec in specs:
        tensor = Tensor.of(spec.name, spec.role, spec.dtype, spec.shape, stream.take(spec.nbytes))
        check_tensor(tensor, spec)
        tensors.append(tensor)
    stream.end()
    return tuple(tensors)


def _statistics_in(manifest: Manifest, digest: Digest) -> list[tuple[wire.CardRequest, list[TensorSpec]]]:
    """Where the statistics lie in the card's bytes, as one request for each run of them. Raises `PeerError`."""
    requests, offset = [], 0
    for is_statistics, run in groupby(manifest.tensors, key=lambda spec: spec.role is Role.STATS):
        specs = list(run)
        nbytes = sum(spec.nbytes for spec in specs)
        if is_statistics:
            requests.append((wire.CardRequest(digest=digest, offset=offset, nbytes=nbytes), specs))
        offset += nbytes
    if len(requests) > limits.MAX_STATISTICS_RUNS:
        raise PeerError(
            f"expected statistics in at most {limits.MAX_STATISTICS_RUNS} places of card {digest}, got {len(requests)}"
        )
    return requests


__all__ = ["LoRAFlightClient", "probe"]
