"""Cards that peers push here, where the owner lets them: the actions `push` and `put`, and what a node answers to them.

A pushed card takes the way of a fetched one: its manifest is checked before a tensor comes, the tensors go into a draft
and are verified there one by one, and the entrance decides. The answer to each call says what is lacking, so a broken
push goes on where it was, and what is here already is never sent. Bodies are plain bytes in small calls, one after
another: the turnstile lets a caller send the next only when this one was taken in (docs/adr/0026).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, TypeAdapter

from federation import limits
from federation.answers import Action, Result
from federation.entrance import Entrance
from federation.errors import AdmissionError, BusyError, PeerError, PushRefusedError
from federation.forms import decoded, json_bytes
from federation.peer import parse_id, shown_id
from federation.promise import promised
from federation.siblings import drafted
from registry.digest import Digest
from registry.drafts import Draft
from registry.entries import CardEntry, Origin
from registry.errors import BusyDraftError, CardError, RemovedCardError, UnknownCardError
from registry.logs import get_logger
from registry.manifest import MAX_MANIFEST_BYTES
from registry.peers import PeerBook, PeerState
from registry.spans import Spans
from registry.store import Registry

ACTION_PUSH = "push"
ACTION_PUT = "put"
APPROVED = "approved"
"""In the owner's list of who may push: every approved peer."""

_log = get_logger(__name__)

_DigestText = Annotated[Digest, StringConstraints(pattern=r"^blake3:[0-9a-f]{64}$")]
_Offset = Annotated[int, Field(ge=0, le=limits.MAX_CARD_BYTES)]


@dataclass(frozen=True, kw_only=True)
class PushRequest:
    """Offers a card, whose manifest has so many bytes."""

    digest: _DigestText
    manifest_bytes: Annotated[int, Field(ge=1, le=MAX_MANIFEST_BYTES)]
    signature: Annotated[str, StringConstraints(max_length=256)] | None = None


