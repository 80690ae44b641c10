"""One client call in a process of its own; prints what it raised and how far its memory rose.

python -m tests.federation.measure ADDRESS health|inventory|DIGEST
"""

from __future__ import annotations

import json
import resource
import sys

from federation.client import LoRAFlightClient
from federation.errors import FederationError
from registry.digest import Digest


def peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main(address: str, what: str) -> None:
    before, error = peak_mib(), None
    with LoRAFlightClient(address, timeout_s=30) as client:
        try:
            if what == "health":
                client.health()
            elif what == "inventory":
                client.list_remote_skills()
            else:
                client.fetch_skill(Digest(what))
        except FederationError as raised:
            error = raised
    print(json.dumps({"error": type(error).__name__, "message": str(error), "grown_mib": peak_mib() - before}))


if __name__ == "__main__":
    main(*sys.argv[1:])
