"""Pushes one card of a home to a server, slowly, until it is there or the process is killed.

python -m tests.federation.pusher HOME ADDRESS DIGEST BYTES_PER_S
"""

from __future__ import annotations

import sys
from pathlib import Path

from federation.client import LoRAFlightClient
from federation.credentials import Credentials
from federation.pace import Pace
from federation.pushing import push
from registry.store import Registry


def main(home: str, address: str, digest: str, bytes_per_s: str) -> None:
    with Registry.open(Path(home)) as registry:
        credentials = Credentials.of(registry.identity)
        with LoRAFlightClient(address, credentials=credentials) as client:
            client.health()
            print("begun", flush=True)
            (pushed,) = push(client, [registry.get(digest)], pace=Pace(float(bytes_per_s)))
            print(pushed.error or "pushed", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
