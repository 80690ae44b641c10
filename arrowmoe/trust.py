"""What the settings say of peers' cards, as admission takes it."""

from __future__ import annotations

from arrowmoe.settings import TrustSettings
from federation.admission import Policy


def policy_of(settings: TrustSettings, *, open: bool) -> Policy:
    """The policy that a node's owner set; `open`: unknown nodes are answered, so unknown publishers are heard too."""
    unknown = settings.unknown_publishers
    return Policy(
        unknown_publishers=unknown if unknown != "auto" else "accept" if open else "quarantine",
        publishers=frozenset(settings.publishers),
        unknown_bases=settings.unknown_bases,
        licences=settings.licences,
        max_norm=settings.max_norm,
        quota_cards=settings.quota_cards,
        quota_bytes=int(settings.quota_gib * (1 << 30)),
    )


__all__ = ["policy_of"]
