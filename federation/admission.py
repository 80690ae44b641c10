"""Whether a card from a peer may come in: it is admitted, kept in quarantine, or refused. Pure; nothing is read here.

A card may be judged before its tensors are here, by its manifest alone, and again with them. Its digests were checked
as it arrived (`federation.client`); whether it is older than what was seen is the registry's to say
(`registry.history`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import zip_longest
from math import hypot, inf, isfinite
from typing import Literal, TypeAlias

import numpy as np

from registry.card import LoRACard
from registry.entries import Holding
from registry.errors import CardIntegrityError
from registry.tensor import Role, Tensor

Strictness = Literal["accept", "quarantine", "refuse"]


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What this node's owner lets in.

    `publishers` are known besides this node and the peers that it has approved; `licences` that are allowed, none
    given: any; `max_norm` bounds what a card does to one module, see `strengths`.
    """

    unknown_publishers: Strictness = "quarantine"
    publishers: frozenset[str] = frozenset()
    unknown_bases: Strictness = "accept"
    licences: tuple[str, ...] = ()
    max_norm: float = 1000.0
    quota_cards: int = 100_000
    quota_bytes: int = 256 << 30
    max_ahead: timedelta = timedelta(days=1)


@dataclass(frozen=True, kw_only=True)
class Known:
    """What this node knows when a card comes from a peer.

    `publishers`: itself and the peers it has approved; `bases`: names of base models, empty if none are known; `held`:
    what it keeps of that peer already, without this card.
    """

    now: datetime
    publishers: Collection[str]
    held: Holding
    bases: Collection[str] = ()


@dataclass(frozen=True, kw_only=True)
class Admitted:
    """The card may be used."""


