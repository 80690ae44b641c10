"""The Flight client: asks one peer who it is, what it has, and fetches cards that are verified before anyone sees them.

A card's digest is the digest of its manifest, and the manifest says how large every tensor is. So a fetch reads the
manifest first and, once that is known to be the one asked for, believes its sizes and holds the peer to them. Tensors
come as plain bytes: Arrow never reads what a peer sends, for it could inflate to any size before one may look at it.
What the peer got wrong is a `PeerError`, what the line got wrong a `TransportError`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import groupby, islice
from typing import Self

import numpy as np
import pyarrow as pa
from pyarrow import flight

from federation import limits, wire
from federation.errors import FederationError, PeerError, PeerUnreachableError, TransferError, TransportError
from federation.peer import format_address, parse_address
from registry.card import LoRACard, check_tensor
from registry.digest import Digest, digest_of
from registry.errors import CardError
from registry.format import described
from registry.manifest import FORMAT_VERSION, Manifest, TensorSpec
from registry.tensor import Role, Tensor

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")
_ARROW_ERRORS = (pa.ArrowException, OSError, UnicodeError)


class LoRAFlightClient:
    """One peer's cards. Connects at the first call; safe to share between threads; must not outlive a `fork`.

    `timeout_s` bounds every call that moves no tensors; a transfer gets time for its promised bytes on top.
    """

    def __init__(self, address: str, *, timeout_s: float = limits.CALL_TIMEOUT_S) -> None:
        self.address = format_address(*parse_address(address))
        self._timeout_s = timeout_s
        self._channel: flight.FlightClient | None = None

    def health(self) -> wire.Health:
        """Who answers there. Raises `PeerUnreachableError`, `PeerError`."""
        with closing(self._action(wire.ACTION_HEALTH)) as results:
            answer = next(results, None)
        if answer is None:
            raise PeerError(f"expected a health answer from {self.address}, got none")
        return wire.decode_health(answer)

    def list_remote_skills(self) -> list[wire.InventoryEntry]:
        """What the peer says it has. Raises `PeerUnreachableError`, `PeerError`."""
        with closing(self._action(wire.ACTION_INVENTORY)) as pages:
            return wire.decode_inventory(pages)

    def fetch_skill(self, digest: Digest, on_bytes: Callable[[int], None] | None = None) -> LoRACard:
        """The card with `digest`, every tensor verified as it arrives; `on_bytes` hears of tensor bytes as they come.

        Raises `PeerError` if anything is not what the digest and the manifest promise, `TransferError` or
        `PeerUnreachableError` if the line fails. Memory: one message and the card's promised bytes.
        """
        with self._card_errors(digest):
            card = self._without_tensors(digest)
            tensors = self._tensors(wire.CardRequest(digest=digest), card.manifest.tensors, on_bytes)
        return replace(card, tensors=tensors)

    def fetch_statistics(self, digest: Digest) -> tuple[Manifest, tuple[Tensor, ...]]:
        """The manifest of the card with `digest` and its tensors of role `STATS`, verified, without its weights.

        Raises as `fetch_skill` does. Memory: one message and `MAX_STATISTICS_BYTES`.
        """
        with self._card_errors(digest):
            manifest = self._without_tensors(digest).manifest
            runs = [self._tensors(request, specs) for request, specs in _statistics_in(manifest, digest)]
        return manifest, tuple(tensor for run in runs for tensor in run)

    def close(self) -> None:
        """Close the connection."""
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _without_tensors(self, digest: Digest) -> LoRACard:
        """What is known of the card before its tensors come: manifest and signature, both checked."""
        metadata = self._metadata(digest)
        manifest, signature = described(metadata)
        _check_size(manifest, digest)
        card = LoRACard(manifest_bytes=metadata[wire.MANIFEST_KEY], manifest=manifest, tensors=(), signature=signature)
        card.verify_signature()
        return card

    def _metadata(self, digest: Digest) -> dict[bytes, bytes]:
        """The card's manifest, known to be the one asked for, and its signature, as a card file's metadata has them."""
        action = flight.Action(wire.ACTION_MANIFEST, wire.encode_card_request(wire.CardRequest(digest=digest)))
        with closing(self._results(action, self._timeout_s, PeerUnreachableError)) as results:
            parts = [bytes(part) for part in islice(results, 3)]
        if not 1 <= len(parts) <= 2:
            raise PeerError(f"expected the manifest of card {digest} and at most a signature, got {len(parts)} parts")
        if digest_of(parts[0]) != digest:
            raise PeerError(f"expected the manifest of card {digest}, got that of {digest_of(parts[0])}")
        keys = (wire.MANIFEST_KEY, wire.SIGNATURE_KEY)
        return {wire.FORMAT_KEY: b"%d" % FORMAT_VERSION, **dict(zip(keys, parts, strict=False))}

    def _tensors(
        self, request: wire.CardRequest, specs: Sequence[TensorSpec], on_bytes: Callable[[int], None] | None = None
    ) -> tuple[Tensor, ...]:
        """The tensors that `request` asks for, which are those of `specs`."""
        action = flight.Action(wire.ACTION_TENSORS, wire.encode_card_request(request))
        deadline_s = self._timeout_s + sum(spec.nbytes for spec in specs) / limits.SLOWEST_BYTES_PER_S
        with closing(self._results(action, deadline_s, TransferError)) as chunks:
            return _received(_ByteStream(chunks, on_bytes), specs)

    def _action(self, name: str) -> Generator[bytes, None, None]:
        """The results of an action that moves no tensors."""
        with closing(self._results(flight.Action(name, b""), self._timeout_s, PeerUnreachableError)) as results:
            yield from map(bytes, results)

    def _results(
        self, action: flight.Action, timeout_s: float, broken: type[TransportError]
    ) -> Generator[memoryview, None, None]:
        """The results of an action, one by one; closing the iterator early cancels the call."""
        with self._line(broken):
            for result in self._shared().do_action(action, self._options(timeout_s)):
                yield memoryview(result.body).cast("B")

    def _shared(self) -> flight.FlightClient:
        if self._channel is None:
            self._channel = self._connect()
        return self._channel

    def _connect(self) -> flight.FlightClient:
        options = [
            ("grpc.max_receive_message_length", limits.MAX_MESSAGE_BYTES),
            ("grpc.http2.bdp_probe", 0),  # else gRPC reads ahead as far as it likes: a whole card of 64 MiB was seen
            ("grpc.http2.lookahead_bytes", limits.READ_AHEAD_BYTES),
            ("grpc.enable_http_proxy", 0),  # a peer is on this network, a proxy of the environment is not
            ("grpc.use_local_subchannel_pool", 1),  # else a new client inherits an old one's back-off
        ]
        return flight.FlightClient(f"grpc+tcp://{self.address}", generic_options=options)

    def _options(self, timeout_s: float) -> flight.FlightCallOptions:
        return flight.FlightCallOptions(timeout=timeout_s)

    @contextmanager
    def _card_errors(self, digest: Digest) -> Iterator[None]:
        try:
            yield
        except CardError as error:
            raise PeerError(f"{self.address} sent card {digest} damaged or forged: {error}") from error

    @contextmanager
    def _line(self, broken: type[TransportError]) -> Iterator[None]:
        """Translate the library's errors; `broken` is what a failing line is called at this point."""
        try:
            yield
        except _ARROW_ERRORS as error:
            raise _translated(error, self.address, broken) from error


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


