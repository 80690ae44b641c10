"""A guest's side of membership: join the node that invited it, and follow those it took as introducers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace

from federation.client import LoRAFlightClient
from federation.errors import PeerError, PeerUnreachableError
from federation.membership import ACTION_JOIN, ACTION_ROSTER, JoinRequest, JoinToken, decode_roster, encode_join
from federation.peer import Peer
from registry.logs import get_logger
from registry.peers import Introduced, KnownPeer, PeerBook

_log = get_logger(__name__)


def join(
    token: JoinToken,
    book: PeerBook,
    connect: Callable[[Peer], LoRAFlightClient],
    *,
    own_id: str,
    name: str,
    port: int | None,
    introducer: bool = True,
) -> KnownPeer:
    """Join the node that made `token`, at the first of its addresses where it answers; both approve each other.

    `name` and `port` (None: no server) are this node's; with `introducer`, whom the host approves is approved here too.
    Raises `PeerUnreachableError` if it answers nowhere, `PeerError` if it refuses.
    """
    failures = []
    for address in token.addresses:
        with connect(replace(Peer.at(address), node_id=token.node_id)) as client:
            try:
                roster = _joined(client, token.secret, name, port)
            except (PeerError, PeerUnreachableError) as error:
                failures.append(error)
                continue
        host = book.approve(token.node_id, name=token.name, address=address, introducer=introducer)
        book.introduced(token.node_id, roster, own_id=own_id)
        return host
    raise failures[0]


def follow(client: LoRAFlightClient, book: PeerBook, introducer: str, *, own_id: str) -> tuple[str, ...]:
    """Ask an introducer whom it approves now, and do likewise; returns who is newly approved. Raises as any call."""
    roster = decode_roster(_only(client, ACTION_ROSTER, b""))
    news = book.introduced(introducer, roster, own_id=own_id)
    if news:
        _log.info("peers_introduced", introducer=introducer, peers=list(news))
    return news


def _joined(client: LoRAFlightClient, secret: str, name: str, port: int | None) -> tuple[Introduced, ...]:
    request = JoinRequest(secret=secret, name=name, port=port)
    return decode_roster(_only(client, ACTION_JOIN, encode_join(request)))


def _only(client: LoRAFlightClient, action: str, body: bytes) -> bytes:
    with closing(client.ask(action, body)) as results:
        answer = next(results, None)
    if answer is None:
        raise PeerError(f"expected an answer to {action} from {client.address}, got none")
    return answer


__all__ = ["follow", "join"]
