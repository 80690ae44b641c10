"""Tells a node that was started anew from a home that was copied, by the certificates that it shows."""

from __future__ import annotations

import threading
from collections import OrderedDict

from blake3 import blake3

from federation import limits
from federation.errors import CopiedHomeError
from federation.peer import shown_id


class Sightings:
    """Which process of each node was met. Every process has a certificate of its own, and one follows another.

    So a certificate that comes back after another took its place means that two processes have one identity.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._met: OrderedDict[str, list[bytes]] = OrderedDict()

    def note(self, node_id: str, certificate: bytes, address: str) -> None:
        """A node proved its id with this certificate. Raises `CopiedHomeError` if another process took its place."""
        shown = blake3(certificate).digest()
        with self._lock:
            met = self._met.setdefault(node_id, [])
            self._met.move_to_end(node_id)
            if shown in met[:-1]:
                raise CopiedHomeError(
                    f"node {shown_id(node_id)} at {address} also runs as another process, so its home was copied",
                    hint="on the copy, remove identity.key and start it again: it gets an identity of its own",
                )
            if shown not in met:
                met.append(shown)
            del met[: -limits.MAX_SIGHTINGS_PER_NODE]
            if len(self._met) > limits.MAX_SIGHTED_NODES:
                self._met.popitem(last=False)


__all__ = ["Sightings"]
