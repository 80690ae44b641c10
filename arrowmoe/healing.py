"""Mending damaged cards without a running node: the peers that a node would ask are asked for them."""

from __future__ import annotations

from collections.abc import Sequence

from arrowmoe.control import Handler
from arrowmoe.operations import restore_handler
from arrowmoe.settings import Settings
from federation import care
from federation.circle import Circle
from federation.peer import Peer, is_loopback
from registry.store import Registry


def restorer(registry: Registry, settings: Settings, found: Sequence[Peer]) -> Handler:
    """What a node of these settings, which has `found` these peers, would answer to `restore`."""
    circle = Circle(registry, name=settings.name, open=settings.open or is_loopback(settings.host))
    named = [Peer.at(address) for address in settings.peers]
    fetch = care.from_peers(lambda: circle.company(named, found).asked, circle.connect)
    return restore_handler(lambda digest: care.mend(registry, digest, fetch))


__all__ = ["restorer"]
