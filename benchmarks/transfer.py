"""Cards from one node to another over the loopback, against a bare socket and against a web server.

    python -m benchmarks.transfer [--rounds 9] [--cards 1000] [--catalog 10000] [--directory DIR]

All arms of a round bring the same card from a process of its own and end with a file that is flushed to the disk.
Ours also verifies every tensor and enters the card into the catalog; the others check nothing. "Socket" is a plain
socket into a file, "web" is `python -m http.server` fetched with httpx2 (httpx's successor) into a file.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import httpx2
import numpy as np

from benchmarks.harness import Arm, Prepared, Target, interleave, report
from federation.board import Holder, Wanted
from federation.client import LoRAFlightClient
from federation.credentials import Credentials
from federation.peer import Peer
from federation.sync import sync
from federation.transfer import transfer
from registry.card import LoRACard
from registry.digest import Digest, hex_of
from registry.entries import CardEntry, Origin
from registry.manifest import AdapterSpec
from registry.store import Registry
from registry.tensor import Role, Tensor

MIB = 1 << 20
LARGE = {f"layers.{n}": (1 << 15, 1 << 15) for n in range(32)}
"""At rank 8 and float32, 64 tensors of 1 MiB."""

SMALL = {"layers.0": (64, 64)}
"""At rank 8 and float32, two tensors of 2 KiB."""

KINDS = ("plaintext", "tls")


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cards", type=int, default=1000, help="small cards to bring")
    parser.add_argument("--catalog", type=int, default=10_000, help="cards that both have when nothing is new")
    parser.add_argument("--directory", type=Path, help="where the homes are made")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        run(Path(directory), options.rounds, options.cards, options.catalog)


def run(directory: Path, rounds: int, cards: int, catalog: int) -> None:
    """One large card in turn with its rivals, then many small ones, then nothing new."""
    ours, theirs = directory / "ours", directory / "theirs"
    with ExitStack() as stack:
        registry = stack.enter_context(Registry.open(ours))
        large, *small = publish(
            theirs, [card_of("large", LARGE), *(card_of(f"small-{n}", SMALL) for n in range(cards))]
        )
        peer = stack.enter_context(serving(theirs))
        times = interleave(large_arms(registry, peer, large, directory, stack), rounds=rounds)
        speeds = {kind: cards / many(registry, holder(registry, peer, kind, stack), small) for kind in KINDS}
    few, many_cards = (nothing_new(directory / f"catalog-{count}", count, rounds) for count in (10, catalog))
    report("transfer", "a bare socket and http.server with httpx2, each into a flushed file", [
        Target(name="verified TLS, speed ÷ bare socket's", value=times.ratio("socket", "tls"), op=">=", bar=0.5),
        Target(name="verified plaintext ÷ bare socket", value=times.ratio("socket", "plaintext"), op=">=", bar=0.7),
        Target(name="small cards per second, TLS", value=speeds["tls"], op=">=", bar=200),
        Target(name=f"nothing new among {catalog} cards (ms)", value=many_cards[0], op="<=", bar=50),
        Target(name="its bytes ÷ those among 10 cards", value=many_cards[1] / few[1], op="<=", bar=1.05),
    ], {
        "ms": {arm: round(1000 * times.median(arm), 1) for arm in times.seconds},
        "socket without a file ÷ TLS": round(times.ratio("socket_to_memory", "tls"), 3),
        "web ÷ TLS": round(times.ratio("web", "tls"), 3),
        "small cards per second": {kind: round(speed) for kind, speed in speeds.items()},
        "nothing new": {"ms": round(many_cards[0], 2), "bytes": many_cards[1], "bytes among 10 cards": few[1]},
    })  # fmt: skip


def card_of(name: str, shapes: dict[str, tuple[int, int]]) -> LoRACard:
    """A card of random weights, rank 8."""
    random = np.random.default_rng([*name.encode()])
    tensors = [
        Tensor.from_numpy(module, role, random.standard_normal(shape, dtype=np.float32))
        for module, (d_in, d_out) in shapes.items()
        for role, shape in ((Role.A, (8, d_in)), (Role.B, (d_out, 8)))
    ]
    spec = AdapterSpec(rank=8, alpha=16, target_modules=tuple(shapes))
    return LoRACard.build(name=name, adapter=spec, tensors=tensors, base_name="random")


def publish(home: Path, cards: Iterable[LoRACard]) -> list[CardEntry]:
    """The cards in a home of their own."""
    with Registry.open(home) as registry:
        return [registry.publish(card) for card in cards]


def nothing_new(directory: Path, count: int, rounds: int) -> tuple[float, int]:
    """Median milliseconds, and bytes on the wire both ways, of a sync of two homes with the same `count` cards."""
    publish(directory / "theirs", (card_of(f"small-{n}", SMALL) for n in range(count)))
    shutil.copytree(directory / "theirs", directory / "ours")
    (directory / "ours" / "identity.key").unlink()
    with ExitStack() as stack:
        ours = stack.enter_context(Registry.open(directory / "ours"))
        peer = stack.enter_context(serving(directory / "theirs"))
        wire = stack.enter_context(Counter(peer["plaintext"]))
        counted, place = (Peer.at(f"127.0.0.1:{port}") for port in (wire.port, peer["plaintext"]))
        sync(ours, [counted])  # hears what there is
        before = wire.nbytes
        if not sync(ours, [counted]).ok:
            raise RuntimeError("the sync failed")
        nbytes = wire.nbytes - before
        return 1000 * interleave({"sync": lambda: sync(ours, [place])}, rounds=rounds).median("sync"), nbytes


def many(ours: Registry, holder: Holder, entries: Sequence[CardEntry]) -> float:
    """Seconds for all of them."""
    forget(ours, *(entry.digest for entry in entries))
    started = time.perf_counter()
    fetch(ours, holder, *entries)
    return time.perf_counter() - started


def large_arms(
    ours: Registry, peer: dict[str, Any], card: CardEntry, directory: Path, stack: ExitStack
) -> dict[str, Arm]:
    """Ours over plaintext and TLS, a bare socket, a web server."""
    http = stack.enter_context(web_server(directory / "theirs" / "cards"))
    path = f"{hex_of(card.digest)[:2]}/{hex_of(card.digest)}.lora.arrow"
    client = stack.enter_context(httpx2.Client(trust_env=False))
    target = directory / "copy"
    arms: dict[str, Arm] = {
        "socket": Prepared(arm=lambda: copy(peer["socket"], card.digest, target), prepare=lambda: target.unlink(True)),
        "socket_to_memory": lambda: copy_to_memory(peer["socket"], card.digest),
        "web": Prepared(arm=lambda: download(client, f"{http}/{path}", target), prepare=lambda: target.unlink(True)),
    }
    for kind in KINDS:
        by = holder(ours, peer, kind, stack)
        arms[kind] = Prepared(arm=lambda by=by: fetch(ours, by, card), prepare=lambda: forget(ours, card.digest))  # type: ignore[misc]
    return arms


def fetch(ours: Registry, holder: Holder, *entries: CardEntry) -> None:
    """Bring the cards into our registry."""
    wanted = [
        Wanted(digest=entry.digest, label=entry.name, nbytes=entry.nbytes, holders=(holder,)) for entry in entries
    ]
    outcomes = transfer(ours, wanted)
    failures = [why for outcome in outcomes for _, why in outcome.failures]
    if failures:
        raise RuntimeError(failures[0])


def forget(ours: Registry, *digests: Digest) -> None:
    """As if the cards had never come."""
    for digest in set(digests) & ours.digests():
        ours.remove(digest)
        ours.unhide(digest)


def copy(port: int, digest: Digest, target: Path) -> None:
    """The card's file through a socket into a flushed file."""
    buffer = memoryview(bytearray(MIB))
    with socket.create_connection(("127.0.0.1", port)) as connection, target.open("xb", buffering=0) as file:
        connection.sendall(digest.encode())
        while count := connection.recv_into(buffer):
            file.write(buffer[:count])
        os.fsync(file.fileno())


