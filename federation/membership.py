"""How nodes come to know each other: join tokens, and the two actions `join` and `roster` that a node answers.

An invited node shows the token's secret and proves its id; both sides then approve each other, and the guest takes its
host as introducer: whom the host approved, it approves too. So a star of invitations becomes a mesh.
"""

from __future__ import annotations

import binascii
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Annotated

from pydantic import Field, StringConstraints, TypeAdapter

from federation import limits
from federation.answers import Action, Result
from federation.errors import FederationError, PeerError
from federation.forms import decoded, json_bytes
from federation.peer import format_address, parse_address
from registry.database import Database
from registry.errors import InvitationError
from registry.logs import get_logger
from registry.peers import Introduced, Invitations, PeerBook

ACTION_JOIN = "join"
ACTION_ROSTER = "roster"
TOKEN_PREFIX = "arrowmoe-"
_LAST_SECOND = 253_402_300_799  # of the year 9999
_log = get_logger(__name__)

_NodeId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
_Name = Annotated[str, StringConstraints(max_length=limits.MAX_NAME_CHARS, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]
_Address = Annotated[str, StringConstraints(max_length=300)]
_Secret = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]


@dataclass(frozen=True, kw_only=True)
class JoinToken:
    """What lets one node join: whom to ask, where it may be, and the secret. `expires` (Unix s) is by its clock."""

    node_id: _NodeId
    name: _Name
    addresses: Annotated[tuple[_Address, ...], Field(min_length=1, max_length=16)]
    secret: _Secret
    expires: Annotated[int, Field(ge=0, le=_LAST_SECOND)]

    def __str__(self) -> str:
        return TOKEN_PREFIX + urlsafe_b64encode(json_bytes(asdict(self))).decode().rstrip("=")

    @classmethod
    def parse(cls, text: str) -> JoinToken:
        """The token that `peers invite` printed, line breaks or not. Raises `FederationError`."""
        text = "".join(text.split())
        hint = "copy the whole line that `arrowmoe peers invite` printed"
        if not text.startswith(TOKEN_PREFIX) or len(text) > limits.MAX_JOIN_TOKEN_CHARS:
            raise FederationError(f"expected a join token {TOKEN_PREFIX}…, got {text[:20]!r}", hint=hint)
        try:
            body = text.removeprefix(TOKEN_PREFIX)
            data = urlsafe_b64decode(body + "=" * (-len(body) % 4))
            token: JoinToken = decoded(_TOKEN, data, "a join token", limits.MAX_JOIN_TOKEN_CHARS)
        except (binascii.Error, ValueError, PeerError) as error:
            raise FederationError(f"the join token is damaged: {error}", hint=hint) from error
        for address in token.addresses:
            parse_address(address)
        return token

    @property
    def until(self) -> datetime:
        """When it expires."""
        return datetime.fromtimestamp(self.expires, UTC)


@dataclass(frozen=True, kw_only=True)
class JoinRequest:
    """What a guest says: the token's secret, its name, and the port on which it answers (None: it does not)."""

    secret: _Secret
    name: _Name
    port: Annotated[int, Field(ge=1, le=65_535)] | None = None


@dataclass(frozen=True, kw_only=True)
class _Member:
    node_id: _NodeId
    name: _Name = ""
    address: _Address | None = None


@dataclass(frozen=True, kw_only=True)
class _Roster:
    peers: Annotated[tuple[_Member, ...], Field(max_length=limits.MAX_ROSTER_PEERS)]


_TOKEN = TypeAdapter(JoinToken)
_REQUEST = TypeAdapter(JoinRequest)
_ROSTER = TypeAdapter(_Roster)


class Membership:
    """A node's answers to `join` and `roster`."""

    def __init__(self, database: Database) -> None:
        self._book, self._invitations = PeerBook(database), Invitations(database)

    def actions(self, caller: str, host: str | None) -> Mapping[str, Action]:
        """What node `caller`, which calls from `host`, can ask; what these answer is for nobody else."""
        return {
            ACTION_JOIN: Action(
                description="join with a token's secret; answers as roster does",
                answer=partial(self._join, caller, host),
            ),
            ACTION_ROSTER: Action(
                description="the nodes that this node's owner approved, as one JSON object",
                answer=partial(self._roster, caller),
            ),
        }

    def _join(self, caller: str, host: str | None, body: bytes) -> Iterator[Result]:
        request: JoinRequest = decoded(_REQUEST, body, "a request to join", limits.MAX_REQUEST_BYTES)
        address = None if host is None or request.port is None else format_address(host, request.port)
        guest = Introduced(node_id=caller, name=request.name, address=address)
        try:
            self._invitations.redeem(request.secret, guest)
        except InvitationError as error:
            _log.warning("join_refused", node_id=caller, reason=str(error))
            raise
        _log.info("peer_joined", node_id=caller, name=request.name, address=address)
        return self._roster(caller, b"")

    def _roster(self, caller: str, body: bytes) -> Iterator[Result]:
        others = [other for other in self._book.roster() if other.node_id != caller]
        return iter([encode_roster(others)])


def encode_join(request: JoinRequest) -> bytes:
    """The body of `join`."""
    return json_bytes(asdict(request))


def encode_roster(peers: list[Introduced]) -> bytes:
    """The answer to `roster`: of more than the limits allow, those that are known longest."""
    kept = [asdict(peer) for peer in peers[: limits.MAX_ROSTER_PEERS]]
    while len(data := json_bytes({"peers": kept})) > limits.MAX_ROSTER_BYTES:
        kept.pop()
    if len(kept) < len(peers):
        _log.warning("roster_cut", peers=len(peers), told=len(kept))
    return data


def decode_roster(data: bytes) -> tuple[Introduced, ...]:
    """Whom an introducer approved. Raises `PeerError`."""
    roster: _Roster = decoded(_ROSTER, data, "a roster", limits.MAX_ROSTER_BYTES)
    return tuple(
        Introduced(node_id=peer.node_id, name=peer.name, address=_usable(peer.address or "")) for peer in roster.peers
    )


def _usable(address: str) -> str | None:
    """An address as another node names it; None for one that cannot be used, for it is a hint only."""
    if not address:
        return None
    try:
        parse_address(address)
    except FederationError as error:
        _log.info("address_ignored", reason=str(error))
        return None
    return address


__all__ = [
    "ACTION_JOIN",
    "ACTION_ROSTER",
    "JoinRequest",
    "JoinToken",
    "Membership",
    "decode_roster",
    "encode_join",
    "encode_roster",
]
