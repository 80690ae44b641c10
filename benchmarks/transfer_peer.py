"""The other side of `benchmarks.transfer`, in a process of its own: every way to give the cards of one home.

    python -m benchmarks.transfer_peer HOME

Prints one JSON line with ports, and serves until its standard input ends.
"""

from __future__ import annotations

import json
import mmap
import socket
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

from federation.credentials import Credentials
from federation.server import LoRAFlightServer
from registry.digest import Digest
from registry.store import Registry

_DIGEST_BYTES = 71


def main(home: Path) -> None:
    """Serve the cards of `home`."""
    with ExitStack() as stack:
        registry = stack.enter_context(Registry.open(home))
        node_id = registry.identity.id
        plaintext = LoRAFlightServer(registry, node_id=node_id, name="peer")
        tls = LoRAFlightServer(registry, node_id=node_id, name="peer", credentials=Credentials.of(registry.identity))
        ports = {
            "plaintext": stack.enter_context(plaintext).port,
            "tls": stack.enter_context(tls).port,
            "socket": serve_socket(registry),
        }
        print(json.dumps({"node_id": node_id, **ports}), flush=True)
        sys.stdin.read()


def serve_socket(registry: Registry) -> int:
    """A listening socket that answers a digest with the bytes of the card's file, and nothing else; its port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            connection, _ = listener.accept()
            with connection:
                digest = Digest(connection.recv(_DIGEST_BYTES, socket.MSG_WAITALL).decode())
                with registry.path_of(digest).open("rb") as file:
                    connection.sendall(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    threading.Thread(target=serve, daemon=True).start()
    return int(listener.getsockname()[1])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
