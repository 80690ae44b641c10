"""What `arrowmoe skills push` does: this node's cards for a peer that takes them, whether a node runs here or not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from arrowmoe.following import pace_of
from arrowmoe.peering import circle
from arrowmoe.settings import Settings
from federation.errors import FederationError
from federation.pace import Pace
from federation.peer import Peer, parse_address
from federation.pushing import Pushed, PushProgress, Receiver, push
from registry.entries import CardEntry
from registry.errors import CardError, MissingFileError
from registry.peers import KnownPeer, PeerBook
from registry.store import Registry

Json = dict[str, Any]


def give(
    registry: Registry,
    settings: Settings,
    peer: str,
    refs: Sequence[str],
    *,
    on_progress: Callable[[PushProgress], None] | None = None,
) -> Json:
    """Push the cards behind `refs`, or all where there are none, to a peer: HOST:PORT, or a node of the book.

    Raises `FederationError` for a peer that is not there or takes nothing, and `UnknownCardError`.
    """
    entries = [registry.entry(ref) for ref in refs] if refs else registry.list()
    place = place_of(peer, PeerBook(registry.database).peers())
    with circle(registry, settings).connect(place) as client:
        node_id = client.health().node_id
        pace = pace_of(settings.sync)
        done = [_pushed(client, registry, entry, pace, on_progress) for entry in entries]
    return {
        "peer": {"node_id": node_id, "address": place.address},
        "ok": all(one.error is None for one in done),
        "bytes_moved": sum(one.bytes_moved for one in done),
        "cards": [_told(one) for one in done],
    }


def place_of(text: str, known: Sequence[KnownPeer]) -> Peer:
    """Where the peer is that the owner named: HOST:PORT, or the name or id of one of the book's `known` ones.

    Raises `FederationError`.
    """
    if ":" in text:
        return Peer.at(text)
    node_id = text.replace("-", "").lower()
    found = [peer for peer in known if node_id == peer.node_id or text == peer.name]
    if len(found) != 1 or found[0].address is None:
        problems = {0: "no such peer", 1: "one without an address"}
        raise FederationError(
            f"expected a peer as HOST:PORT, or the name or id of a known one, got {text!r:.100}: "
            + problems.get(len(found), f"{len(found)} of that name"),
            hint="`arrowmoe peers ls` shows all that are known",
        )
    host, port = parse_address(found[0].address)
    return Peer(host=host, port=port, node_id=found[0].node_id, name=found[0].name, source="book")


def _pushed(
    client: Receiver,
    registry: Registry,
    entry: CardEntry,
    pace: Pace,
    on_progress: Callable[[PushProgress], None] | None,
) -> Pushed:
    try:
        card = registry.get(entry.digest)
    except (CardError, MissingFileError) as error:  # the others are whole
        label = f"{entry.name}@{entry.version}"
        return Pushed(digest=entry.digest, label=label, nbytes=entry.nbytes, error=str(error))
    (pushed,) = push(client, [card], pace=pace, on_progress=on_progress)
    return pushed


def _told(one: Pushed) -> Json:
    return {
        "digest": one.digest,
        "label": one.label,
        "nbytes": one.nbytes,
        "bytes_moved": one.bytes_moved,
        "quarantined": one.quarantined,
        "error": one.error,
    }


__all__ = ["give", "place_of"]
