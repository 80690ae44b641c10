"""Checks of how a server gives cards to nodes: `manifest` and `tensors`."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

from federation import limits, wire
from federation.conformance.catalog import changes_lead_to_the_last, health
from federation.conformance.checks import check
from federation.conformance.subject import Failed, Subject
from federation.diff import entry_of
from registry.card import LoRACard, check_tensor
from registry.digest import Digest, digest_of
from registry.format import described
from registry.manifest import FORMAT_VERSION
from registry.tensor import Tensor

ABSENT = digest_of(b"a card that nobody has")
_TOLD = ("fingerprint", "rank", "nbytes", "publisher", "has_statistics")
"""Fields of an entry that a card's manifest decides."""

_NO_CARDS = (
    b"",
    b"{}",
    b"\xff\x00 no JSON",
    b'{"digest": 5}',
    b'{"digest": "../../identity.key"}',
    json.dumps({"digest": ABSENT}).encode().ljust(limits.MAX_REQUEST_BYTES + 1),
)
_NO_PARTS: tuple[dict[str, Any], ...] = ({"offset": -1}, {"nbytes": -1}, {"nbytes": "1"}, {"offset": 1.5})


@check("manifest", "the first result is the manifest, whose BLAKE3 hash is the digest", changes_lead_to_the_last)
def manifest(subject: Subject) -> str:
    """Of some cards."""
    for digest in subject.some():
        parts = subject.action(wire.ACTION_MANIFEST, _request(digest))
        came = digest_of(parts[0]) if parts else "nothing"
        if came != digest:
            raise Failed(f"{came} for {digest}")
    return f"that of {len(subject.some())} cards"


@check("manifest", "it is of the card's format; of a signed card a second result is its signature", manifest)
def signature(subject: Subject) -> str:
    """Also the cards without their tensors."""
    for digest in subject.some():
        subject.cards[digest] = _described(subject.action(wire.ACTION_MANIFEST, _request(digest)))
    return f"{sum(card.signature is not None for card in subject.cards.values())} of {len(subject.cards)} are signed"


@check("changes", "an entry says of a card what its manifest says", signature)
def entries(subject: Subject) -> str:
    """Name, version and prose may be the node's own."""
    for digest, card in subject.cards.items():
        told, is_so = subject.entries[digest], entry_of(card)
        for field in _TOLD:
            if getattr(told, field) != getattr(is_so, field):
                raise Failed(f"{field} {getattr(told, field)}, and the manifest {getattr(is_so, field)}, of {digest}")
    return f"{', '.join(_TOLD)} of {len(subject.cards)} cards"


@check("manifest", "a card that is not there is UNKNOWN with not-found", health)
def manifest_absent(subject: Subject) -> str:
    """Any error will not do."""
    return subject.not_found(lambda: subject.action(wire.ACTION_MANIFEST, _request(ABSENT)), ABSENT)


@check("manifest", "a body that is no request, or larger than 4,096 bytes, is refused", health)
def manifest_malformed(subject: Subject) -> str:
    """With an error, and no crash."""
    return subject.refused_all(wire.ACTION_MANIFEST, _NO_CARDS)


@check("tensors", "all tensors' bytes in the manifest's order, each with the manifest's digest", signature)
def tensors(subject: Subject) -> str:
    """Of some cards; they stay for what follows."""
    for digest, card in subject.cards.items():
        messages = subject.action(wire.ACTION_TENSORS, _request(digest))
        _check_tensors(card, b"".join(messages))
        subject.messages[digest] = messages
    return f"{sum(card.nbytes for card in subject.cards.values())} bytes of {len(subject.cards)} cards"


@check("manifest", "for a request with `nbytes`, the same, or with a small card's tensors behind it", tensors)
def manifest_with_tensors(subject: Subject) -> str:
    """Of the first card; a server need not do it."""
    digest, whole = _first(subject)
    card = subject.cards[digest]
    parts = subject.action(wire.ACTION_MANIFEST, _request(digest, nbytes=len(whole)))
    signed = [] if card.signature is None else [str(card.signature).encode()]
    if parts == [card.manifest_bytes, *signed]:
        return "the same"
    if parts[:2] != [card.manifest_bytes, *(signed or [b""])] or b"".join(parts[2:]) != whole:
        raise Failed(f"{len(parts)} results of {sum(map(len, parts))} bytes, where the tensors have {len(whole)}")
    return f"{len(whole)} bytes of tensors"


