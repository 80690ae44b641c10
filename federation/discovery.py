"""Finding nodes by multicast DNS (RFC 6762, RFC 6763). The only user of zeroconf, and of its ifaddr.

An announcement is a hint of where a node may be, nothing more: anybody on the network can send one. Who really
answers there, and whether anybody does, is found out by a health probe. The catalog is never announced.
"""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Self

import ifaddr
from zeroconf import Error as ZeroconfError
from zeroconf import IPVersion, ServiceBrowser, ServiceInfo, Zeroconf

from federation.errors import DiscoveryError
from federation.interfaces import Interface, choose, kind_of
from federation.peer import Peer, is_loopback
from federation.wire import PROTOCOL_VERSION, SERVICE_TYPE
from registry.logs import get_logger

_log = get_logger(__name__)
_LOOPBACK = "127.0.0.1"
_RESOLVE_TIMEOUT_MS = 1500
_NODE_ID = re.compile(r"[0-9a-f]{32}")
_NAME_CHARS = 30  # with the id and a dash, a DNS label's 63 bytes
_MAX_PEERS = 1024


class Discovery:
    """Announces a node that serves on `host`:`port`, and collects the others, between `start` and `close`.

    A node on the loopback is announced on the loopback only, one on all addresses on `interfaces` (names or addresses;
    none given: all on which peers may be, see `federation.interfaces`).
    """

    def __init__(
        self, *, node_id: str, name: str, port: int, host: str = _LOOPBACK, interfaces: Sequence[str] = ()
    ) -> None:
        self._node_id, self._name, self._host, self._port = node_id, name, host, port
        self._interfaces = interfaces
        self._found = _Found(ignore=node_id)
        self._stack: ExitStack | None = None

    def start(self) -> None:
        """Announce and begin to look; takes a second or two, for the name is probed first. Raises `DiscoveryError`."""
        if self._stack is not None:
            return
        with ExitStack() as stack:
            addresses = addresses_of(self._host, self._interfaces)
            if not addresses:
                raise DiscoveryError(
                    "no network interface to look for peers on: there are only those of this machine, of containers "
                    "and of VPNs",
                    hint="name one with the setting `interfaces`, or peers with --peer HOST:PORT",
                )
            zeroconf = _open(stack, addresses)
            info = _announcement(self._node_id, self._name, addresses, self._port)
            try:
                zeroconf.register_service(info, allow_name_change=True)
            except (ZeroconfError, OSError) as error:
                raise DiscoveryError(f"cannot announce this node: {str(error) or type(error).__name__}") from error
            _browse(stack, zeroconf, self._found)
            self._stack = stack.pop_all()
        _log.info("discovery_started", instance=info.name, port=self._port)

    def close(self) -> None:
        """Say goodbye, so that peers forget this node at once, and end every thread."""
        stack, self._stack = self._stack, None
        if stack is not None:
            stack.close()

    def peers(self) -> list[Peer]:
        """The nodes announced now, by name; not this one, and none of them proven to be alive."""
        return self._found.peers()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def browse(timeout_s: float, *, node_id: str = "", host: str = "0.0.0.0", interfaces: Sequence[str] = ()) -> list[Peer]:
    """The nodes that answer within `timeout_s`, without announcing anything; not `node_id`. Raises `DiscoveryError`.

    `host` and `interfaces`: where to look, as for `Discovery`.
    """
    found = _Found(ignore=node_id)
    with ExitStack() as stack:
        _browse(stack, _open(stack, addresses_of(host, interfaces)), found)
        time.sleep(timeout_s)
    return found.peers()


