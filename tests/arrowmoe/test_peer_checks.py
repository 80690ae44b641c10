"""Why no peer is seen, cause by cause."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from arrowmoe import peer_checks
from arrowmoe.checks import Check
from arrowmoe.node import Node
from arrowmoe.settings import Settings
from federation.errors import NotApprovedError, PeerUnreachableError, ProtocolError
from federation.peer import Peer
from registry.store import Registry
from tests.registry.cards import small_card

PEER = Peer.at("192.0.2.9:7420")
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def checks(home: Path, *addresses: str, **changes: object) -> list[Check]:
    """Those of peers; nobody is looked for."""
    settings = Settings(home=home, discovery=False, peers=addresses, **changes)  # type: ignore[arg-type]
    return [check for check in peer_checks.examine(settings, multicast=True) if check.name.startswith("peer")]


@pytest.fixture
def silent_port() -> Iterator[int]:
    """Takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_a_live_peer_is_ok(home: Path, make_home: Callable[[str], Path]) -> None:
    with Node(Settings(home=make_home("other"), name="other", discovery=False)) as other:
        address = other.record.address
        assert checks(home, address) == [Check(name=f"peer {address}", status="ok", detail="its port is open")]
        Registry.open(home).close()
        assert checks(home, address) == [Check(name=f"peer {address}", status="ok", detail="other")]


def test_a_closed_port_is_told(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    [check] = checks(home, f"127.0.0.1:{port}")
    assert (check.status, "nothing listens on that port" in check.detail) == ("warn", True)


def test_another_program_on_the_port_is_told(silent_port: int) -> None:
    peer = Peer.at(f"127.0.0.1:{silent_port}")
    check = peer_checks.diagnosis(peer, PeerUnreachableError("no answer"), peer_checks.knock(peer))
    assert (check.status, "does not answer as a node" in check.detail) == ("warn", True)


def test_a_host_that_is_none_is_told() -> None:
    assert peer_checks.knock(Peer.at("no-such-host.invalid:1")) == "nowhere"


@pytest.mark.parametrize(
    "error",
    [
        NotApprovedError("pending approval there", hint="on that node run `arrowmoe peers approve ID`"),
        ProtocolError("expected protocol version 2, got 1", hint="run the same release"),
    ],
)
def test_what_a_peer_said_itself_is_told_with_what_to_do(error: NotApprovedError | ProtocolError) -> None:
    check = peer_checks.diagnosis(PEER, error, "open")
    assert (check.status, check.detail, check.hint) == ("warn", str(error), error.hint)


def test_a_running_node_is_asked(home: Path, make_home: Callable[[str], Path]) -> None:
    with Node(Settings(home=make_home("other"), name="other", discovery=False)) as other:
        named = (other.record.address, "127.0.0.1:1")
        with Node(Settings(home=home, discovery=False, peers=named)):
            alive, dead = checks(home)
    assert (alive.status, alive.detail) == ("ok", "other")
    assert (dead.status, "nothing listens" in dead.detail) == ("warn", True)


@pytest.mark.parametrize(("multicast", "why"), [(True, "none announced itself"), (False, "without multicast")])
def test_nobody_at_all_is_told(home: Path, monkeypatch: pytest.MonkeyPatch, multicast: bool, why: str) -> None:
    monkeypatch.setattr(peer_checks, "BROWSE_S", 0.05)
    monkeypatch.setattr(peer_checks, "browse", lambda timeout_s, interfaces: [])
    found = list(peer_checks.examine(Settings(home=home), multicast=multicast))
    assert [(check.name, check.status) for check in found if why in check.detail] == [("peers", "warn")]


def test_an_interface_that_is_not_there_is_told(home: Path) -> None:
    settings = Settings(home=home, discovery=False, interfaces=("eth77",))
    [check] = [check for check in peer_checks.examine(settings, multicast=True) if check.name == "interfaces"]
    assert (check.status, "'eth77'" in check.detail) == ("fail", True)


def test_a_clock_that_went_back_is_told(home: Path) -> None:
    with Registry.open(home) as registry:
        entry = replace(registry.publish(small_card()), added_at=NOON)
    assert peer_checks.clock([], NOON).status == "ok"
    assert peer_checks.clock([entry], NOON).status == "ok"
    assert peer_checks.clock([entry], NOON + timedelta(days=3650)).status == "ok"
    told = peer_checks.clock([entry], NOON - timedelta(days=3650))
    assert (told.status, "2026-01-01" in told.detail) == ("warn", True)