@check("tensors", "each result holds 1 byte to 1 MiB", tensors)
def tensors_messages(subject: Subject) -> str:
    """A larger one no client takes."""
    sizes = [len(message) for messages in subject.messages.values() for message in messages]
    if min(sizes) < 1 or max(sizes) > limits.TENSOR_CHUNK_BYTES:
        raise Failed(f"{min(sizes)} to {max(sizes)} bytes")
    return f"{min(sizes)} to {max(sizes)} bytes"


@check("tensors", "`nbytes` of the bytes from `offset` on, wherever tensors end; null and missing mean all", tensors)
def tensors_ranges(subject: Subject) -> str:
    """Parts of the first card."""
    digest, whole = _first(subject)
    borders = [0, 1, len(whole) // 3, len(whole) // 2, len(whole) - 1, len(whole)]
    for offset, end in pairwise(sorted(set(borders))):
        _expect(subject, whole[offset:end], digest, offset=offset, nbytes=end - offset)
    _expect(subject, whole[1:], digest, offset=1, nbytes=None)
    _expect(subject, whole[1:], digest, offset=1)
    return f"{len(set(borders)) + 1} parts"


@check("tensors", "as many bytes as there are; at or behind the end no results", tensors)
def tensors_end(subject: Subject) -> str:
    """Of the first card."""
    digest, whole = _first(subject)
    _expect(subject, whole[-1:], digest, offset=len(whole) - 1, nbytes=1000)
    for offset in (len(whole), len(whole) + 1, 1 << 40):
        results = subject.action(wire.ACTION_TENSORS, _request(digest, offset=offset))
        if results:
            raise Failed(f"{len(results)} results from {offset} on, of {len(whole)} bytes")
    return "nothing behind the end"


@check("tensors", "a card that is not there is UNKNOWN with not-found", health)
def tensors_absent(subject: Subject) -> str:
    """Any error will not do."""
    return subject.not_found(lambda: subject.action(wire.ACTION_TENSORS, _request(ABSENT)), ABSENT)


@check("tensors", "a body that is no request, or larger than 4,096 bytes, is refused", health)
def tensors_malformed(subject: Subject) -> str:
    """With an error, and no crash."""
    digest = next(iter(subject.entries), ABSENT)
    return subject.refused_all(wire.ACTION_TENSORS, (*_NO_CARDS, *(_request(digest, **part) for part in _NO_PARTS)))


def _request(digest: Digest, **part: Any) -> bytes:
    return json.dumps({"digest": digest, **part}).encode()


def _described(parts: list[bytes]) -> LoRACard:
    """The card without its tensors, as the results of `manifest` have it."""
    if len(parts) > 2:
        raise Failed(f"{len(parts)} results")
    keys = (wire.MANIFEST_KEY, wire.SIGNATURE_KEY)
    metadata = {wire.FORMAT_KEY: b"%d" % FORMAT_VERSION, **dict(zip(keys, parts, strict=False))}
    found, signed = described(metadata)
    card = LoRACard(manifest_bytes=parts[0], manifest=found, tensors=(), signature=signed)
    card.verify_signature()
    return card


def _check_tensors(card: LoRACard, data: bytes) -> None:
    if len(data) != card.nbytes:
        raise Failed(f"{len(data)} bytes of {card.digest}, which has {card.nbytes}")
    start = 0
    for spec in card.manifest.tensors:
        part = data[start : start + spec.nbytes]
        check_tensor(Tensor.of(spec.name, spec.role, spec.dtype, spec.shape, part), spec)
        start += spec.nbytes


def _first(subject: Subject) -> tuple[Digest, bytes]:
    digest, messages = next(iter(subject.messages.items()))
    return digest, b"".join(messages)


def _expect(subject: Subject, expected: bytes, digest: Digest, **part: Any) -> None:
    came = b"".join(subject.action(wire.ACTION_TENSORS, _request(digest, **part)))
    if came != expected:
        raise Failed(f"{len(came)} bytes that are {'not ' * (len(came) == len(expected))}{len(expected)} for {part}")


CHECKS = (
    manifest,
    signature,
    entries,
    manifest_absent,
    manifest_malformed,
    tensors,
    manifest_with_tensors,
    tensors_messages,
    tensors_ranges,
    tensors_end,
    tensors_absent,
    tensors_malformed,
)

__all__ = ["ABSENT", "CHECKS", "tensors"]
