from __future__ import annotations

import ast
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from zeroconf import ServiceInfo

from federation.discovery import Discovery, _announcement, _peer_of, addresses_of, browse
from federation.peer import Peer
from registry.store import Registry
from tests.federation.conftest import serving

A, B = "a" * 32, "b" * 32
_PROBE = """
import sys, time
from zeroconf import IPVersion, ServiceBrowser, Zeroconf
found = []
class Listener:
    def add_service(self, zc, kind, name):
        info = zc.get_service_info(kind, name, 2000)
        if info: found.append((info.decoded_properties, info.parsed_addresses(), info.port))
    def update_service(self, *_): pass
    def remove_service(self, *_): pass
zc = Zeroconf(interfaces=["127.0.0.1"], ip_version=IPVersion.V4Only)
browser = ServiceBrowser(zc, "_arrowmoe._tcp.local.", Listener())
deadline = time.monotonic() + 6
while not found and time.monotonic() < deadline: time.sleep(0.05)
browser.cancel(); zc.close()
print(found)
"""


def soon(condition: Callable[[], bool], timeout_s: float = 6.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


@pytest.fixture(scope="module")
def multicast() -> None:
    """Skips where multicast on the loopback does not work: checked with python-zeroconf alone."""
    register = """
import socket, time
from zeroconf import IPVersion, ServiceInfo, Zeroconf
a = Zeroconf(interfaces=["127.0.0.1"], ip_version=IPVersion.V4Only)
b = Zeroconf(interfaces=["127.0.0.1"], ip_version=IPVersion.V4Only)
kind = "_probe._tcp.local."
a.register_service(ServiceInfo(kind, "x." + kind, port=9, parsed_addresses=["127.0.0.1"], server="x.local."))
print("seen" if b.get_service_info(kind, "x." + kind, 3000) else "unseen")
a.close(); b.close()
"""
    said = subprocess.run([sys.executable, "-c", register], capture_output=True, text=True, timeout=60, check=False)
    if "seen" not in said.stdout.split():
        pytest.skip(f"no multicast on the loopback here: {(said.stderr or said.stdout).strip()[-200:]}")


@pytest.mark.network
@pytest.mark.usefixtures("multicast")
class TestOnTheLoopback:
    def test_python_zeroconf_in_another_process_sees_a_node(self) -> None:
        with Discovery(node_id=A, name="Anna's node", port=7420):
            said = subprocess.run(
                [sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=30, check=True
            )
        found = [entry for entry in ast.literal_eval(said.stdout) if entry[0]["id"] == A]
        assert found == [({"id": A, "port": "7420", "proto": "2"}, ["127.0.0.1"], 7420)]

    def test_two_nodes_see_each_other_and_a_goodbye(self) -> None:
        with Discovery(node_id=A, name="anna", port=7001) as anna:
            with Discovery(node_id=B, name="bert", port=7002) as bert:
                assert soon(lambda: of(anna.peers(), B) and of(bert.peers(), A))
                assert of(anna.peers(), B) == [Peer(host="127.0.0.1", port=7002, node_id=B, name="bert", source="mdns")]
                assert of(bert.peers(), A) == [Peer(host="127.0.0.1", port=7001, node_id=A, name="anna", source="mdns")]
                assert not of(anna.peers(), A)
            assert soon(lambda: not of(anna.peers(), B))

    def test_browse_finds_a_node_of_another_process_and_not_itself(self, theirs: Registry, tmp_path: Path) -> None:
        with serving(tmp_path / "theirs", "--announce") as other:
            (peer,) = of(browse(2.5, host="127.0.0.1"), other.node_id)
            assert (peer.node_id, peer.port, peer.source) == (other.node_id, other.port, "mdns")
            assert not of(browse(1.5, node_id=other.node_id, host="127.0.0.1"), other.node_id)

    def test_starting_and_closing_twice_is_harmless(self) -> None:
        discovery = Discovery(node_id=A, name="anna", port=7001)
        discovery.start()
        discovery.start()
        discovery.close()
        discovery.close()
        assert not of(discovery.peers(), A)


def of(peers: list[Peer], node_id: str) -> list[Peer]:
    """Those of one node: others may run on this machine."""
    return [peer for peer in peers if peer.node_id == node_id]


def test_an_announcement_fits_dns_whatever_the_name() -> None:
    for name in ("", "a.b/c", "Ünïcode " * 40, "-", "x" * 200):
        info = _announcement(A, name, ["127.0.0.1"], 1)
        assert len(info.name.split(".")[0].encode()) <= 63
        assert all(len(key) + 1 + len(value or b"") <= 255 for key, value in info.properties.items())
        assert set(info.decoded_properties) == {"id", "port", "proto"}
        assert _peer_of(info) is not None


@pytest.mark.parametrize(
    "change",
    [{"id": "x"}, {"id": A.upper()}, {"proto": "1"}, {"proto": None}, {"port": "2"}, {"id": "../" + A[3:]}],
)
def test_an_announcement_that_is_not_ours_is_ignored(change: dict[str, str | None]) -> None:
    good = {"id": A, "port": "1", "proto": "2"}
    kind = "_arrowmoe._tcp.local."
    for properties, expected in ((good, True), (good | change, False)):
        info = ServiceInfo(kind, f"n-{A}.{kind}", port=1, properties=properties, parsed_addresses=["127.0.0.1"])
        assert (_peer_of(info) is not None) is expected


def test_addresses_to_announce() -> None:
    assert addresses_of("127.0.0.1") == addresses_of("localhost") == ["127.0.0.1"]
    assert addresses_of("192.0.2.7") == ["192.0.2.7"]
    assert not any(address.startswith("127.") for address in addresses_of("0.0.0.0"))
