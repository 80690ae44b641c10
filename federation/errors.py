"""The federation's errors. What matters most to a caller is whose fault it was, so that is where the tree forks.

FederationError               the federation cannot do what was asked (of itself: a wrong setting)
├── PeerError                 the peer lied or refused: what it sent is wrong, or is not what it promised
│   ├── IdentityError         it cannot prove who it is, or is another node than was expected
│   │   └── CopiedHomeError   two nodes have one identity
│   ├── ProtocolError         it speaks another version of the protocol
│   ├── NotApprovedError      it does not answer this node: approval is pending there, or this node is blocked
│   └── PushRefusedError      it takes no cards from this node, it only fetches
├── BusyError                 this node serves as many as it may; later it will serve again
├── AdmissionError            this node's policy refuses the card; neither peer nor line is at fault
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


class IdentityError(PeerError):
    """The peer does not prove who it is, or is another node than was expected."""


class CopiedHomeError(IdentityError):
    """Two nodes have one identity, so a home was copied."""


class ProtocolError(PeerError):
    """The peer speaks another version of the protocol."""


class NotApprovedError(PeerError):
    """The peer does not answer this node: its owner has not approved it yet, or has blocked it."""


class PushRefusedError(PeerError):
    """The peer takes no cards from this node; it only fetches what it wants."""


class BusyError(FederationError):
    """This node serves as many as it may."""


class AdmissionError(FederationError):
    """This node's policy does not let the card in."""


class TransportError(FederationError):
    """The line failed; what did arrive is not at fault."""


class PeerUnreachableError(TransportError):
    """The peer does not answer."""


class TransferError(TransportError):
    """A transfer broke off; nothing of it was kept."""


class DiscoveryError(FederationError):
    """Peers cannot be looked for on this network."""


__all__ = [
    "AdmissionError",
    "BusyError",
    "CopiedHomeError",
    "DiscoveryError",
    "FederationError",
    "IdentityError",
    "NotApprovedError",
    "PeerError",
    "PeerUnreachableError",
    "ProtocolError",
    "PushRefusedError",
    "TransferError",
    "TransportError",
]
