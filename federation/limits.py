"""Every limit that a node sets to what its peers can make it do, with its unit.

gRPC takes in a message of any size before anyone may refuse it. So bytes are counted before they reach it, by a
turnstile before the server and one behind each client (docs/adr/0025), and these are the ceilings (docs/security.md):

- A client holds of a peer what its calls in progress asked for, times `ANSWER_OVERHEAD`, and `ANSWER_SLACK_BYTES` for
  each: under 3 MiB for a call that moves no tensors, and for tensors what it asked for in one call.
- A server takes of its callers `MAX_STRANGERS` times `STRANGER_BYTES`, `CALLER_BYTES` and a `CALLER_SHARE` of what they
  were sent for each connection of a known one, and `MAX_CALLERS_BYTES` in all. The dearest that can be made of them are
  calls that are begun and never ended: 220 MiB by strangers, 900 MiB by peers that were approved.

A client uses actions only: Arrow never reads what a peer sends, for a record batch could inflate to any size, and a
schema too (docs/adr/0012).
"""

from __future__ import annotations

CALL_TIMEOUT_S = 10.0
"""A call that moves no tensors: health, one page of changes."""

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

MAX_CERTIFICATE_BYTES = 4096
"""A node's certificate in DER; ours has some 470 bytes."""

MAX_KNOWN_CALLERS = 1024
"""Proofs of identity that a server remembers as checked; a forgotten one is checked anew, in some 0.1 ms."""

MAX_SIGHTED_NODES = 1024
"""Nodes of which a client remembers the processes that it met, to notice a copied home."""

MAX_SIGHTINGS_PER_NODE = 8
"""Processes of one node that it remembers."""

MAX_PENDING_PEERS = 256
"""Nodes that wait for approval; another one takes the place of the one that has waited longest."""

STRANGER_INTERVAL_S = 0.1
"""Between two strangers that are written down as pending; one that is passed over is so when it calls again."""

MAX_ROSTER_PEERS = 256
"""Nodes that an introducer can introduce."""

MAX_ROSTER_BYTES = 64 << 10
"""The answer to `roster`, and to `join`."""

MAX_JOIN_TOKEN_CHARS = 2048
"""A join token as printed."""

MAX_REQUEST_BYTES = 4096
"""The body of an action."""

MAX_HEALTH_BYTES = 4096
"""The answer to `health`."""

MAX_ENTRY_BYTES = 64 * 1024
"""One inventory entry as JSON; a server drops examples, then shortens the description, until an entry fits."""

MAX_PAGE_BYTES = 1 << 20
"""One page of changes as JSON."""

MAX_PAGE_CHANGES = 1000
"""Changes in one page."""

MAX_PAGES = 128
"""Pages of changes that a client reads of one peer in one sync; the next one reads on."""

MAX_INVENTORY_ENTRIES = 100_000
"""Cards of one peer that a node keeps account of."""

MAX_INVENTORY_CHARS = 64 << 20
"""Characters of JSON in which it does."""

MAX_KEPT_LINES = 32
"""Connections to peers that a node keeps open between calls; each takes a thread and some 8 descriptors."""

LINE_CALLS = 40
"""Calls on a kept connection after which it is made anew; a small one spends some 160 bytes of `CALLER_BYTES`."""

FIRST_BACKOFF_S = 1.0
"""Longest pause after a peer did not answer; twice as long after each further failure."""

MAX_BACKOFF_S = 30.0
"""Longest pause before a peer that does not answer is asked again by itself."""

FIRST_CARD_BACKOFF_S = 10.0
"""Longest pause before a card that did not come is fetched again by itself; doubles as well."""

MAX_CARD_BACKOFF_S = 3600.0
"""Longest pause for such a card."""

MAX_PEERS_ASKED = 8
"""Peers that a sync asks at once what changed."""

MAX_LISTING_BYTES = 64 << 20
"""Manifests in one answer to Flight's own `list_flights`, which cannot be streamed."""

MAX_STREAMS = 16
"""Transfers and listings that a server has open at once; the next one is told to come back."""

CLOSE_GRACE_S = 0.5
"""How long a closing server lets open streams end by themselves before it cuts their connections."""

MAX_STREAMS_PER_CALLER = 6
"""Of them, for one node; without credentials, on one connection."""

STALLED_S = 10.0
"""A stream that stood still for so long is cut when another one wants its place."""

MAX_CALLS = 128
"""Calls that a server has open at once, each of which takes a thread."""

MAX_CALLS_PER_CALLER = 16
"""Of them, for one node."""

MAX_CONNECTIONS = 128
"""Connections that a server has open at once."""

