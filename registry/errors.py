"""Every error arrowmoe raises on purpose, from the root down to what the registry floor can see.

An error says what was expected, what came, and what to do. `hint` is the "what to do", kept apart so that
the command line can print it on a line of its own. Errors of the floors above derive from `ArrowMoEError` too.

ArrowMoEError
├── CardError                 the bytes or the meaning of a card are wrong; the card is refused whole
│   ├── CardFormatError       not an Arrow IPC card, or damaged
│   ├── CardLimitError        larger than a stated limit; refused before it is parsed
│   ├── CardIntegrityError    a digest or a signature does not match
│   ├── ManifestError         the manifest is not valid JSON of the expected form
│   ├── MergeError            the cards cannot become one in the way that was asked
│   ├── QuantisingError       the card cannot be written in fewer bits
│   └── UnsupportedAdapterError   a PEFT adapter holds something that a card cannot
└── RegistryError
    ├── UnknownCardError      no card under that name, label or digest
    │   └── QuarantinedCardError  it is here, in quarantine, so it cannot be used
    ├── AmbiguousCardError    a digest prefix fits several cards
    ├── LabelTakenError       name and version already mean another card
    ├── MissingFileError      the catalog lists a card whose file is not there
    ├── RemovedCardError      the card was removed, by its publisher for good or by this node's owner
    ├── UnknownPeerError      no node is known under that id
    ├── InvitationError       a join token that is none, or not any more
    ├── BusyDraftError        another transfer is bringing that card just now
    ├── NoSpaceError          the disk has no room for a card
    ├── BlobStoreError        the store of the cards' files cannot be reached, or refuses
    └── HomeError             the home directory cannot be used
"""

from __future__ import annotations


class ArrowMoEError(Exception):
    """Root of all errors raised on purpose; `hint` says what to do about it."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class CardError(ArrowMoEError):
    """A card is refused."""


class CardFormatError(CardError):
    """The bytes are not a card of a known format version, or are damaged."""


class CardLimitError(CardError):
    """The card is larger than a stated limit."""


class CardIntegrityError(CardError):
    """A digest or a signature does not match the bytes."""


class ManifestError(CardError):
    """The manifest does not have the expected form."""


class MergeError(CardError):
    """The cards cannot become one in the way that was asked."""


class QuantisingError(CardError):
    """The card cannot be written in fewer bits."""


class UnsupportedAdapterError(CardError):
    """A PEFT adapter holds something that a card cannot hold."""


class RegistryError(ArrowMoEError):
    """The registry cannot do what was asked."""


class UnknownCardError(RegistryError):
    """No card is known under that reference."""


class QuarantinedCardError(UnknownCardError):
    """The card is in quarantine, so it cannot be used until it is admitted."""


class AmbiguousCardError(RegistryError):
    """A reference fits more than one card."""


class LabelTakenError(RegistryError):
    """Name and version already mean another card."""


class MissingFileError(RegistryError):
    """The catalog lists a card whose file is not there."""


class RemovedCardError(RegistryError):
    """The card was removed, by its publisher for good or by this node's owner."""


class UnknownPeerError(RegistryError):
    """No node is known under that id."""


class InvitationError(RegistryError):
    """The join token is none, has expired, or was used by another node."""


class BusyDraftError(RegistryError):
    """Another transfer is bringing that card just now."""


class NoSpaceError(RegistryError):
    """The disk has no room for a card."""


class BlobStoreError(RegistryError):
    """The store of the cards' files cannot be reached, or refuses."""


class HomeError(RegistryError):
    """The home directory cannot be used."""
