"""A peer: where another node may be, and what is believed about it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Literal

from federation.errors import FederationError

_NODE_ID = re.compile(r"[0-9a-f]{32}")
_GROUP = 4


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Another node's place. `node_id` and `name` are empty until the node itself, or its announcement, told them.

    Raises `FederationError` for a host or port that cannot be one.
    """

    host: str
    port: int
    node_id: str = ""
    name: str = ""
    source: Literal["static", "mdns", "book"] = "static"

    def __post_init__(self) -> None:
        parse_address(self.address)

    @classmethod
    def at(cls, address: str) -> Peer:
        """The peer that a user named as ``HOST:PORT``. Raises `FederationError`."""
        host, port = parse_address(address)
        return cls(host=host, port=port)

    @property
    def address(self) -> str:
        """``HOST:PORT``, with brackets around an IPv6 host."""
        return format_address(self.host, self.port)

    def __str__(self) -> str:
        return f"{self.name} ({self.address})" if self.name else self.address


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT`` or ``[IPV6]:PORT``. Raises `FederationError`."""
    host, separator, port = text.strip().rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not separator or not host or (":" in host and not bracketed) or any(c.isspace() or c == "/" for c in host):
        raise FederationError(f"expected a peer as HOST:PORT, got {text!r}", hint="for example 192.168.1.20:7420")
    if not (port.isascii() and port.isdigit() and 0 < int(port[:6]) <= 65_535):
        raise FederationError(f"expected a port from 1 to 65535 in {text!r}, got {port!r}")
    return host.strip("[]"), int(port)


def format_address(host: str, port: int) -> str:
    """``HOST:PORT``, with brackets around an IPv6 host."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def shown_id(node_id: str) -> str:
    """A node id in groups that people can compare: ``1234-abcd-…``."""
    return "-".join(node_id[start : start + _GROUP] for start in range(0, len(node_id), _GROUP))


def parse_id(text: str) -> str:
    """The node id that a user wrote, in groups or not. Raises `FederationError`."""
    node_id = re.sub(r"[\s-]", "", text).lower()
    if not _NODE_ID.fullmatch(node_id):
        raise FederationError(
            f"expected a node id of 32 hex digits, got {text!r:.100}", hint="`arrowmoe node id` prints a node's own"
        )
    return node_id


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`. A name other than ``localhost`` is taken to be reachable."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


__all__ = ["Peer", "format_address", "is_loopback", "parse_address", "parse_id", "shown_id"]