MAX_CONNECTIONS_PER_ADDRESS = 32
"""Of them, from one IPv4 address or one IPv6 /64 network."""

MAX_STRANGERS = 32
"""Of them, of callers that have not proven who they are; one more cuts the oldest."""

STRANGER_BYTES = 8 * 1024
"""What such a caller may send: TLS, HTTP/2, a proof and a first call take 2.3 KiB, and `MAX_REQUEST_BYTES`."""

STRANGER_S = 10.0
"""How long a caller may stay a stranger."""

CALLER_BYTES = 16 * 1024
"""What a caller may send on one connection before it was sent anything; a small call takes 50 to 75 bytes."""

CALLER_SHARE = 1 / 4
"""What it may send for each byte that it was sent; the smallest cards take 1/8, a large one 1/70,000."""

MAX_CALLERS_BYTES = 1 << 20
"""What all callers may have sent on the connections that are open; over it, the one with the most is cut.

gRPC makes some 12.6 KiB of a call of 15 bytes that is begun and never ended, so this is what bounds memory: to 900 MiB.
"""

IDLE_S = 300.0
"""A connection on which nothing passes for so long is cut; gRPC makes another when it needs one."""

STUCK_S = 30.0
"""A connection whose reader leaves bytes waiting for so long is cut."""

CONNECTION_AGE_S = 600.0
"""An older connection is closed as soon as it is quiet, so what it may have sent is counted anew."""

CONNECT_S = 5.0
"""Connecting a caller to what is behind the turnstile, and a kept line to its peer."""

UPLOAD_CHUNK_BYTES = 256 << 10
"""Bytes of a pushed card in one call; the next is sent when this one was taken in."""

UPLOAD_WINDOW_BYTES = UPLOAD_CHUNK_BYTES + (16 << 10)
"""What a caller that may push may send, beside `CALLER_BYTES`, before the server has taken it in."""

UPLOAD_OVERHEAD = 1 / 64
"""What it may send on top for each byte of a pushed card: frames and TLS records, 1/450 as gRPC makes them."""

MAX_UPLOADS = 2
"""Callers that push at once, so that what they have under way stays within `MAX_CALLERS_BYTES`."""

MAX_GAPS_TOLD = 64
"""Spans of bytes that a server names as missing of a pushed card; the next answer names the next ones."""

SLOWEST_DISK_BYTES_PER_S = 32 << 20
"""A call of a push has its card's bytes at this rate on top: the receiver may hash, flush or copy all of them in it."""

ANSWER_SLACK_BYTES = 1 << 20
"""What may come for a call over its answer: TLS, HTTP/2, errors, and messages much shorter than need be."""

ANSWER_OVERHEAD = 1.25
"""An answer's bytes on the wire for each of its own, beside the slack."""

PACE_BURST_S = 0.1
"""With a limit to the bandwidth, what was not used for so long may be made up for at once."""

MAX_PART_BYTES = 16 << 20
"""Tensor bytes that a transfer asks for at once, unless one tensor that came wrong has to come from one peer."""

MAX_TRANSFER_STREAMS = 8
"""Streams that a transfer reads at once in all."""

STREAMS_PER_PEER = 2
"""Streams that a transfer reads at once from one peer: each may lose a batch when it is cut."""

CALLS_PER_PEER = 6
"""Streams and questions for cards, which bring small ones whole, that a transfer has open at once to one peer."""

MAX_LINE_FAILURES = 4
"""A peer whose line failed so often in a row, without a part in between, is asked for nothing more in this transfer."""

RETRY_DELAY_S = 0.1
"""Pause of a stream after its line failed; twice as long after each further failure."""

SMALL_CARD_BYTES = 256 << 10
"""Tensors of a card that come along with its manifest, to whoever asks for that."""

KEEP_TOGETHER_CARDS = 64
"""Small cards that came whole and are entered into the catalog at once."""

KEEP_TOGETHER_S = 0.2
"""How long the first of them waits for others, while more are on their way."""

MAX_SIBLINGS = 8
"""Cards here, of the same name, that are searched for tensors that a card which is to come has too."""

CANCEL_POLL_S = 0.2
"""How long a transfer that was cancelled may go on before it notices, where it waits for others."""

CONFORMANCE_TIMEOUT_S = 10.0
"""A call of the conformance checks."""

CONFORMANCE_MESSAGE_BYTES = 64 << 20
"""One message that they take in, so that they can tell one that is too large."""

CONFORMANCE_CARD_BYTES = 64 << 20
"""The largest card that they read, and all results of one call."""

CONFORMANCE_CARDS = 4
"""Cards that they read."""
