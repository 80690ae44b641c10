"""Peers: finding other nodes, comparing inventories, and copying cards that are verified before anyone sees them."""

from __future__ import annotations

from federation.client import LoRAFlightClient, probe
from federation.diff import missing
from federation.discovery import Discovery, browse
from federation.errors import (
    DiscoveryError,
    FederationError,
    PeerError,
    PeerUnreachableError,
    TransferError,
    TransportError,
)
from federation.peer import Peer, parse_address
from federation.server import LoRAFlightServer
from federation.sync import PeerReport, SyncMemory, SyncProgress, SyncReport, sync
from federation.wire import PROTOCOL_VERSION, Health, InventoryEntry

__all__ = [
    "PROTOCOL_VERSION",
    "Discovery",
    "DiscoveryError",
    "FederationError",
    "Health",
    "InventoryEntry",
    "LoRAFlightClient",
    "LoRAFlightServer",
    "Peer",
    "PeerError",
    "PeerReport",
    "PeerUnreachableError",
    "SyncMemory",
    "SyncProgress",
    "SyncReport",
    "TransferError",
    "TransportError",
    "browse",
    "missing",
    "parse_address",
    "probe",
    "sync",
]
