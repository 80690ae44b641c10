"""Where the cards' bytes lie: by digest, immutable, written only by this node.

What is in such a store was parsed, verified and written anew here; nothing is ever copied in. The store knows no
names and no rows (`registry.catalog`), and does not say when a card may go (`registry.store`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from registry.card import LoRACard
from registry.digest import Digest, hex_of, is_digest
from registry.errors import CardError, CardIntegrityError, MissingFileError, UnknownCardError
from registry.files import DRAFT_SUFFIX, link_whole
from registry.format import SUFFIX, LoRAFormat
from registry.logs import get_logger

_log = get_logger(__name__)


class BlobStore(Protocol):
    """Cards by digest. Of one digest, only one `put`, `delete` or `clean` runs at a time: the caller sees to that."""

    def put(self, card: LoRACard) -> None:
        """Store `card`, durably when this returns; nothing to do if it is there and whole.

        Raises `OSError`, or `BlobStoreError` for a store elsewhere.
        """

    def adopt(self, card: LoRACard, file: Path) -> None:
        """Store `card`, which lies whole, verified and durable in a `file` of this machine. Raises as `put` does.

        The file stays where it is, and may become the stored one: nobody may write to it any more.
        """

    def load(self, digest: Digest, *, verify: bool = False, memory_map: bool = True) -> LoRACard:
        """The card. Raises `MissingFileError`, or `CardError` for a damaged file."""

    def holds(self, digest: Digest) -> bool:
        """Whether the card is stored, damaged or not. Raises `UnknownCardError` for what is no digest."""

    def path_of(self, digest: Digest) -> Path:
        """A file on this machine that holds the card, if it is stored at all. Raises `UnknownCardError`.

        A store elsewhere raises as `load` does.
        """

    def place_of(self, digest: Digest) -> str:
        """Where the card is stored, for people to read."""

    def delete(self, digest: Digest) -> bool:
        """Remove the card; whether it was there. A reader that has it mapped keeps it."""

    def clean(self, digest: Digest) -> None:
        """Remove what an interrupted `put` of this digest left behind, except for a whole card."""

    def digests(self) -> set[Digest]:
        """All cards that are stored."""


def relative_path(digest: Digest) -> str:
    """``ab/<64 hex digits>.lora.arrow``, which follows from the digest alone. Raises `UnknownCardError`."""
    if not is_digest(digest):
        raise UnknownCardError(f"expected a digest 'blake3:' and 64 hex digits, got {digest[:80]!r}")
    name = hex_of(digest)
    return f"{name[:2]}/{name}{SUFFIX}"


class FileBlobStore:
    """Cards as files ``ab/<64 hex digits>.lora.arrow`` under a root; the path follows from the digest alone."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def put(self, card: LoRACard) -> None:
        """Write the card, unless a whole one is there; a damaged file is replaced."""
        path = self.path_of(card.digest)
        if path.exists() and self._is_whole(card.digest):
            return
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        LoRAFormat.save(card, path)

    def adopt(self, card: LoRACard, file: Path) -> None:
        """Make the file the card's, as another link of it; written anew where the file system has no links."""
        path = self.path_of(card.digest)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            link_whole(file, path)
        except OSError as error:
            _log.warning("link_impossible", path=str(path), reason=str(error))
            self.put(card)

    def load(self, digest: Digest, *, verify: bool = False, memory_map: bool = True) -> LoRACard:
        """Read the card; its tensors are views of the mapped file."""
        path = self.path_of(digest)
        if not path.exists():
            raise MissingFileError(
                f"the file of card {digest} is not there: {path}",
                hint="import the card again, or remove it and sync it from a peer",
            )
        card = LoRAFormat.load(path, verify=verify, memory_map=memory_map)
        if card.digest != digest:
            raise CardIntegrityError(
                f"expected card {digest} in {path}, got {card.digest}, so the file was exchanged",
                hint="remove the card, then import or sync it again",
            )
        return card

    def holds(self, digest: Digest) -> bool:
        """Whether the file is there."""
        return self.path_of(digest).exists()

    def path_of(self, digest: Digest) -> Path:
        """The card's place, whether or not it is there."""
        return self._root / relative_path(digest)

    def place_of(self, digest: Digest) -> str:
        """The file's path."""
        return str(self.path_of(digest))

    def delete(self, digest: Digest) -> bool:
        """Unlink the file."""
        try:
            self.path_of(digest).unlink()
        except FileNotFoundError:
            return False
        return True

    def clean(self, digest: Digest) -> None:
        """Unlink the drafts in the card's folder."""
        for draft in self.path_of(digest).parent.glob(f".*{DRAFT_SUFFIX}"):
            draft.unlink(missing_ok=True)

    def digests(self) -> set[Digest]:
        """All files whose names are digests."""
        names = (path.name.removesuffix(SUFFIX) for path in self._root.glob(f"??/*{SUFFIX}"))
        return {digest for name in names if is_digest(digest := Digest(f"blake3:{name}"))}

    def _is_whole(self, digest: Digest) -> bool:
        try:
            self.load(digest, verify=True, memory_map=False)
        except CardError as error:
            _log.warning("damaged_card_replaced", digest=digest, reason=str(error))
            return False
        return True