@dataclass(frozen=True, kw_only=True)
class PutHead:
    """Says which bytes follow: those of the card's manifest, or of its tensors, from `offset` on."""

    digest: _DigestText
    part: Literal["manifest", "tensors"]
    offset: _Offset


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How far a pushed card has come.

    `kept`: it is in the receiver's catalog, and `quarantined` says why it waits there if it does. Else `manifest` is
    how many of the manifest's bytes have come and, once that is whole, `gaps` are the first tensor bytes that have not.
    """

    kept: bool
    quarantined: str | None = None
    manifest: _Offset = 0
    gaps: Annotated[tuple[tuple[_Offset, _Offset], ...], Field(max_length=limits.MAX_GAPS_TOLD)] = ()


_PUSH = TypeAdapter(PushRequest)
_HEAD = TypeAdapter(PutHead)
_STANDING = TypeAdapter(Standing)


def encode_push(request: PushRequest) -> bytes:
    """The body of `push`."""
    return json_bytes(asdict(request))


def encode_put(head: PutHead, data: bytes) -> bytes:
    """The body of `put`: one line of JSON, then the bytes."""
    return b"%s\n%s" % (json_bytes(asdict(head)), data)


def decode_standing(data: bytes) -> Standing:
    """The answer to both. Raises `PeerError`."""
    standing: Standing = decoded(_STANDING, data, "a push's standing", limits.MAX_REQUEST_BYTES)
    return standing


def accepting(named: Collection[str], book: PeerBook) -> Callable[[str], bool]:
    """Whether a node may push: `named` holds node ids, and `APPROVED` for all that the book has approved.

    Raises `FederationError` for what is neither.
    """
    ids = {parse_id(name) for name in named if name != APPROVED}

    def accepts(node_id: str) -> bool:
        known = book.find(node_id) if APPROVED in named else None
        return node_id in ids or (known is not None and known.state is PeerState.APPROVED)

    return accepts


class Uploads:
    """A node's answers to `push` and `put`. `accepts` says which callers may push here; everyone else is told so.

    At most `MAX_UPLOADS` callers push at once, one card each. One that sends nothing for `idle_s` loses its place; its
    draft stays, for whoever gives the rest.
    """

    def __init__(
        self,
        registry: Registry,
        entrance: Entrance,
        *,
        accepts: Callable[[str], bool],
        idle_s: float = limits.STALLED_S,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry, self._entrance, self._accepts = registry, entrance, accepts
        self._idle_s, self._now = idle_s, now
        self._lock = threading.Lock()
        self._open: dict[str, _Upload] = {}

    def actions(self, caller: str, host: str | None, took_in: Callable[[int], None]) -> Mapping[str, Action]:
        """What node `caller`, which calls from `host`, can ask; `took_in` hears how many bytes were taken in."""
        return {
            ACTION_PUSH: Action(
                description="offer a card to a node that takes some; says what is lacking of it",
                answer=partial(self._push, caller, host or "", took_in),
            ),
            ACTION_PUT: Action(
                description="send a part of a card that was offered; says what is still lacking",
                answer=partial(self._put, caller, took_in),
            ),
        }

    def close(self) -> None:
        """Let go of what is under way; its drafts stay."""
        with self._lock:
            uploads = [*self._open.values()]
        for upload in uploads:
            self._end(upload)

    def _push(self, caller: str, host: str, took_in: Callable[[int], None], body: bytes) -> Iterator[Result]:
        self._check(caller)
        request: PushRequest = decoded(_PUSH, body, "an offer of a card", limits.MAX_REQUEST_BYTES)
        standing = self._kept(request.digest) or self._begun(request, caller, host).standing()
        took_in(len(body))
        return _answer(standing)

    def _put(self, caller: str, took_in: Callable[[int], None], body: bytes) -> Iterator[Result]:
        self._check(caller)
        line, _, _ = body[: limits.MAX_REQUEST_BYTES].partition(b"\n")
        head: PutHead = decoded(_HEAD, line, "the first line of a part", limits.MAX_REQUEST_BYTES)
        data = memoryview(body)[len(line) + 1 :]
        if not 0 < len(data) <= limits.UPLOAD_CHUNK_BYTES:
            raise PeerError(f"expected a part of 1 to {limits.UPLOAD_CHUNK_BYTES} bytes, got {len(data)}")
        standing = self._kept(head.digest) or self._taken(head, data, caller)
        took_in(len(body))
        return _answer(standing)

    def _check(self, caller: str) -> None:
        if not self._accepts(caller):
            raise PushRefusedError(
                f"this node takes no cards from node {shown_id(caller)}, it only fetches; "
                "its owner may name that node in the setting trust.push_from"
            )

    def _kept(self, digest: Digest) -> Standing | None:
        try:
            entry = self._registry.entry(digest, quarantined=True)
        except UnknownCardError:
            return None
        return Standing(kept=True, quarantined=entry.quarantined)

    def _begun(self, request: PushRequest, caller: str, host: str) -> _Upload:
        """The caller's upload of that card; of any other it lets go."""
        with self._lock:
            before = self._open.get(caller)
        if before is not None:
            if before.request == request:
                return before
            self._end(before)
        self._registry.recover()
        self._registry.drafts.sweep(datetime.now(UTC))
        upload = _Upload(request, Origin(peer_id=caller, address=host), self._registry, self._entrance, now=self._now)
        with self._lock:
            if len(self._open) >= limits.MAX_UPLOADS:
                raise BusyError(f"{limits.MAX_UPLOADS} nodes push cards here already; try again soon")
            self._open[caller] = upload
        self._watch(upload, self._idle_s)
        return upload

    def _taken(self, head: PutHead, data: memoryview, caller: str) -> Standing:
        with self._lock:
            upload = self._open.get(caller)
        if upload is None or upload.request.digest != head.digest:
            raise BusyError(f"no push of card {head.digest} is under way here; begin with {ACTION_PUSH!r}")
        try:
            entry = upload.take(head, data)
        except BusyDraftError as error:
            self._end(upload)
            raise BusyError(str(error)) from error
        except BaseException:
            self._end(upload)
            raise
        if entry is None:
            return upload.standing()
        self._end(upload)
        return Standing(kept=True, quarantined=entry.quarantined)

    def _watch(self, upload: _Upload, after_s: float) -> None:
        """Look after a while whether the upload still moves."""
        upload.timer = threading.Timer(after_s, self._end_if_idle, [upload])
        upload.timer.name, upload.timer.daemon = "arrowmoe-upload", True
        upload.timer.start()

    def _end_if_idle(self, upload: _Upload) -> None:
        left_s = upload.moved + self._idle_s - self._now()
        if left_s <= 0 and not upload.is_busy:
            _log.warning("upload_stalled", peer=upload.origin.peer_id, digest=upload.request.digest)
            self._end(upload)
        elif self._open.get(upload.origin.peer_id) is upload:
            self._watch(upload, max(left_s, self._idle_s / 10))

    def _end(self, upload: _Upload) -> None:
        with self._lock:
            if self._open.get(upload.origin.peer_id) is upload:
                del self._open[upload.origin.peer_id]
        upload.close()


