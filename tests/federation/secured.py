"""Servers and clients that prove who they are, and some that only pretend to."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import flight

from federation import handshake, wire
from federation.client import LoRAFlightClient
from federation.credentials import Credentials, pem_of
from federation.server import LoRAFlightServer
from registry.store import Registry
from tests.federation.certificates import Made

ANYWHERE = "0.0.0.0"


def secured(registry: Registry, *, host: str = "127.0.0.1", port: int = 0, open: bool = False) -> LoRAFlightServer:
    credentials = Credentials.of(registry.identity)
    return LoRAFlightServer(
        registry,
        node_id=registry.identity.id,
        name="theirs",
        host=host,
        port=port,
        open=open,
        credentials=credentials,
    )


def client_of(
    server: LoRAFlightServer | int, asks: Credentials | None, node_id: str = "", timeout_s: float = 5
) -> LoRAFlightClient:
    port = server if isinstance(server, int) else server.port
    return LoRAFlightClient(f"127.0.0.1:{port}", credentials=asks, node_id=node_id, timeout_s=timeout_s)


@dataclass(frozen=True, kw_only=True)
class Impostor:
    port: int
    heard: list[bytes]


@contextmanager
def impostor(shows: Made) -> Iterator[Impostor]:
    """A Flight server behind any certificate; `heard` are the tokens that it was sent."""
    heard: list[bytes] = []

    class Auth(flight.ServerAuthHandler):  # type: ignore[misc]
        def is_valid(self, token: bytes) -> str:
            heard.append(token)
            return ""

    class Server(flight.FlightServerBase):  # type: ignore[misc]
        def do_action(self, context: Any, action: Any) -> Iterator[bytes]:
            health = {"node_id": "0" * 32, "name": "x", "protocol": wire.PROTOCOL_VERSION, "cards": 0, "state": ""}
            return iter([json.dumps(health | {"index_id": "0" * 32, "last": 0}).encode()])

    server = Server(
        "grpc+tls://127.0.0.1:0",
        auth_handler=Auth(),
        tls_certificates=[(pem_of(shows.certificate), shows.private_key)],
    )
    try:
        yield Impostor(port=server.port, heard=heard)
    finally:
        server.shutdown()


@contextmanager
def eavesdropper(target: int) -> Iterator[tuple[int, list[bytes]]]:
    """A port before `target` that keeps what passes in both directions."""
    heard: list[bytes] = []
    threads: list[threading.Thread] = []

    def pump(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                heard.append(data)
                sink.sendall(data)
        except OSError:
            pass
        finally:
            for end in (source, sink):
                try:
                    end.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue

    def accept() -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            far = stack.enter_context(socket.create_connection(("127.0.0.1", target)))
            stack.enter_context(near)
            for ends in ((near, far), (far, near)):
                threads.append(threading.Thread(target=pump, args=ends, daemon=True))
                threads[-1].start()

    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        accepting = threading.Thread(target=accept, daemon=True)
        accepting.start()
        yield listener.getsockname()[1], heard
        listener.shutdown(socket.SHUT_RDWR)
        accepting.join(5)
    for thread in threads:
        thread.join(5)


@contextmanager
def serving_tls(home: Path) -> Iterator[int]:
    """A process that serves `home` with credentials."""
    script = (
        "import sys; from federation.credentials import Credentials; from federation.server import LoRAFlightServer\n"
        "from registry.store import Registry\n"
        "with Registry.open(sys.argv[1]) as registry, LoRAFlightServer(registry, node_id=registry.identity.id,\n"
        "        name='other', credentials=Credentials.of(registry.identity)) as server:\n"
        "    print(server.port, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(home)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield int(process.stdout.readline())
        process.stdin.close()
        assert process.wait(10) == 0


def binding_of(credentials: Credentials) -> bytes:
    """The extension's value, copied out of a certificate."""
    at = credentials.certificate.index(credentials.identity.public_key)
    return credentials.certificate[at : at + 96]


def raw_client(server: LoRAFlightServer, headers: list[tuple[bytes, bytes]]) -> Callable[[str], list[bytes]]:
    """A caller of our own making, which sends what it likes."""
    shown = handshake.certificate_at("127.0.0.1", server.port, timeout_s=5)
    client = flight.FlightClient(
        f"grpc+tls://127.0.0.1:{server.port}",
        tls_root_certs=pem_of(shown),
        override_hostname="arrowmoe.invalid",
        generic_options=[("grpc.use_local_subchannel_pool", 1)],
    )
    options = flight.FlightCallOptions(timeout=5, headers=headers)
    return lambda action: [bytes(result.body) for result in client.do_action(action, options)]
