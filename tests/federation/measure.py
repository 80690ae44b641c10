"""One client call in a process of its own; prints what it raised and how far its memory rose.

python -m tests.federation.measure ADDRESS health|inventory|DIGEST
"""

from __future__ import annotations

import json
import sys

from federation.client import LoRAFlightClient
from federation.errors import FederationError
from registry.digest import Digest
from tests.memory import peak_bytes


def main(address: str, what: str) -> None:
    before, error = peak_bytes(), None
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
    print(
        json.dumps({"error": type(error).__name__, "message": str(error), "grown_mib": (peak_bytes() - before) >> 20})
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
