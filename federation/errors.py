"""The federation's errors. What matters most to a caller is whose fault it was, so that is where the tree forks.

FederationError               the federation cannot do what was asked (of itself: a wrong setting)
├── PeerError                 the peer lied or refused: what it sent is wrong, or is not what it promised
├── TransportError            the line failed: the same peer may be fine in a minute
│   ├── PeerUnreachableError  no answer: nobody listens, no route, too slow, or the peer is busy
│   └── TransferError         a transfer broke off in its middle; nothing of it was kept
└── DiscoveryError            looking for peers on the network is impossible here
"""

from __future__ import annotations

from registry.errors import ArrowMoEError


class FederationError(ArrowMoEError):
    """The federation cannot do what was asked."""


class PeerError(FederationError):
    """The peer sent something wrong, or something else than it promised."""


class TransportError(FederationError):
    """The line failed; what did arrive is not at fault."""


class PeerUnreachableError(TransportError):
    """The peer does not answer."""


class TransferError(TransportError):
    """A transfer broke off; nothing of it was kept."""


class DiscoveryError(FederationError):
    """Peers cannot be looked for on this network."""


__all__ = [
    "DiscoveryError",
    "FederationError",
    "PeerError",
    "PeerUnreachableError",
    "TransferError",
    "TransportError",
]
