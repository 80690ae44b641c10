"""Where peers' cards come in: what `federation.admission` says of a card is done here, with what is known now."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from federation import admission
from federation.admission import Admitted, Known, Policy, Quarantined, Refused, Verdict
from federation.errors import AdmissionError
from registry.arrivals import Arrival
from registry.card import LoRACard
from registry.digest import Digest
from registry.entries import CardEntry, Holding, Origin
from registry.errors import ArrowMoEError
from registry.logs import get_logger
from registry.store import Registry

_log = get_logger(__name__)
_NOTHING = Holding(cards=0, nbytes=0)


def _utc_now() -> datetime:
    return datetime.now(UTC)


class Entrance:
    """Lets peers' cards into a registry, as a policy says.

    `publishers` gives the ids that are known besides the registry's own: the peers approved now. `bases` gives the
    names of base models known here.
    """

    def __init__(
        self,
        registry: Registry,
        policy: Policy,
        *,
        publishers: Callable[[], Collection[str]] = tuple,
        bases: Callable[[], Collection[str]] = tuple,
        now: Callable[[], datetime] = _utc_now,
    ) -> None:
        self._registry, self._policy = registry, policy
        self._publishers, self._bases, self._now = publishers, bases, now

    def check(self, card: LoRACard, origin: Origin) -> None:
        """Whether fetching the card is of use, as far as its manifest says.

        Raises `AdmissionError`, and `RemovedCardError` for a card that was removed.
        """
        self._registry.check_removed(card)
        self._quarantine_for(replace(card, tensors=()), origin, self._known_of(origin))

    def keep(self, arrivals: Sequence[Arrival]) -> Sequence[CardEntry | ArrowMoEError | OSError]:
        """`admit` of many cards of peers together, as a transfer calls it: of each its entry, or why not."""
        kept: dict[Digest, CardEntry | ArrowMoEError | OSError] = {}
        judged, held = [], dict[str, Holding]()
        known = self._known(_NOTHING)
        for arrival in arrivals:
            card, origin = arrival.card, arrival.origin
            assert origin is not None
            before = held.get(origin.peer_id) or self._registry.held_from(origin.peer_id)
            try:
                reason = self._reason_for(card, origin, replace(known, held=before))
            except AdmissionError as error:
                kept[card.digest] = error
                continue
            held[origin.peer_id] = Holding(cards=before.cards + 1, nbytes=before.nbytes + card.nbytes)
            judged.append(replace(arrival, quarantine_for=reason))
        entries = self._registry.admit_all(judged) if judged else ()
        kept.update(zip((arrival.card.digest for arrival in judged), entries, strict=True))
        return [kept[arrival.card.digest] for arrival in arrivals]

    def admit(
        self, card: LoRACard, *, origin: Origin, tags: Iterable[str] = (), draft: Path | None = None
    ) -> CardEntry:
        """Keep a verified card, in quarantine if the policy wants that (`CardEntry.quarantined`).

        `draft` is the file in which it lies, if it came by one. Raises `AdmissionError` if the policy refuses it, and
        as `Registry.admit` does.
        """
        reason = self._reason_for(card, origin, self._known_of(origin))
        return self._registry.admit(card, origin=origin, tags=tags, quarantine_for=reason, draft=draft)

    def review(self) -> list[CardEntry]:
        """Judge the cards in quarantine anew, as after a peer was approved, and release those that pass now."""
        held = [entry for entry in self._registry.list(quarantined=True) if entry.quarantined is not None]
        return [self._registry.release(entry.digest) for entry in held if self._passes(entry)]

    def _passes(self, entry: CardEntry) -> bool:
        try:
            card = self._registry.get(entry.digest, quarantined=True)
        except (ArrowMoEError, OSError) as error:  # damaged, or removed meanwhile
            _log.warning("quarantined_card_unreadable", digest=entry.digest, error=str(error))
            return False
        known = self._known(_NOTHING)  # it is kept already
        cheap = admission.admit(replace(card, tensors=()), self._policy, known)
        return isinstance(cheap, Admitted) and isinstance(admission.admit(card, self._policy, known), Admitted)

    def _reason_for(self, card: LoRACard, origin: Origin, known: Known) -> str | None:
        """`_quarantine_for`, with a line in the log."""
        reason = self._quarantine_for(card, origin, known)
        if reason is not None:
            _log.warning("card_quarantined", card=card.name, digest=card.digest, peer=str(origin), reason=reason)
        return reason

    def _quarantine_for(self, card: LoRACard, origin: Origin, known: Known) -> str | None:
        """The reason to keep the card in quarantine; None if there is none. Raises `AdmissionError`."""
        verdict: Verdict = admission.admit(card, self._policy, known)
        match verdict:
            case Refused(reason=reason):
                raise AdmissionError(
                    f"{card.name}@{card.version} from {origin.address} is refused: {reason}",
                    hint="the settings under `trust` say what is let in: `arrowmoe config show`",
                )
            case Quarantined(reason=reason):
                return reason
            case Admitted():
                return None

    def _known_of(self, origin: Origin) -> Known:
        return self._known(self._registry.held_from(origin.peer_id))

    def _known(self, held: Holding) -> Known:
        return Known(
            now=self._now(),
            publishers={self._registry.identity.id, *self._publishers()},
            bases=self._bases(),
            held=held,
        )


__all__ = ["Entrance"]
