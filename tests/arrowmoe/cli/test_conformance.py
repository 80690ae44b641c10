"""`arrowmoe conformance`: what people and programs see of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from federation.credentials import Credentials
from federation.server import LoRAFlightServer
from registry.store import Registry
from tests.arrowmoe.cli.conftest import Cli
from tests.registry.cards import small_card


@pytest.fixture
def theirs(tmp_path: Path) -> Iterator[Registry]:
    with Registry.open(tmp_path / "theirs") as registry:
        registry.publish(small_card("poet"))
        yield registry


def serving(registry: Registry, host: str = "127.0.0.1", *, plaintext: bool = False) -> LoRAFlightServer:
    credentials = None if plaintext else Credentials.of(registry.identity)
    return LoRAFlightServer(registry, node_id=registry.identity.id, name="theirs", host=host, credentials=credentials)


def test_a_good_server(cli: Cli, theirs: Registry) -> None:
    with serving(theirs) as server:
        done = cli("conformance", server.address)
        told = cli("conformance", server.address, "--json").json
        quiet = cli("conformance", server.address, "--quiet")
    assert done.code == 0
    assert "passed      health (health): exactly one JSON object" in done.out
    assert ", 0 failed, " in done.out
    assert (told["ok"], told["node_id"], told["refusal"]) == (True, theirs.identity.id, None)
    assert {"name", "section", "expected", "outcome", "got"} == set(told["findings"][0])
    assert (quiet.code, quiet.out) == (0, "")


def test_what_fails_is_said_with_what_came(cli: Cli, theirs: Registry) -> None:
    with serving(theirs, plaintext=True) as server:
        done = cli("conformance", server.address)
        quiet = cli("conformance", server.address, "--quiet")
        plain = cli("conformance", server.address, "--plaintext")
    assert done.code == 1
    assert "failed      certificate (Who is who)" in done.out
    assert "→ got " in done.out
    assert quiet.out == "certificate\n"
    assert plain.code == 0


def test_a_server_that_waits_for_approval_comes_with_what_to_do(cli: Cli, theirs: Registry) -> None:
    with serving(theirs, "0.0.0.0") as server:
        done = cli("conformance", f"127.0.0.1:{server.port}", "--json")
    assert done.code == 1
    assert json.loads(done.out)["ok"] is False
    assert "does not answer this node" in done.err
    assert "arrowmoe peers approve" in done.err


def test_what_is_no_address(cli: Cli) -> None:
    done = cli("conformance", "nowhere")
    assert done.code == 1
    assert "HOST:PORT" in done.err
