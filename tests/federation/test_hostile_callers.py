"""A node under attack, in a process whose memory is read: it refuses, and serves an honest peer meanwhile."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from federation import limits
from federation.client import LoRAFlightClient
from federation.credentials import Credentials
from federation.handshake import PROOF_HEADER, certificate_at, proof
from registry.digest import Digest
from registry.identity import Identity
from registry.store import Registry
from tests.federation.hostile import Hostile
from tests.registry.cards import module_shapes, small_card

CEILING_BYTES = 96 << 20
"""What no attack here makes a node grow by; for all limits at once docs/security.md has the ceilings."""

HEALTH = b"\x0a\x06health"
"""Flight's Action as protobuf: field 1, its type."""


@dataclass(frozen=True, kw_only=True)
class Attacked:
    """A node in another process, and what an attacker knows of it."""

    pid: int
    port: int
    small: Digest
    large: Digest
    proof: dict[str, bytes]

    def status(self, field: str) -> int:
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field))

    def tensors(self, digest: Digest) -> bytes:
        """The body of a call for a card's tensors."""
        body = json.dumps({"digest": digest}).encode()
        return b"\x0a\x07tensors\x12" + bytes([len(body)]) + body

    def proven(self, source: str = "127.0.0.2", window: int = 65_535) -> Hostile:
        """A connection of a caller that the node knows."""
        hostile = Hostile(self.port, source=source, window=window)
        hostile.call("DoAction", headers=self.proof, body=HEALTH)
        assert hostile.hears(b"node_id")
        return hostile

    def assert_served(self) -> None:
        """An honest peer asks and fetches, and is answered soon."""
        started = time.monotonic()
        with LoRAFlightClient(f"127.0.0.1:{self.port}", credentials=Credentials.of(Identity.generate())) as honest:
            assert honest.health().name == "other"
            assert honest.fetch_skill(self.small).digest == self.small
        assert time.monotonic() - started < 8


@pytest.fixture
def node(theirs: Registry, tmp_path: Path) -> Iterator[Attacked]:
    small = theirs.publish(small_card("poet")).digest
    large = theirs.publish(small_card("large", modules=module_shapes(8, d_in=1 << 18, d_out=8))).digest
    command = [sys.executable, "-m", "tests.federation.serve", str(tmp_path / "theirs"), "--secured", "--takes-pushes"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        port = json.loads(process.stdout.readline())["port"]
        shown = proof(Identity.generate(), certificate_at("127.0.0.1", port, timeout_s=5))
        attacked = Attacked(
            pid=process.pid,
            port=port,
            small=small,
            large=large,
            proof={PROOF_HEADER.decode(): base64.b64encode(shown).rstrip(b"=")},
        )
        attacked.assert_served()
        before = attacked.status("VmRSS")
        yield attacked
        attacked.assert_served()
        grown = (attacked.status("VmHWM") - before) << 10
        assert grown < CEILING_BYTES, f"{grown >> 20} MiB"
        assert attacked.status("Threads") < 2 * limits.MAX_CALLS
        process.stdin.close()
        assert process.wait(15) == 0


@pytest.mark.parametrize("method", ["DoPut", "DoExchange", "DoAction", "DoGet"])
def test_a_message_of_1_9_gb_from_a_stranger(node: Attacked, method: str) -> None:
    with Hostile(node.port) as hostile:
        hostile.call(method)
        hostile.promise(1_900_000_000)
        assert hostile.flood(1_900_000_000) < 32 << 20  # what the sockets on the way took before they heard of it
        node.assert_served()


@pytest.mark.parametrize("method", ["DoPut", "DoAction"])
def test_a_message_of_1_9_gb_from_one_who_has_proven_itself(node: Attacked, method: str) -> None:
    with node.proven() as hostile:
        hostile.call(method, headers=node.proof)
        hostile.promise(1_900_000_000)
        assert hostile.flood(1_900_000_000) < 32 << 20
        node.assert_served()


def test_a_message_of_1_9_gb_from_one_who_may_push(node: Attacked) -> None:
    offer = json.dumps({"digest": "blake3:" + "0" * 64, "manifest_bytes": 1 << 19}).encode()
    with node.proven() as hostile:
        hostile.call("DoAction", headers=node.proof, body=b"\x0a\x04push\x12" + bytes([len(offer)]) + offer)
        assert hostile.hears(b'"kept":false')
        hostile.call("DoAction", headers=node.proof)
        hostile.promise(1_900_000_000)
        assert hostile.flood(1_900_000_000) < 32 << 20
        assert hostile.is_cut()
        node.assert_served()


def test_200_mib_of_metadata(node: Attacked) -> None:
    with Hostile(node.port) as stranger, node.proven() as known:
        for hostile in (stranger, known):
            assert hostile.endless_headers(200 << 20) < 32 << 20
        node.assert_served()


def test_uploads_are_refused_and_take_no_thread(node: Attacked) -> None:
    with node.proven() as hostile:
        assert hostile.calls(300, "DoPut", headers=node.proof) == 300
        assert hostile.hears(b"takes no uploads")
        assert node.status("Threads") < 2 * limits.MAX_CALLS
        node.assert_served()


@pytest.mark.parametrize("method", ["Handshake", "DoAction", "ListFlights", "DoPut"])
def test_calls_that_are_begun_and_never_ended(node: Attacked, method: str) -> None:
    with ExitStack() as stack:
        known = [stack.enter_context(node.proven()) for _ in range(4)]
        for _ in range(8):
            stranger = stack.enter_context(Hostile(node.port, source="127.0.0.2"))
            stranger.calls(200, method)
        for hostile in known:
            assert hostile.calls(300, method, headers=node.proof) == 300
        node.assert_served()
        assert node.status("Threads") < 2 * limits.MAX_CALLS


def test_answers_that_nobody_takes(node: Attacked) -> None:
    with ExitStack() as stack:
        for hostile in [stack.enter_context(node.proven()) for _ in range(4)]:
            hostile.shrink_window()
            assert hostile.calls(150, "DoAction", headers=node.proof, body=HEALTH) == 150
        time.sleep(1)
        node.assert_served()
        assert node.status("Threads") < 2 * limits.MAX_CALLS


def test_500_stalled_readers(node: Attacked) -> None:
    with ExitStack() as stack:
        for count in range(500):
            try:
                hostile = stack.enter_context(Hostile(node.port, source=f"127.0.0.{2 + count % 3}"))
                hostile.call("DoAction", headers=node.proof, body=node.tensors(node.large))
            except OSError:  # refused: the address has its share
                continue
            if count % 50 == 0:
                node.assert_served()
        node.assert_served()


def test_random_bytes(node: Attacked) -> None:
    with ExitStack() as stack:
        for plain in (True, False) * 4:
            hostile = stack.enter_context(Hostile(node.port, plain=plain))
            try:
                hostile.send(os.urandom(4000))
            except OSError:
                continue
            assert hostile.is_cut()
        node.assert_served()


def test_one_that_trickles_into_the_tls_handshake(node: Attacked) -> None:
    with ExitStack() as stack:
        slow = [stack.enter_context(Hostile(node.port, plain=True, source="127.0.0.2")) for _ in range(20)]
        started = time.monotonic()
        for _ in range(5):
            for hostile in slow:
                hostile.trickle()
            time.sleep(0.2)
        node.assert_served()
        assert all(hostile.is_cut(limits.STRANGER_S + 5) for hostile in slow)
        assert time.monotonic() - started < limits.STRANGER_S + 10
