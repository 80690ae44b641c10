"""One sync in a process of its own; prints what became of each peer and how far its memory rose.

python -m tests.federation.syncing HOME TIMEOUT_S ADDRESS…
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from federation.peer import Peer
from federation.sync import sync
from registry.store import Registry
from tests.memory import peak_bytes


def main(home: str, timeout_s: str, *addresses: str) -> None:
    with Registry.open(Path(home)) as registry:
        before, started = peak_bytes(), time.monotonic()
        report = sync(registry, [Peer.at(address) for address in addresses], timeout_s=float(timeout_s))
        grown = peak_bytes() - before
    peers = [
        {
            "said": [peer.error, *(why for _, why in peer.failed)],
            "fetched": [entry.digest for entry in peer.fetched],
            "offered": peer.offered,
        }
        for peer in report.peers
    ]
    print(json.dumps({"peers": peers, "grown_mib": grown >> 20, "seconds": time.monotonic() - started}))


if __name__ == "__main__":
    main(*sys.argv[1:])
