"""Syncs with one peer until all is here or the process is killed; prints how many tensor bytes are here, as they come.

python -m tests.federation.syncer HOME CATALOG_URL ADDRESS BYTES_PER_S
"""

from __future__ import annotations

import sys
from pathlib import Path

from federation.pace import Pace
from federation.peer import Peer
from federation.sync import SyncProgress, sync
from registry.store import Registry


def main(home: str, catalog_url: str, address: str, bytes_per_s: str) -> None:
    def say(done: SyncProgress) -> None:
        print(done.bytes_done, flush=True)

    with Registry.open(Path(home), catalog_url=catalog_url) as registry:
        print(0, flush=True)
        report = sync(registry, [Peer.at(address)], on_progress=say, pace=Pace(float(bytes_per_s)))
    assert report.ok, report


if __name__ == "__main__":
    main(*sys.argv[1:])
