"""The tombstone: a publisher's signed word that a card of theirs is removed, everywhere and for good. A value.

Its JSON bytes are kept verbatim, as a manifest's are, and must be the canonical form of themselves. The signature
covers a domain of its own before them, so that no signature of a manifest passes for one of a removal.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property

from pydantic import AwareDatetime, BaseModel, ConfigDict

from registry.digest import Digest
from registry.entries import CardEntry
from registry.errors import CardFormatError, CardIntegrityError, ManifestError
from registry.identity import Identity, Signature
from registry.manifest import CardName, CardVersion, DigestText, Epoch, PublisherId, manifest_bytes

DOMAIN = b"arrowmoe.tombstone.1\0"
MAX_TOMBSTONE_BYTES = 2048


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    digest: DigestText
    name: CardName
    version: CardVersion
    publisher: PublisherId
    epoch: Epoch
    created: AwareDatetime


@dataclass(frozen=True, kw_only=True)
class Tombstone:
    """What `publisher` says of their card: that it is removed. `body` holds the signed JSON, verbatim."""

    digest: Digest
    name: str
    version: str
    publisher: str
    epoch: int
    created: datetime
    body: bytes
    signature: Signature

    @classmethod
    def parse(cls, body: bytes, signature: Signature) -> Tombstone:
        """Read a tombstone that came from elsewhere. Raises `CardFormatError`; see `verify` for its signature."""
        if len(body) > MAX_TOMBSTONE_BYTES:
            raise CardFormatError(f"expected a tombstone of at most {MAX_TOMBSTONE_BYTES} bytes, got {len(body)}")
        try:
            canonical = manifest_bytes(json.loads(body)) == body
            said = _Body.model_validate_json(body)
        except (ValueError, RecursionError, ManifestError) as error:
            raise CardFormatError(f"the tombstone is not of the expected form: {str(error)[:200]}") from error
        if not canonical:
            raise CardFormatError("expected a tombstone as compact JSON with sorted keys, got another form")
        fields = {name: getattr(said, name) for name in _Body.model_fields}
        return cls(**fields, body=body, signature=signature)

    @classmethod
    def of(cls, entry: CardEntry, identity: Identity, *, now: datetime) -> Tombstone:
        """The tombstone of a card that `identity` published."""
        fields = {
            "digest": entry.digest,
            "name": entry.name,
            "version": entry.version,
            "publisher": identity.id,
            "epoch": entry.epoch,
            "created": now.isoformat(timespec="seconds"),
        }
        body = manifest_bytes(fields)
        return cls.parse(body, identity.sign(DOMAIN + body))

    @cached_property
    def label(self) -> str:
        """``NAME@VERSION``."""
        return f"{self.name}@{self.version}"

    def verify(self) -> None:
        """Check that the publisher it names signed it. Raises `CardIntegrityError`."""
        if self.signature.publisher != self.publisher:
            raise CardIntegrityError(
                f"the tombstone of {self.label} names publisher {self.publisher}, but {self.signature.publisher} "
                "signed it, so the card stays"
            )
        try:
            self.signature.check(DOMAIN + self.body)
        except CardIntegrityError as error:
            raise CardIntegrityError(
                f"the signature of publisher {self.publisher} does not fit the tombstone of {self.label}, "
                "so the card stays"
            ) from error


__all__ = ["DOMAIN", "MAX_TOMBSTONE_BYTES", "Tombstone"]
