"""Which interfaces are looked at: names as tools give them, and kinds as Linux shows them under /sys/class/net."""

from __future__ import annotations

from pathlib import Path

import pytest

from federation.errors import DiscoveryError
from federation.interfaces import Interface, Kind, choose, kind_of


def at(name: str, address: str = "192.168.1.20", kind: Kind = "network") -> Interface:
    return Interface(name=name, addresses=(address,), kind=kind)


LAN = at("eth0")


@pytest.mark.parametrize("name", ["eth0", "eno1", "enp0s31f6", "wlan0", "wlp2s0", "en0", "br0", "bond0", "Ethernet 2"])
def test_networks_are_looked_at(name: str) -> None:
    assert choose([at(name)]).addresses == ("192.168.1.20",)


@pytest.mark.parametrize(
    "name",
    [
        *("docker0", "docker_gwbridge", "br-0a1b2c3d4e5f", "veth1234abc", "podman0", "cni0", "flannel.1", "cali12ab"),
        *("lxcbr0", "lxdbr0", "kube-ipvs0", "virbr0", "vmnet8", "vboxnet0", "tap0", "vnet3", "vEthernet (WSL)"),
    ],
)
def test_containers_and_machines_are_not(name: str) -> None:
    choice = choose([at(name, "172.17.0.1"), LAN])
    assert choice.addresses == LAN.addresses
    assert choice.skipped == {name: "of containers or virtual machines"}


@pytest.mark.parametrize("name", ["tun0", "utun3", "wg0", "tailscale0", "ztabcdef", "ppp0", "nordlynx"])
def test_vpns_are_not(name: str) -> None:
    choice = choose([at(name, "10.8.0.2"), LAN])
    assert (choice.addresses, choice.skipped) == (LAN.addresses, {name: "a VPN"})


def test_the_kernels_word_counts_where_the_name_says_nothing() -> None:
    choice = choose([at("work", "10.8.0.2", "tunnel"), at("inner", "10.9.0.1", "bridge"), LAN])
    assert choice.addresses == LAN.addresses
    assert choice.skipped == {"work": "a VPN", "inner": "of containers or virtual machines"}


def test_the_owner_may_name_what_would_be_skipped() -> None:
    interfaces = [at("wg0", "10.8.0.2"), at("lo", "127.0.0.1"), LAN]
    assert choose(interfaces, ["wg0"]).addresses == ("10.8.0.2",)
    assert choose(interfaces, ["192.168.1.20", "lo"]).addresses == ("192.168.1.20", "127.0.0.1")
    with pytest.raises(DiscoveryError, match="'eth7'") as caught:
        choose(interfaces, ["eth7"])
    assert caught.value.hint == "there are wg0, lo, eth0"


def test_with_nothing_left_it_says_what_was_skipped() -> None:
    choice = choose([at("lo", "127.0.0.1"), at("docker0", "172.17.0.1"), Interface(name="eth1", addresses=())])
    assert choice.addresses == ()
    assert choice.skipped == {"lo": "loopback", "docker0": "of containers or virtual machines"}


def device(sysfs: Path, name: str, *, kind: str = "1", files: tuple[str, ...] = ()) -> None:
    for file in ("type", *files):
        path = sysfs / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{kind}\n")


def test_kinds_as_linux_shows_them(tmp_path: Path) -> None:
    device(tmp_path, "eth0", files=("device/vendor",))
    device(tmp_path, "tun5", kind="65534", files=("tun_flags",))
    device(tmp_path, "vm1", files=("tun_flags",))
    device(tmp_path, "wire", kind="65534")
    device(tmp_path, "modem", kind="512")
    device(tmp_path, "inner", files=("bridge/bridge_id", "brif/veth1/state"))
    device(tmp_path, "outer", files=("bridge/bridge_id", "brif/veth1/state", "brif/eth0/state"))
    kinds = {path.name: kind_of(path.name, tmp_path) for path in tmp_path.iterdir()}
    assert kinds == {
        "eth0": "network",
        "tun5": "tunnel",
        "vm1": "tunnel",
        "wire": "tunnel",
        "modem": "tunnel",
        "inner": "bridge",
        "outer": "network",
    }
    assert kind_of("no such", tmp_path) == "network"
