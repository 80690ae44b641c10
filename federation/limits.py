"""Every limit that a node sets to what its peers can make it do, with its unit.

A client's memory under a hostile peer stays under `MAX_MESSAGE_BYTES` and `READ_AHEAD_BYTES` for each call in progress,
plus the tensor bytes of the one card being fetched, which are checked against `MAX_CARD_BYTES` before the first of them
is read. One hole is known: gRPC buffers a message whole before it refuses it as too large (docs/federation.md). A
client uses actions only: Arrow never reads what a peer sends, for a record batch could inflate to any size,
and a schema too (docs/adr/0012).
"""

from __future__ import annotations

CALL_TIMEOUT_S = 10.0
"""A call that moves no tensors: health, one inventory."""

PROBE_TIMEOUT_S = 2.0
"""A probe of whether a peer is alive."""

SLOWEST_BYTES_PER_S = 256 * 1024
"""A transfer's deadline is the call's, plus its promised bytes at this rate."""

MAX_MESSAGE_BYTES = (1 << 20) + (64 << 10)
"""One Flight message as a client receives it; gRPC unpacks a hostile one of this size into some 40 MiB."""

TENSOR_CHUNK_BYTES = 1 << 20
"""Tensor bytes in one message at the most."""

READ_AHEAD_BYTES = 4 << 20
"""What a client lets arrive on one stream before it has looked at what came already."""

MAX_CARD_BYTES = 8 << 30
"""Sum of one card's tensors."""

MAX_STATISTICS_RUNS = 8
"""Places in a card's bytes at which its statistics lie, each of which is a request of its own; our writer makes two."""

MAX_NAME_CHARS = 64
"""A node's name."""

MAX_REQUEST_BYTES = 4096
"""The body of an action."""

MAX_HEALTH_BYTES = 4096
"""The answer to `health`."""

MAX_ENTRY_BYTES = 64 * 1024
"""One inventory entry as JSON; a server drops examples, then shortens the description, until an entry fits."""

MAX_PAGE_BYTES = 1 << 20
"""One page of an inventory as JSON."""

MAX_PAGE_ENTRIES = 256
"""Entries in one page of an inventory."""

MAX_INVENTORY_ENTRIES = 100_000
"""Entries that a client reads of one peer."""

MAX_INVENTORY_BYTES = 64 << 20
"""Bytes of JSON that a client reads of one peer's inventory."""

MAX_LISTING_BYTES = 64 << 20
"""Manifests in one answer to Flight's own `list_flights`, which cannot be streamed."""

MAX_STREAMS = 16
"""Transfers and listings that a server has open at once; the next one is told to come back."""

CLOSE_GRACE_S = 0.5
"""How long a closing server lets open streams end by themselves before it cuts their connections."""