@dataclass(frozen=True, kw_only=True)
class Quarantined:
    """The card may be kept, and not used before the owner says so."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Refused:
    """The card may not be kept."""

    reason: str


Verdict: TypeAlias = Admitted | Quarantined | Refused
_Objection: TypeAlias = Quarantined | Refused


def admit(card: LoRACard, policy: Policy, known: Known) -> Verdict:
    """The verdict on a card that a peer sent; without its tensors, on what its manifest says.

    One rule that refuses is enough; else every rule that wants quarantine gives its reason.
    """
    objections = [objection for rule in _RULES for objection in rule(card, policy, known)]
    refusals = [objection for objection in objections if isinstance(objection, Refused)]
    if refusals:
        return refusals[0]
    if objections:
        return Quarantined(reason="; ".join(objection.reason for objection in objections))
    return Admitted()


def strengths(card: LoRACard) -> Iterator[tuple[str, float]]:
    """Each module's path with a bound on what the card does there; infinity where a value is no number.

    For s·B·A it is s·‖A‖·‖B‖ (Frobenius), which bounds ‖s·B·A‖ because the norm is submultiplicative; for a tensor
    that replaces one of the base model's, its greatest absolute value. Statistics are not weights and have none.
    """
    for path, parts in card.modules.items():
        for role, tensor in parts.items():
            if role in (Role.MAGNITUDE, Role.BIAS, Role.FULL):
                yield path, _greatest(tensor)
        if Role.A in parts and Role.B in parts:
            scaling = abs(card.manifest.adapter.scaling_of(path))
            strength = scaling * _norm(parts[Role.A]) * _norm(parts[Role.B])
            yield path, strength if isfinite(strength) else inf


def _signature(card: LoRACard, policy: Policy, known: Known) -> Iterator[_Objection]:
    try:
        card.verify_signature()
    except CardIntegrityError as error:
        yield Refused(reason=str(error))


def _publisher(card: LoRACard, policy: Policy, known: Known) -> Iterator[_Objection]:
    publisher = card.manifest.publisher
    if publisher is not None and (publisher in known.publishers or publisher in policy.publishers):
        return
    who = "nobody signed it" if publisher is None else f"its publisher {publisher} is not known here"
    yield from _objection(policy.unknown_publishers, who)


def _base(card: LoRACard, policy: Policy, known: Known) -> Iterator[_Objection]:
    if card.base_name not in known.bases:
        yield from _objection(policy.unknown_bases, f"its base model {_short(card.base_name)} is not known here")


def _licence(card: LoRACard, policy: Policy, known: Known) -> Iterator[_Objection]:
    licence = card.manifest.licence
    allowed = {name.casefold() for name in policy.licences}
    if allowed and (licence is None or licence.casefold() not in allowed):
        yield Quarantined(reason=f"expected a licence out of {', '.join(policy.licences)}, got {_short(licence)}")


def _quota(card: LoRACard, policy: Policy, known: Known) -> Iterator[_Objection]:
    nbytes = known.held.nbytes + card.nbytes
    if known.held.cards >= policy.quota_cards:
        yield Refused(reason=f"expected at most {policy.quota_cards} cards from one peer, got one more")
    if nbytes > policy.quota_bytes:
        yield Refused(reason=f"expected at most {policy.quota_bytes} bytes from one peer, got {nbytes}")


def _freshness(card: LoRACard, policy: Policy, known: Known) -> Iterator[_Objection]:
    """Of two cards of one label the later made wins, so a date in the future would win for years."""
    created = card.manifest.created
    if created - known.now > policy.max_ahead:
        yield Quarantined(
            reason=f"it says it was made at {created.isoformat()}, and here it is {known.now.isoformat()}: "
            "its publisher's clock is wrong, or this node's"
        )


def _shapes(card: LoRACard, policy: Policy, known: Known) -> Iterator[_Objection]:
    if not card.tensors:
        return
    found = [(tensor.name, tensor.role, tensor.dtype, tensor.shape) for tensor in card.tensors]
    promised = [(spec.name, spec.role, spec.dtype, spec.shape) for spec in card.manifest.tensors]
    for got, expected in zip_longest(found, promised):
        if got != expected:
            yield Refused(reason=f"expected tensor {expected}, as its manifest says, got {got}")
            return


def _weights(card: LoRACard, policy: Policy, known: Known) -> Iterator[_Objection]:
    broken = next((tensor for tensor in card.tensors if not tensor.is_finite()), None)
    if broken is not None:
        yield Refused(reason=f"tensor {broken.name!r} ({broken.role}) holds NaN or infinite values")
        return
    strong = [(path, strength) for path, strength in strengths(card) if not strength <= policy.max_norm]
    if strong:
        path, strength = max(strong, key=lambda one: one[1])
        yield Quarantined(
            reason=f"{len(strong)} of its modules are too strong, at most {path!r}: a norm of {strength:.3g}, "
            f"where {policy.max_norm:g} is allowed"
        )


_Rule: TypeAlias = Callable[[LoRACard, Policy, Known], Iterator[_Objection]]
_RULES: tuple[_Rule, ...] = (_signature, _shapes, _weights, _publisher, _base, _licence, _quota, _freshness)


def _objection(strictness: Strictness, reason: str) -> Iterator[_Objection]:
    match strictness:
        case "accept":
            return
        case "quarantine":
            yield Quarantined(reason=reason)
        case "refuse":
            yield Refused(reason=reason)


def _norm(tensor: Tensor) -> float:
    """Frobenius norm; infinity or NaN where a value is, or where squares leave float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        return hypot(*(float(np.sqrt(np.dot(piece, piece))) for piece in tensor.pieces()))


def _greatest(tensor: Tensor) -> float:
    values = [float(np.max(np.abs(piece))) for piece in tensor.pieces()]
    return max(values, default=0.0) if all(map(isfinite, values)) else inf


def _short(text: str | None) -> str:
    return "none" if text is None else repr(text[:80])


__all__ = ["Admitted", "Known", "Policy", "Quarantined", "Refused", "Strictness", "Verdict", "admit", "strengths"]