def copy_to_memory(port: int, digest: Digest) -> None:
    """The card's file through a socket into a buffer that is used again and again."""
    buffer = memoryview(bytearray(MIB))
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(digest.encode())
        while connection.recv_into(buffer):
            pass


def download(client: httpx2.Client, url: str, target: Path) -> None:
    """The card's file from a web server into a flushed file."""
    with client.stream("GET", url) as response, target.open("xb", buffering=0) as file:
        response.raise_for_status()
        for chunk in response.iter_bytes(MIB):
            file.write(chunk)
        os.fsync(file.fileno())


def holder(ours: Registry, peer: dict[str, Any], kind: str, stack: ExitStack) -> Holder:
    """The peer over plaintext or TLS."""
    address = f"127.0.0.1:{peer[kind]}"
    credentials = Credentials.of(ours.identity) if kind == "tls" else None
    client = LoRAFlightClient(address, credentials=credentials, node_id=peer["node_id"] if credentials else "")
    return Holder(source=stack.enter_context(client), origin=Origin(peer_id=peer["node_id"], address=address))


class Counter:
    """A relay to a port of this machine that counts what passes."""

    def __init__(self, target: int) -> None:
        self.nbytes = 0
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                here, _ = self._listener.accept()
            except OSError:  # closed
                return
            there = socket.create_connection(("127.0.0.1", self._target))
            for ends in ((here, there), (there, here)):
                threading.Thread(target=self._pass, args=ends, daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):  # one end is gone, so the other learns of it
            while data := source.recv(1 << 16):
                self.nbytes += len(data)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)


@contextmanager
def serving(home: Path) -> Iterator[dict[str, Any]]:
    """The other process; what it says of itself."""
    command = [sys.executable, "-m", "benchmarks.transfer_peer", str(home)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())
        process.stdin.close()


@contextmanager
def web_server(directory: Path) -> Iterator[str]:
    """`python -m http.server` on a directory; its URL."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(directory)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_for(port)
        yield f"http://127.0.0.1:{port}"
        process.terminate()


def wait_for(port: int) -> None:
    """Until somebody listens."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise RuntimeError(f"nobody listens on port {port}")


if __name__ == "__main__":
    main()
