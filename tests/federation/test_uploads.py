"""What a node that takes pushes answers, asked without a network."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from federation import limits
from federation.admission import Policy
from federation.entrance import Entrance
from federation.errors import BusyError, FederationError, PeerError, PushRefusedError, TransferError
from federation.pushing import PushProgress, push
from federation.uploads import (
    APPROVED,
    PushRequest,
    PutHead,
    Standing,
    Uploads,
    accepting,
    decode_standing,
    encode_push,
    encode_put,
)
from registry.card import LoRACard
from registry.digest import digest_of
from registry.errors import BusyDraftError, CardIntegrityError, RegistryError
from registry.format import LoRAFormat
from registry.identity import Identity
from registry.peers import PeerBook
from registry.store import Origin, Registry
from tests.registry.cards import module_shapes, small_card

KIB, MIB = 1 << 10, 1 << 20
CALLER = "ab" * 16
ACCEPTING = Policy(unknown_publishers="accept", max_norm=1e9)


@dataclass(kw_only=True)
class Direct:
    """A client of `uploads`; `cut_after` that many answers are lost, and the line with them, once."""

    uploads: Uploads
    caller: str = CALLER
    cut_after: int | None = None
    sent: list[tuple[str, int]] = field(default_factory=list)
    taken_in: int = 0

    def ask(self, action: str, body: bytes = b"", *, more_s: float = 0.0) -> Generator[bytes, None, None]:
        self.sent.append((action, len(body)))
        try:
            answers = [*self.uploads.actions(self.caller, "192.0.2.9", self._took_in)[action].answer(body)]
        except RegistryError as error:  # as a server tells it
            raise PeerError(str(error)) from error
        if self.cut_after is not None and len(self.sent) > self.cut_after:
            self.cut_after = None
            raise TransferError("the line broke")
        yield from map(bytes, answers)

    def _took_in(self, nbytes: int) -> None:
        self.taken_in += nbytes

    def standing(self, action: str, body: bytes) -> Standing:
        return decode_standing(next(self.ask(action, body)))

    @property
    def nbytes(self) -> int:
        return sum(nbytes for _, nbytes in self.sent)


def taking(registry: Registry, policy: Policy = ACCEPTING, **options: object) -> Uploads:
    return Uploads(registry, Entrance(registry, policy), accepts=lambda _: True, **options)  # type: ignore[arg-type]


@pytest.fixture
def uploads(ours: Registry) -> Iterator[Uploads]:
    running = taking(ours)
    yield running
    running.close()


@pytest.fixture(scope="module")
def large() -> LoRACard:
    """Six tensors of 1 MiB."""
    return small_card("large", modules=module_shapes(3, 1 << 16, 1 << 16), rank=4).signed(Identity.generate())


def offered(card: LoRACard, **changes: object) -> bytes:
    signature = None if card.signature is None else str(card.signature)
    request = PushRequest(digest=card.digest, manifest_bytes=len(card.manifest_bytes), signature=signature)
    return encode_push(replace(request, **changes))  # type: ignore[arg-type]


def part(card: LoRACard, start: int, end: int) -> bytes:
    data = b"".join(tensor.data for tensor in card.tensors)[start:end]
    return encode_put(PutHead(digest=card.digest, part="tensors", offset=start), data)


def manifest(card: LoRACard) -> bytes:
    return encode_put(PutHead(digest=card.digest, part="manifest", offset=0), card.manifest_bytes)


def tensor_bytes(card: LoRACard) -> list[bytes]:
    return [bytes(tensor.data) for tensor in card.tensors]


def test_a_pushed_card_is_kept_byte_for_byte_with_where_it_came_from(
    ours: Registry, uploads: Uploads, large: LoRACard
) -> None:
    client, seen = Direct(uploads=uploads), list[PushProgress]()
    (pushed,) = push(client, [large], on_progress=seen.append)
    assert (pushed.error, pushed.quarantined) == (None, None)
    assert pushed.bytes_moved == large.nbytes + len(large.manifest_bytes)
    kept = ours.get(large.digest, verify=True)
    assert (kept.signature, tensor_bytes(kept)) == (large.signature, tensor_bytes(large))
    assert ours.entry(large.digest).origin == Origin(peer_id=CALLER, address="192.0.2.9")
    assert max(nbytes for _, nbytes in client.sent) < limits.UPLOAD_WINDOW_BYTES
    assert client.taken_in == client.nbytes
    assert (seen[0].bytes_done, seen[-1].bytes_done) == (0, large.nbytes)
    assert [*ours.home.glob("drafts/*")] == []


def test_a_card_that_is_there_costs_one_small_call(ours: Registry, uploads: Uploads, large: LoRACard) -> None:
    ours.import_file(_saved(ours, large))
    client = Direct(uploads=uploads)
    (pushed,) = push(client, [large])
    assert (pushed.error, pushed.bytes_moved) == (None, 0)
    assert (len(client.sent), client.nbytes < 600) == (1, True)


def test_tensors_that_are_there_are_not_sent(ours: Registry, uploads: Uploads, large: LoRACard) -> None:
    ours.import_file(_saved(ours, large))
    again = replace(large, signature=None).describe(version="2", description="told anew")
    (pushed,) = push(Direct(uploads=uploads), [again])
    assert pushed.error is None
    assert pushed.bytes_moved == len(again.manifest_bytes)
    assert all(report.ok for report in ours.verify())


def _saved(registry: Registry, card: LoRACard) -> Path:
    path = registry.home / "card.lora.arrow"
    LoRAFormat.save(card, path)
    return path


@pytest.mark.parametrize("cut_after", [1, 2, 3, 10, 25])
def test_a_push_goes_on_where_its_line_broke(ours: Registry, uploads: Uploads, large: LoRACard, cut_after: int) -> None:
    waits: list[float] = []
    (pushed,) = push(Direct(uploads=uploads, cut_after=cut_after), [large], wait=waits.append)
    assert pushed.error is None
    assert pushed.bytes_moved <= large.nbytes + len(large.manifest_bytes) + limits.UPLOAD_CHUNK_BYTES
    assert len(waits) == 1
    assert [report.ok for report in ours.verify()] == [True]


def test_a_push_goes_on_where_another_process_of_the_receiver_ended(ours: Registry, large: LoRACard) -> None:
    client = Direct(uploads=taking(ours))
    client.standing("push", offered(large))
    client.standing("put", manifest(large))
    for start in range(0, 3 * MIB, 256 * KIB):
        client.standing("put", part(large, start, start + 256 * KIB))
    client.uploads.close()
    assert ours.list() == []
    with Registry.open(ours.home) as reopened:
        later = Direct(uploads=taking(reopened))
        (pushed,) = push(later, [large])
        later.uploads.close()
    assert pushed.error is None
    assert pushed.bytes_moved == large.nbytes - 3 * MIB + len(large.manifest_bytes)


def test_who_may_push(ours: Registry, uploads: Uploads, large: LoRACard) -> None:
    book = PeerBook(ours.database)
    nobody, named, approved = accepting([], book), accepting([CALLER.upper()], book), accepting([APPROVED], book)
    assert (nobody(CALLER), named(CALLER), named("cd" * 16), approved(CALLER)) == (False, True, False, False)
    book.approve(CALLER)
    assert (nobody(CALLER), approved(CALLER)) == (False, True)
    book.block(CALLER)
    assert not approved(CALLER)
    with pytest.raises(FederationError, match="node id"):
        accepting(["anna"], book)


def test_nobody_may_unless_they_are_named(ours: Registry, large: LoRACard) -> None:
    uploads = Uploads(ours, Entrance(ours, ACCEPTING), accepts=accepting([], PeerBook(ours.database)))
    client = Direct(uploads=uploads)
    with pytest.raises(PushRefusedError, match="takes no cards"):
        push(client, [large])
    with pytest.raises(PushRefusedError):
        client.standing("put", part(large, 0, 256 * KIB))
    assert client.taken_in == 0


def test_a_card_of_an_unknown_publisher_waits_and_the_pusher_hears_of_it(ours: Registry, large: LoRACard) -> None:
    uploads = taking(ours, Policy(unknown_publishers="quarantine"))
    (pushed,) = push(Direct(uploads=uploads), [large])
    assert pushed.error is None
    assert pushed.quarantined is not None
    assert "not known here" in pushed.quarantined
    assert ours.list() == []
    (again,) = push(Direct(uploads=uploads), [large])
    assert (again.bytes_moved, again.quarantined) == (0, pushed.quarantined)


@pytest.mark.parametrize(
    "policy", [Policy(unknown_publishers="refuse"), Policy(unknown_publishers="accept", quota_bytes=5 * MIB)]
)
def test_what_the_policy_refuses_is_refused_before_its_tensors_come(
    ours: Registry, large: LoRACard, policy: Policy
) -> None:
    client = Direct(uploads=taking(ours, policy))
    pushed, other = push(client, [large, small_card("fine")])
    assert "is refused" in str(pushed.error)
    assert pushed.bytes_moved == len(large.manifest_bytes)
    assert (other.error is None) == (policy.unknown_publishers == "accept")
    assert [*ours.home.glob("drafts/*")] == []


def test_a_removed_card_does_not_come_back_by_a_push(ours: Registry, uploads: Uploads, large: LoRACard) -> None:
    push(Direct(uploads=uploads), [large])
    ours.remove(large.digest)
    (pushed,) = push(Direct(uploads=uploads), [large])
    assert "was removed" in str(pushed.error)
    assert ours.list() == []


def test_a_forged_manifest_is_refused(uploads: Uploads, ours: Registry, large: LoRACard) -> None:
    client = Direct(uploads=uploads)
    forged = large.manifest_bytes.replace(b'"large"', b'"larga"')
    client.standing("push", offered(large, manifest_bytes=len(forged)))
    with pytest.raises(PeerError, match="expected the manifest of card"):
        client.standing("put", encode_put(PutHead(digest=large.digest, part="manifest", offset=0), forged))
    with pytest.raises(BusyError, match="begin with"):
        client.standing("put", part(large, 0, 10))


def test_a_false_signature_is_refused(uploads: Uploads, large: LoRACard) -> None:
    client = Direct(uploads=uploads)
    false = Identity.generate().sign(large.manifest_bytes)
    client.standing("push", offered(large, signature=str(false)))
    with pytest.raises(PeerError, match="damaged or forged"):
        client.standing("put", manifest(large))


def test_wrong_tensor_bytes_end_the_push_and_are_not_kept(ours: Registry, uploads: Uploads, large: LoRACard) -> None:
    client = Direct(uploads=uploads)
    client.standing("push", offered(large))
    client.standing("put", manifest(large))
    first = large.manifest.tensors[0].nbytes
    for start in range(0, first - 256 * KIB, 256 * KIB):
        client.standing("put", part(large, start, start + 256 * KIB))
    lie = encode_put(PutHead(digest=large.digest, part="tensors", offset=first - 256 * KIB), bytes(256 * KIB))
    with pytest.raises(PeerError, match="damaged or forged"):
        client.standing("put", lie)
    assert ours.list() == []
    standing = client.standing("push", offered(large))
    assert standing == Standing(kept=False)
    assert client.standing("put", manifest(large)).gaps == ((0, large.nbytes),)


def test_a_wrong_beginning_of_somebody_else_is_asked_for_anew(
    ours: Registry, uploads: Uploads, large: LoRACard
) -> None:
    with ours.drafts.open(replace(large, tensors=())) as draft:
        draft.write(0, memoryview(bytes(256 * KIB)))
        first = large.manifest.tensors[0].nbytes
    (pushed,) = push(Direct(uploads=uploads), [large])
    assert pushed.error is None
    assert pushed.bytes_moved <= large.nbytes + first + len(large.manifest_bytes)
    assert [report.ok for report in ours.verify()] == [True]


def test_nan_that_the_manifest_promises_is_refused(ours: Registry, uploads: Uploads) -> None:
    fine = small_card("bad", modules=1)
    data = bytearray(b"".join(tensor_bytes(fine)))
    data[-4:] = np.float32(np.nan).tobytes()
    fields = json.loads(fine.manifest_bytes)
    fields["tensors"][-1]["digest"] = digest_of(data[-fields["tensors"][-1]["nbytes"] :])
    text = json.dumps(fields).encode()
    digest, client = digest_of(text), Direct(uploads=uploads)
    client.standing("push", encode_push(PushRequest(digest=digest, manifest_bytes=len(text))))
    client.standing("put", encode_put(PutHead(digest=digest, part="manifest", offset=0), text))
    with pytest.raises(CardIntegrityError, match="NaN"):
        client.standing("put", encode_put(PutHead(digest=digest, part="tensors", offset=0), bytes(data)))
    assert ours.list(quarantined=True) == []
    assert [*ours.home.glob("drafts/*")] == []


def test_parts_that_were_not_asked_for_change_nothing(ours: Registry, uploads: Uploads, large: LoRACard) -> None:
    client = Direct(uploads=uploads)
    client.standing("push", offered(large))
    assert client.standing("put", part(large, 0, 100)) == Standing(kept=False)  # before the manifest
    client.standing("put", manifest(large))
    client.standing("put", part(large, 0, 1000))
    assert client.standing("put", part(large, 0, 1000)).gaps == ((1000, large.nbytes),)
    assert client.standing("put", part(large, 900, 1100)).gaps == ((1000, large.nbytes),)
    beyond = encode_put(PutHead(digest=large.digest, part="tensors", offset=large.nbytes), b"more")
    assert client.standing("put", beyond).gaps == ((1000, large.nbytes),)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}\nx",
        b"\xff\xfe\n",
        b'{"digest":"blake3:' + b"0" * 64 + b'","part":"tensors","offset":-1}\nx',
        b'{"digest":"blake3:' + b"0" * 64 + b'","part":"head","offset":0}\nx',
        b'{"digest":"blake3:' + b"0" * 64 + b'","part":"tensors","offset":0}',
        b'{"digest":"blake3:' + b"0" * 64 + b'","part":"tensors","offset":0}\n' + bytes(256 * KIB + 1),
        b"x" * 300 * KIB,
    ],
)
def test_malformed_parts_are_refused(uploads: Uploads, body: bytes) -> None:
    with pytest.raises(PeerError):
        Direct(uploads=uploads).standing("put", body)


def test_more_pushers_than_there_are_places_are_told_to_come_back(
    ours: Registry, large: LoRACard, make_registry: Callable[[str], Registry]
) -> None:
    uploads = taking(ours)
    cards = [small_card(f"card-{number}") for number in range(limits.MAX_UPLOADS + 1)]
    clients = [Direct(uploads=uploads, caller=f"{number:032x}") for number in range(len(cards))]
    for client, card in zip(clients[:-1], cards[:-1], strict=True):
        client.standing("push", offered(card))
    with pytest.raises(BusyError):
        clients[-1].standing("push", offered(cards[-1]))
    push(clients[0], [cards[0]])
    assert clients[-1].standing("push", offered(cards[-1])) == Standing(kept=False)
    uploads.close()


def test_one_that_stalls_loses_its_place(ours: Registry, large: LoRACard) -> None:
    now = [0.0]
    uploads = taking(ours, idle_s=0.02, now=lambda: now[0])
    client = Direct(uploads=uploads)
    client.standing("push", offered(large))
    client.standing("put", manifest(large))
    for start in range(0, MIB, 256 * KIB):
        client.standing("put", part(large, start, start + 256 * KIB))
    now[0] += 1
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            with ours.drafts.open(replace(large, tensors=())) as draft:
                assert draft.gaps() == [(MIB, large.nbytes)]
                break
        except BusyDraftError:
            continue
    else:
        pytest.fail("the draft was never let go")
    with pytest.raises(BusyError):
        client.standing("put", part(large, MIB, MIB + 1))


def test_a_receiver_that_asks_for_the_same_over_and_over_is_left(large: LoRACard) -> None:
    class Greedy:
        def ask(self, action: str, body: bytes = b"", *, more_s: float = 0.0) -> Generator[bytes, None, None]:
            yield b'{"kept":false,"quarantined":null,"manifest":%d,"gaps":[[0,5]]}' % len(large.manifest_bytes)

    class Senseless:
        def ask(self, action: str, body: bytes = b"", *, more_s: float = 0.0) -> Generator[bytes, None, None]:
            yield b'{"kept":false,"quarantined":null,"manifest":%d,"gaps":[[9,5]]}' % len(large.manifest_bytes)

    (pushed,) = push(Greedy(), [small_card("tiny")])
    assert "over and over" in str(pushed.error) or "neither" in str(pushed.error)
    (pushed,) = push(Senseless(), [large])
    assert "neither" in str(pushed.error)