class _Found:
    """What zeroconf's browser thread found, by instance name."""

    def __init__(self, *, ignore: str) -> None:
        self._ignore = ignore
        self._lock = threading.Lock()
        self._peers: dict[str, Peer] = {}

    def peers(self) -> list[Peer]:
        with self._lock:
            unique = {(peer.node_id, peer.address): peer for peer in self._peers.values()}
        return sorted(unique.values(), key=lambda peer: (peer.name, peer.address))

    def add_service(self, zeroconf: Zeroconf, kind: str, instance: str) -> None:
        info = zeroconf.get_service_info(kind, instance, timeout=_RESOLVE_TIMEOUT_MS)
        peer = None if info is None else _peer_of(info)
        if peer is None:
            _log.info("announcement_ignored", instance=instance, resolved=info is not None)
            return
        with self._lock:
            if peer.node_id != self._ignore and (instance in self._peers or len(self._peers) < _MAX_PEERS):
                self._peers[instance] = peer

    def update_service(self, zeroconf: Zeroconf, kind: str, instance: str) -> None:
        self.add_service(zeroconf, kind, instance)

    def remove_service(self, zeroconf: Zeroconf, kind: str, instance: str) -> None:
        with self._lock:
            self._peers.pop(instance, None)


def _open(stack: ExitStack, addresses: Sequence[str]) -> Zeroconf:
    """On the interfaces with these addresses, and on the loopback, for other nodes of this machine."""
    try:
        zeroconf = Zeroconf(interfaces=sorted({_LOOPBACK, *addresses}), ip_version=IPVersion.V4Only)
    except (ZeroconfError, OSError) as error:
        raise DiscoveryError(
            f"multicast DNS is not possible here: {error}", hint="name peers yourself: --peer HOST:PORT"
        ) from error
    stack.callback(zeroconf.close)
    return zeroconf


def _browse(stack: ExitStack, zeroconf: Zeroconf, found: _Found) -> None:
    browser = ServiceBrowser(zeroconf, SERVICE_TYPE, found)  # type: ignore[arg-type]  # a listener by its methods
    stack.callback(browser.cancel)


def _announcement(node_id: str, name: str, addresses: Sequence[str], port: int) -> ServiceInfo:
    """The service to register; its instance name is unique because the node's id is in it."""
    label = re.sub(r"[^A-Za-z0-9_-]+", "-", name)[:_NAME_CHARS].strip("-") or "node"
    return ServiceInfo(
        SERVICE_TYPE,
        f"{label}-{node_id}.{SERVICE_TYPE}",
        port=port,
        properties={"id": node_id, "port": str(port), "proto": str(PROTOCOL_VERSION)},
        server=f"arrowmoe-{node_id}.local.",
        parsed_addresses=list(addresses),
    )


def addresses_of(host: str, interfaces: Sequence[str] = ()) -> list[str]:
    """The IPv4 addresses of this machine under which peers may reach a server on `host`. Raises `DiscoveryError`."""
    if is_loopback(host):
        return [_LOOPBACK]
    if host in ("0.0.0.0", "::", ""):
        return _chosen(interfaces)
    try:
        return sorted({str(place[4][0]) for place in socket.getaddrinfo(host, None, socket.AF_INET)})
    except OSError as error:
        raise DiscoveryError(f"expected an address to announce, got {host!r}: {error}") from error


def _chosen(wanted: Sequence[str]) -> list[str]:
    choice = choose(interfaces_here(), wanted)
    _log.info("interfaces_chosen", addresses=choice.addresses, skipped=dict(choice.skipped))
    return sorted(set(choice.addresses))


def interfaces_here() -> list[Interface]:
    """The network interfaces of this machine."""
    return [
        Interface(
            name=adapter.nice_name,
            addresses=tuple(str(place.ip) for place in adapter.ips if place.is_IPv4),
            kind=kind_of(adapter.nice_name),
        )
        for adapter in ifaddr.get_adapters()
    ]


def _peer_of(info: ServiceInfo) -> Peer | None:
    """The peer that an announcement means; None if it is not one of ours."""
    txt = info.decoded_properties
    addresses = info.parsed_addresses(IPVersion.V4Only)
    node_id, port = txt.get("id") or "", info.port or 0
    if not (addresses and 0 < port <= 65_535 and _NODE_ID.fullmatch(node_id)):
        return None
    if txt.get("proto") != str(PROTOCOL_VERSION) or txt.get("port") != str(port):
        return None
    name = info.name.removesuffix(f".{SERVICE_TYPE}").partition(f"-{node_id}")[0]
    return Peer(host=addresses[0], port=port, node_id=node_id, name=name[:_NAME_CHARS], source="mdns")


__all__ = ["Discovery", "browse", "interfaces_here"]