class _Upload:
    """One card on its way from one caller, whose calls may come at once."""

    def __init__(
        self, request: PushRequest, origin: Origin, registry: Registry, entrance: Entrance, *, now: Callable[[], float]
    ) -> None:
        self.request, self.origin = request, origin
        self._registry, self._entrance, self._now = registry, entrance, now
        self.moved = now()
        self.timer: threading.Timer | None = None
        self._lock = threading.Lock()
        self._manifest = bytearray()
        self._draft: Draft | None = None
        self._given = Spans()
        self._closed = False

    @property
    def is_busy(self) -> bool:
        """Whether a part is being taken in."""
        return self._lock.locked()

    def standing(self) -> Standing:
        """What has come, and what has not."""
        with self._lock:
            gaps = [] if self._draft is None else self._draft.gaps()
            return Standing(kept=False, manifest=len(self._manifest), gaps=tuple(gaps[: limits.MAX_GAPS_TOLD]))

    def take(self, head: PutHead, data: memoryview) -> CardEntry | None:
        """Put `data` in its place, unless it is there already; the card's entry if that made it whole.

        Raises `PeerError`, `AdmissionError`, and as `Registry.admit` does; the upload is then over.
        """
        with self._lock:
            if self._closed:
                raise BusyError("this push has ended; begin anew")
            self.moved = self._now()
            if head.part == "tensors":
                self._take_tensors(head.offset, data)
            elif self._take_manifest(head.offset, data):
                self._draft = self._promised()
            return self._finished(self._draft) if self._draft is not None and self._draft.is_whole else None

    def close(self) -> None:
        """Let go of the draft."""
        if self.timer is not None:
            self.timer.cancel()
        with self._lock:
            self._closed = True
            if self._draft is not None:
                self._draft.close()
                self._draft = None

    def _take_manifest(self, offset: int, data: memoryview) -> bool:
        """Whether the manifest is whole with that."""
        if offset != len(self._manifest) or offset + len(data) > self.request.manifest_bytes:
            return False
        self._manifest += data
        return len(self._manifest) == self.request.manifest_bytes

    def _promised(self) -> Draft:
        """The draft of the card, which may come."""
        signature = None if self.request.signature is None else self.request.signature.encode()
        try:
            card = promised(self.request.digest, bytes(self._manifest), signature)
        except CardError as error:
            raise PeerError(f"card {self.request.digest} is damaged or forged: {error}") from error
        self._entrance.check(card, self.origin)
        return drafted(self._registry, card)

    def _take_tensors(self, offset: int, data: memoryview) -> None:
        draft, end = self._draft, offset + len(data)
        if draft is None or not any(first <= offset and end <= last for first, last in draft.gaps()):
            return  # not asked for: the answer says what is
        try:
            wrong = draft.write(offset, data)
        except CardError:
            draft.discard()
            raise
        self._given.add(offset, end)
        for start, until in wrong:
            if not self._given.gaps(start, until):
                raise PeerError(f"tensor bytes of card {self.request.digest} were damaged or forged")
            self._given.remove(start, until)  # another peer gave the rest, in an earlier attempt

    def _finished(self, draft: Draft) -> CardEntry:
        try:
            entry = self._entrance.admit(draft.finish(), origin=self.origin, draft=draft.path)
        except (AdmissionError, CardError, RemovedCardError):
            draft.discard()
            raise
        draft.discard()
        _log.info("card_pushed_here", digest=entry.digest, peer=self.origin.peer_id, bytes=entry.nbytes)
        return entry


def _answer(standing: Standing) -> Iterator[Result]:
    return iter([json_bytes(asdict(standing))])


__all__ = [
    "ACTION_PUSH",
    "ACTION_PUT",
    "APPROVED",
    "PushRequest",
    "PutHead",
    "Standing",
    "Uploads",
    "accepting",
    "decode_standing",
    "encode_push",
    "encode_put",
]