def _check_size(manifest: Manifest, digest: Digest) -> None:
    if manifest.tensor_bytes > limits.MAX_CARD_BYTES:
        raise PeerError(
            f"expected at most {limits.MAX_CARD_BYTES} bytes of tensors, got {manifest.tensor_bytes} in card {digest}, "
            "so it is not fetched"
        )


def _translated(error: Exception, address: str, broken: type[TransportError]) -> FederationError:
    said = _brief(error)
    match error:
        case flight.FlightUnavailableError():
            return broken(f"{address} is not available: {said}", hint="is the node running, and the address right?")
        case flight.FlightTimedOutError():
            return broken(f"{address} did not answer in time: {said}")
        case flight.FlightInternalError():
            return broken(f"the exchange with {address} failed: {said}")
        case flight.FlightCancelledError():  # gRPC cuts a stream so when a message is over the limit
            return PeerError(f"{address} cancelled the call, or sent a message over the size limit: {said}")
        case flight.FlightServerError() if error.extra_info == wire.NOT_FOUND:
            return PeerError(f"{address} does not have that: {said}")
        case flight.FlightError():
            return PeerError(f"{address} refused: {said}")
    return PeerError(f"{address} sent something that cannot be read: {said}")


def _brief(error: Exception) -> str:
    """The first part of the library's text, without what a terminal would obey: a peer may have written it."""
    text = str(error).split(". Detail: ")[0].split(". gRPC client debug context")[0]
    return _CONTROL.sub(" ", text).strip()[:300] or type(error).__name__


__all__ = ["LoRAFlightClient", "probe"]
