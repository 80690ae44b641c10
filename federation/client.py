"""The Flight client: asks one peer who it is, what it has, and fetches cards that are verified before anyone sees them.

A card's digest is the digest of its manifest, and the manifest says how large every tensor is. So a fetch reads the
manifest first and, once that is known to be the one asked for, believes its sizes and holds the peer to them.
What the peer got wrong is a `PeerError`, what the line got wrong a `TransportError`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from typing import Any, Self

import pyarrow as pa
from pyarrow import flight

from federation import limits, wire
from federation.errors import FederationError, PeerError, PeerUnreachableError, TransferError, TransportError
from federation.peer import format_address, parse_address
from registry.card import LoRACard
from registry.digest import Digest, digest_of
from registry.errors import CardError
from registry.format import card_from_batches
from registry.manifest import Manifest

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
        """The card with `digest`, every tensor verified; `on_bytes` hears of tensor bytes as they arrive.

        Raises `PeerError` if anything is not what the digest and the manifest promise, `TransferError` or
        `PeerUnreachableError` if the line fails. Memory: one message and the card's promised bytes.
        """
        promised = self._manifest(digest)
        with self._channel_for(promised) as channel:
            metadata, batches = self._open(channel, digest, promised)
            try:
                card = card_from_batches(metadata, _counted(batches, promised, on_bytes), verify=True)
            except CardError as error:
                raise PeerError(f"{self.address} sent card {digest} damaged or forged: {error}") from error
            finally:
                batches.close()
        if card.digest != digest:
            raise PeerError(f"expected card {digest} from {self.address}, got {card.digest}")
        return card

    def close(self) -> None:
        """Close the connection."""
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _manifest(self, digest: Digest) -> Manifest:
        """The card's manifest, known to be the one asked for."""
        descriptor = flight.FlightDescriptor.for_path(wire.DESCRIPTOR_ROOT, digest)
        with self._line(PeerUnreachableError):
            metadata = self._shared().get_flight_info(descriptor, self._options(self._timeout_s)).schema.metadata
        data = _checked_metadata(metadata, digest)
        try:
            manifest = Manifest.parse(data)
        except CardError as error:
            raise PeerError(
                f"{self.address} offers card {digest} with a manifest that is not valid: {error}"
            ) from error
        largest = max((spec.nbytes for spec in manifest.tensors), default=0)
        if manifest.tensor_bytes > limits.MAX_CARD_BYTES or largest > limits.MAX_TENSOR_BYTES:
            raise PeerError(
                f"expected at most {limits.MAX_CARD_BYTES} bytes of tensors and {limits.MAX_TENSOR_BYTES} in one, "
                f"got {manifest.tensor_bytes} and {largest} in card {digest}, so it is not fetched"
            )
        return manifest

    def _open(
        self, channel: flight.FlightClient, digest: Digest, promised: Manifest
    ) -> tuple[dict[bytes, bytes], _Batches]:
        deadline_s = self._timeout_s + promised.tensor_bytes / limits.SLOWEST_BYTES_PER_S
        with self._line(TransferError):
            reader = channel.do_get(flight.Ticket(digest), self._options(deadline_s))
            metadata = reader.schema.metadata
        _checked_metadata(metadata, digest)
        return metadata, _Batches(reader, lambda: self._line(TransferError))

    @contextmanager
    def _channel_for(self, promised: Manifest) -> Iterator[flight.FlightClient]:
        """The shared connection, or one of its own that lets the card's largest tensor through."""
        needed = max((spec.nbytes for spec in promised.tensors), default=0) + limits.MESSAGE_OVERHEAD_BYTES
        if needed <= limits.MAX_MESSAGE_BYTES:
            yield self._shared()
            return
        with closing(self._connect(needed)) as channel:
            yield channel

    def _action(self, name: str) -> Generator[bytes, None, None]:
        """The results of an action, one by one; closing the iterator early cancels the call."""
        with self._line(PeerUnreachableError):
            results = self._shared().do_action(flight.Action(name, b""), self._options(self._timeout_s))
            yield from (result.body.to_pybytes() for result in results)

    def _shared(self) -> flight.FlightClient:
        if self._channel is None:
            self._channel = self._connect(limits.MAX_MESSAGE_BYTES)
        return self._channel

    def _connect(self, max_message_bytes: int) -> flight.FlightClient:
        options = [
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.http2.bdp_probe", 0),  # else gRPC reads ahead as far as it likes: a whole card of 64 MiB was seen
            ("grpc.http2.lookahead_bytes", limits.READ_AHEAD_BYTES),
            ("grpc.enable_http_proxy", 0),  # a peer is on this network, a proxy of the environment is not
            ("grpc.use_local_subchannel_pool", 1),  # else a new client inherits an old one's back-off
        ]
        return flight.FlightClient(f"grpc+tcp://{self.address}", generic_options=options)

    def _options(self, timeout_s: float) -> flight.FlightCallOptions:
        return flight.FlightCallOptions(timeout=timeout_s)

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


class _Batches:
    """A stream's record batches, each with the library's errors translated."""

    def __init__(self, reader: flight.FlightStreamReader, line: Callable[[], Any]) -> None:
        self._reader, self._line = reader, line
        self._ended = False

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        while (batch := self._next()) is not None:
            yield batch

    def close(self) -> None:
        """Cancel the call if it still runs."""
        if not self._ended:
            self._reader.cancel()

    def _next(self) -> pa.RecordBatch | None:
        with self._line():
            try:
                chunk = self._reader.read_chunk()
            except StopIteration:
                self._ended = True
                return None
        if chunk.data is None or chunk.data.num_rows == 0:
            raise PeerError("expected record batches with rows, got an empty one")
        return chunk.data


def _counted(
    batches: Iterable[pa.RecordBatch], promised: Manifest, on_bytes: Callable[[int], None] | None
) -> Iterator[pa.RecordBatch]:
    """The batches, for as long as they are no more than the manifest promises."""
    rows, remaining = len(promised.tensors), promised.tensor_bytes
    allowance = remaining + (rows + 1) * limits.ROW_OVERHEAD_BYTES
    for batch in batches:
        size = batch.get_total_buffer_size()  # buffers, not offsets: those are not validated yet
        rows, allowance = rows - batch.num_rows, allowance - size
        if rows < 0 or allowance < 0:
            raise PeerError(
                f"expected {len(promised.tensors)} tensors of {promised.tensor_bytes} bytes in all, as the manifest "
                "promises, got more, so the transfer was stopped"
            )
        arrived, remaining = min(size, remaining), max(0, remaining - size)
        if on_bytes is not None and arrived:
            on_bytes(arrived)
        yield batch


def _checked_metadata(metadata: dict[bytes, bytes] | None, digest: Digest) -> bytes:
    """The manifest in a card's schema metadata, if that is in bounds and the manifest is the one asked for."""
    found = metadata or {}
    size = sum(len(key) + len(value) for key, value in found.items())
    if size > limits.MAX_METADATA_BYTES:
        raise PeerError(f"expected schema metadata of at most {limits.MAX_METADATA_BYTES} bytes, got {size}")
    manifest = found.get(wire.MANIFEST_KEY)
    if manifest is None:
        raise PeerError(f"expected a card under {digest}, got a stream without a manifest")
    if digest_of(manifest) != digest:
        raise PeerError(f"expected the manifest of card {digest}, got that of {digest_of(manifest)}")
    return manifest


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
