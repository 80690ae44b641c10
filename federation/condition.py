"""How a peer is, in a word that people are shown."""

from __future__ import annotations

from enum import StrEnum

from federation.errors import FederationError, NotApprovedError, TransportError


class Condition(StrEnum):
    """What became of the last attempt to ask a peer what it has."""

    ONLINE = "online"
    """It has cards that are not here."""

    SYNCING = "syncing"
    """Cards are being fetched from it."""

    UP_TO_DATE = "up to date"
    """It has nothing that is not here."""

    PENDING = "pending"
    """It waits for approval here, or this node does there."""

    UNREACHABLE = "unreachable"
    """Nothing came from there."""

    REFUSED = "refused"
    """What came from there is not to be believed, or it did not want to."""

    @classmethod
    def after(cls, error: FederationError) -> Condition:
        """That of a peer that could not be asked."""
        match error:
            case NotApprovedError():
                return cls.PENDING
            case TransportError():
                return cls.UNREACHABLE
            case _:
                return cls.REFUSED


__all__ = ["Condition"]
