from __future__ import annotations

import pytest

from federation.errors import FederationError
from federation.peer import Peer, is_loopback, parse_address


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:7420", ("127.0.0.1", 7420)),
        (" node-b.local:1 ", ("node-b.local", 1)),
        ("[::1]:65535", ("::1", 65535)),
    ],
)
def test_addresses_that_are_understood(text: str, expected: tuple[str, int]) -> None:
    assert parse_address(text) == expected
    assert parse_address(Peer.at(text).address) == expected


@pytest.mark.parametrize(
    "text",
    ["", "host", ":1", "host:", "host:0", "host:65536", "host:x", "host:-1", "::1:80", "a b:1", "grpc://h:1", "h:１"],
)
def test_addresses_that_are_refused(text: str) -> None:
    with pytest.raises(FederationError, match="expected a"):
        parse_address(text)


def test_a_peer_that_cannot_be_is_refused() -> None:
    for host, port in (("a b", 1), ("", 1), ("host", 0), ("host", 70_000)):
        with pytest.raises(FederationError):
            Peer(host=host, port=port)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "localhost", "::1", "[::1]"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org", "localhost.example.org", ""])
def test_not_loopback(host: str) -> None:
    assert not is_loopback(host)
