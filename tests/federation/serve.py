"""A node's server in a process of its own: prints one JSON line, serves until its standard input ends.

python -m tests.federation.serve HOME [--announce] [--secured] [--takes-pushes]
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path

from federation.admission import Policy
from federation.credentials import Credentials
from federation.discovery import Discovery
from federation.entrance import Entrance
from federation.server import LoRAFlightServer
from federation.uploads import Uploads
from registry.store import Registry


def main(home: str, *options: str) -> None:
    with ExitStack() as stack:
        registry = stack.enter_context(Registry.open(Path(home)))
        node_id = registry.identity.id
        credentials = Credentials.of(registry.identity) if "--secured" in options else None
        uploads = Uploads(registry, Entrance(registry, Policy()), accepts=lambda _: "--takes-pushes" in options)
        server = stack.enter_context(
            LoRAFlightServer(registry, node_id=node_id, name="other", credentials=credentials, uploads=uploads)
        )
        if "--announce" in options:
            stack.enter_context(Discovery(node_id=node_id, name="other", port=server.port))
        print(json.dumps({"port": server.port, "id": node_id}), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
