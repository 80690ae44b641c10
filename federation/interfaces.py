"""On which network interfaces other nodes may be: not on those of containers, virtual machines and VPNs.

Their multicast reaches nobody, and an announced address of theirs sends peers astray. An interface is judged by its
name and, on Linux, by what the kernel says of it (`Documentation/ABI/testing/sysfs-class-net`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from federation.errors import DiscoveryError
from federation.peer import is_loopback

Kind = Literal["network", "bridge", "tunnel"]
_SYSFS = Path("/sys/class/net")
_TUNNEL_TYPES = {"512", "768", "769", "776", "778", "65534"}
"""ARPHRD_PPP, _TUNNEL, _TUNNEL6, _SIT, _IPGRE and _NONE (if_arp.h), the last of tun and WireGuard devices."""

_VIRTUAL = re.compile(
    r"docker|podman|cni|flannel|cali|weave|kube|lxc|lxd|incus|br-[0-9a-f]{12}|veth|virbr|vmnet|vboxnet|vnet\d|tap"
    r"|vEthernet|VirtualBox|VMware|Hyper-V",
    re.IGNORECASE,
)
_VPN = re.compile(r"tun|utun|wg|ppp|ipsec|tailscale|zt|nordlynx|proton|ham\d|awdl|llw", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Interface:
    """A network interface of this machine: what it is called, its IPv4 addresses, what it is to the kernel."""

    name: str
    addresses: tuple[str, ...]
    kind: Kind = "network"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The addresses to look for nodes on, and why each other interface is not looked at."""

    addresses: tuple[str, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)


def choose(interfaces: Iterable[Interface], wanted: Sequence[str] = ()) -> Choice:
    """Those of `interfaces` on which peers may be, or those that are `wanted` by name or address.

    Raises `DiscoveryError` for a wanted one that is not there.
    """
    here = [interface for interface in interfaces if interface.addresses]
    if wanted:
        return Choice(addresses=tuple(address for text in wanted for address in _named(here, text)))
    reasons = {interface.name: _why_not(interface) for interface in here}
    chosen = [interface for interface in here if reasons[interface.name] is None]
    skipped = {name: reason for name, reason in reasons.items() if reason is not None}
    return Choice(addresses=tuple(address for interface in chosen for address in interface.addresses), skipped=skipped)


def kind_of(name: str, sysfs: Path = _SYSFS) -> Kind:
    """What the kernel says of an interface; "network" where it says nothing, as on other systems than Linux."""
    device = sysfs / name
    if (device / "tun_flags").exists() or _read(device / "type") in _TUNNEL_TYPES:
        return "tunnel"
    if (device / "bridge").is_dir() and not _has_hardware(sysfs, device):
        return "bridge"
    return "network"


def _has_hardware(sysfs: Path, bridge: Path) -> bool:
    """Whether a bridge leads out of this machine: a real card is one of its ports."""
    return any((sysfs / port.name / "device").exists() for port in bridge.glob("brif/*"))


def _why_not(interface: Interface) -> str | None:
    if all(map(is_loopback, interface.addresses)):
        return "loopback"
    if interface.kind == "bridge" or _VIRTUAL.match(interface.name):
        return "of containers or virtual machines"
    if interface.kind == "tunnel" or _VPN.match(interface.name):
        return "a VPN"
    return None


def _named(interfaces: Collection[Interface], text: str) -> tuple[str, ...]:
    for interface in interfaces:
        if text == interface.name:
            return interface.addresses
        if text in interface.addresses:
            return (text,)
    names = ", ".join(interface.name for interface in interfaces)
    raise DiscoveryError(
        f"expected an interface or one of its addresses, got {text!r}", hint=f"there are {names or 'none'}"
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


__all__ = ["Choice", "Interface", "Kind", "choose", "kind_of"]
