"""What the registry says about the cards it holds: values, read from the catalog without opening a card."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from registry.digest import Digest


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The peer that a card came from."""

    peer_id: str
    address: str


@dataclass(frozen=True, kw_only=True, slots=True)
class CardEntry:
    """A card as the catalog lists it. `name` and `version` are the manifest's, `labels` what it goes by here."""

    digest: Digest
    name: str
    version: str
    base_name: str | None
    architecture: str | None
    fingerprint: Digest
    rank: int
    nbytes: int
    """Bytes of all tensors."""
    description: str
    domains: tuple[str, ...]
    examples: tuple[str, ...]
    publisher: str | None
    epoch: int
    created: datetime
    added_at: datetime
    tags: tuple[str, ...]
    labels: tuple[str, ...]
    """Each as ``name@version``, sorted by name, the newest version first."""
    origin: Origin | None
    """None: published or imported here."""
    superseded: bool
    """Whether its publisher has published this name and version anew, so that the label cannot mean this card."""
    quarantined: str | None = None
    """Why it is in quarantine, where it is neither used nor passed on; None: it is not."""


@dataclass(frozen=True, kw_only=True)
class Holding:
    """How much there is of something: cards, and the bytes of all their tensors."""

    cards: int
    nbytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class HiddenCard:
    """A card that the owner removed here, though it is not theirs to remove everywhere: no sync brings it back."""

    digest: Digest
    name: str
    version: str
    publisher: str | None
    hidden_at: datetime


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What reading every byte of one card found; `hint` says what to do about `reason`."""

    digest: Digest
    entry: CardEntry | None
    """None: a file without a row."""
    reason: str | None = None
    hint: str | None = None

    @property
    def ok(self) -> bool:
        """Whether file, manifest and row agree."""
        return self.reason is None
