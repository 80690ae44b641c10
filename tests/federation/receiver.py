"""Brings one card from a server, slowly, until it is there or the process is killed.

python -m tests.federation.receiver HOME ADDRESS DIGEST BYTES_PER_S
"""

from __future__ import annotations

import sys
from pathlib import Path

from federation.board import Holder, Wanted
from federation.client import LoRAFlightClient
from federation.pace import Pace
from federation.transfer import transfer
from registry.digest import Digest
from registry.entries import Origin
from registry.store import Registry


def main(home: str, address: str, digest: str, bytes_per_s: str) -> None:
    with Registry.open(Path(home)) as registry, LoRAFlightClient(address) as client:
        holder = Holder(source=client, origin=Origin(peer_id="0" * 32, address=address))
        wanted = Wanted(digest=Digest(digest), label="large", nbytes=1, holders=(holder,))
        print("begun", flush=True)
        (outcome,) = transfer(registry, [wanted], pace=Pace(float(bytes_per_s)))
        print(outcome.failures or "come", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
