"""A node's registry: its home directory, with its identity, its cards and the catalog of them.

Rules that make a kill at any moment harmless: a card's file is durable before its row is written, and its row is gone
before its file is removed; whatever was under way is noted (`registry.pending`) and undone at the next start. A card
is published when its row is committed; a file that no note mentions is reported by `verify`, never removed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from registry import listing
from registry.arrivals import Arrival
from registry.blobs import BlobStore, FileBlobStore
from registry.card import LoRACard
from registry.catalog import Catalog
from registry.changes import Changes
from registry.database import Database, sqlite_url
from registry.digest import Digest
from registry.drafts import Drafts
from registry.entries import CardEntry, HiddenCard, Holding, Origin, VerifyReport
from registry.errors import ArrowMoEError, LabelTakenError, RegistryError, RemovedCardError, UnknownCardError
from registry.files import room_for
from registry.format import LoRAFormat
from registry.homes import home_errors, make_home
from registry.identity import Identity
from registry.logs import get_logger
from registry.names import checked_name, checked_tags, checked_version
from registry.pending import Pending
from registry.remote_blobs import RemoteBlobStore
from registry.signing import Signer
from registry.tombstones import Tombstone
from registry.verification import verified

__all__ = ["CardEntry", "Origin", "Registry", "VerifyReport"]

_CARDS, _CACHE, _DRAFTS, _TMP, _CATALOG = "cards", "cache", "drafts", "tmp", "catalog.sqlite"

_log = get_logger(__name__)

Entries = list[CardEntry]  # within the class `list` is its method
Reports = list[VerifyReport]
HiddenCards = list[HiddenCard]


class Registry:
    """Cards of one node. Several processes may use one home at once, and several threads one registry.

    `database` also holds what other floors remember.
    """

    def __init__(self, home: Path, identity: Identity, blobs: BlobStore, database: Database) -> None:
        self.home = home
        self.identity = identity
        self._blobs = blobs
        self.database = database
        self._catalog = Catalog(database)
        self._signer = Signer(identity, self._catalog, blobs)
        self._pending = Pending(home / _TMP)
        self.drafts = Drafts(home / _DRAFTS)
        self.recover()

    @classmethod
    def open(cls, home: Path | str, *, catalog_url: str | None = None, blobs_url: str | None = None) -> Registry:
        """Open a home, made if there is none (mode 0700).

        `catalog_url` names a database other than its SQLite file, `blobs_url` a store of cards other than its folder
        (`registry.remote_blobs`). Raises `HomeError`, and `RegistryError` where the database fails.
        """
        home = Path(home).expanduser().absolute()
        with home_errors(home), ExitStack() as undo:
            make_home(home, (_CARDS, _TMP))
            identity = Identity.open(home)
            database = Database(catalog_url or sqlite_url(home / _CATALOG))
            undo.callback(database.close)
            blobs = RemoteBlobStore.open(blobs_url, home / _CACHE) if blobs_url else FileBlobStore(home / _CARDS)
            registry = cls(home, identity, blobs, database)
            undo.pop_all()
            return registry

    def publish(self, card: LoRACard, *, tags: Iterable[str] = ()) -> CardEntry:
        """Store a card of this node under its name and version; an unsigned one is signed first.

        It is signed with the next epoch of this node and the name. The same card again gives the same entry, and so
        does an unsigned one that differs only in when it was made. Raises `LabelTakenError` if the label means another
        card, `RemovedCardError` for a signed one that its publisher removed, and `CardIntegrityError` if the card
        does not hold what its manifest promises.
        """
        tags = checked_tags(tags)
        if card.signature is not None:
            return self._store(card, tags=tags, exclusive=True, verify=True)
        while True:
            signed = self._signer.signed(card)
            try:
                return self._store(signed, tags=tags, exclusive=True, newest=True, verify=True)
            except (LabelTakenError, RemovedCardError):
                continue  # another process published or removed one of this name since, so there is a next epoch

    def admit(
        self,
        card: LoRACard,
        *,
        origin: Origin,
        tags: Iterable[str] = (),
        quarantine_for: str | None = None,
        draft: Path | None = None,
    ) -> CardEntry:
        """Store a peer's card, whose tensors were verified as they came, byte for byte as it was signed.

        `draft` is the file in which it lies, if it came by way of `registry.drafts`.

        If its label means another card here, both stay; if its publisher has published that label anew, the card
        comes without it. With `quarantine_for`, a reason, it goes into quarantine: it is kept, and is neither listed,
        used nor passed on before `release`. Raises `CardIntegrityError` for a false signature, and
        `RemovedCardError` for a card that its publisher removed, or this node's owner.
        """
        card.verify_signature()
        return self._store(card, tags=checked_tags(tags), origin=origin, quarantine_for=quarantine_for, draft=draft)

    def admit_all(self, arrivals: Sequence[Arrival]) -> Sequence[CardEntry | ArrowMoEError | OSError]:
        """`admit` many cards that lie in drafts, together: of each its entry, or why it was not kept.

        Each is kept wholly or not at all; what stops them together is tried again with each alone.
        """
        try:
            return self._admit_together(arrivals)
        except (ArrowMoEError, OSError) as error:
            if len(arrivals) == 1:
                return [error]
        return [kept for arrival in arrivals for kept in self.admit_all([arrival])]

    def _admit_together(self, arrivals: Sequence[Arrival]) -> Sequence[CardEntry | RemovedCardError]:
        """The files first, then the rows."""
        for arrival in arrivals:
            arrival.card.verify_signature()
        digests = [arrival.card.digest for arrival in arrivals]
        with room_for(_shown(arrivals), self.home), self._pending.working_on(*digests):
            for arrival in arrivals:
                self._place(arrival.card, arrival.draft)
            kept = self._catalog.add_all(arrivals)
            for digest in digests:
                if isinstance(kept[digest], RemovedCardError):
                    self._blobs.delete(digest)
        for entry in kept.values():
            if isinstance(entry, CardEntry):
                _log_stored(entry)
        return [kept[digest] for digest in digests]

    def release(self, ref: str) -> CardEntry:
        """Let the card behind `ref` out of quarantine. Raises `UnknownCardError` or `AmbiguousCardError`."""
        entry = self._catalog.admit(ref)
        _log.info("card_released", name=entry.name, version=entry.version, digest=entry.digest)
        return entry

    def restore(self, card: LoRACard) -> None:
        """Write the file of a card that is here anew, because it is lost or damaged.

        Raises `CardIntegrityError` if `card` does not hold what its manifest promises, `UnknownCardError` if it is
        not here.
        """
        card.verify()
        with self._pending.working_on(card.digest):
            here = self._catalog.holds(card.digest)
            if here:
                self._blobs.put(card)
        if not here:
            raise UnknownCardError(f"no card is known as {card.digest!r}", hint="it was removed meanwhile")
        _log.info("card_restored", name=card.name, version=card.version, digest=card.digest)

    def import_file(self, path: Path | str, *, tags: Iterable[str] = ()) -> CardEntry:
        """Store the card in a foreign `.lora.arrow` file: read in full, verified, and written anew. Not signed anew.

        If its label means another card here, both stay; a card that was hidden or in quarantine here is so no more.
        Raises `CardError`, and `RemovedCardError` for a card that its publisher removed.
        """
        card = LoRAFormat.load(path, memory_map=False, verify=True)
        return self._store(card, tags=checked_tags(tags))

    def get(self, ref: str, *, verify: bool = False, quarantined: bool = False) -> LoRACard:
        """The card behind a name, name@version, digest, or unique prefix of one (8 hex digits or more), mapped.

        A bare name means its newest version. Raises `UnknownCardError`, `AmbiguousCardError`, `MissingFileError`,
        or `CardError` for a damaged file; with `verify` every byte is compared with its digest. A card in quarantine
        is unknown (`QuarantinedCardError`) unless `quarantined`.
        """
        return self._blobs.load(self._catalog.resolve(ref, quarantined=quarantined), verify=verify)

    def entry(self, ref: str, *, quarantined: bool = False) -> CardEntry:
        """What the catalog says of the card behind `ref`. Raises `UnknownCardError` or `AmbiguousCardError`.

        A card in quarantine is unknown (`QuarantinedCardError`) unless `quarantined`.
        """
        return self._catalog.entry(ref, quarantined=quarantined)

    def next_version(self, name: str) -> str:
        """A version of `name` that is free and above all others."""
        return self._catalog.next_version(name)

    def list(
        self,
        *,
        name: str | None = None,
        base: str | None = None,
        tag: str | None = None,
        quarantined: bool = False,
    ) -> Entries:
        """Entries by name, newest version first. `base`: a base model's name, architecture or fingerprint.

        With `quarantined`, those in quarantine too.
        """
        asked = ((listing.of_name, name), (listing.of_base, base), (listing.tagged, tag))
        conditions = [condition(value) for condition, value in asked if value is not None]
        return self._catalog.list(*conditions, quarantined=quarantined)

    def newest(self) -> Entries:
        """The newest version of each card: of each name, for each base model."""
        found: dict[tuple[str, str | None], CardEntry] = {}
        for entry in self.list():
            if not entry.superseded:
                found.setdefault((entry.name, entry.base_name), entry)
        return [*found.values()]

    def search(self, text: str) -> Entries:
        """Entries with words of `text` in name, description, domains, examples or tags; most words first."""
        return self._catalog.search(text)

    def label(self, ref: str, name: str, version: str) -> None:
        """Make `name@version` mean the card behind `ref`, and no other; here only, for the card stays as it is."""
        self._catalog.label(ref, checked_name(name), checked_version(version))

    def tag(self, ref: str, *tags: str) -> None:
        """Add tags to the card behind `ref`."""
        self._catalog.tag(ref, checked_tags(tags))

    def untag(self, ref: str, *tags: str) -> None:
        """Take tags off the card behind `ref`."""
        self._catalog.untag(ref, tags)

    def remove(self, ref: str) -> CardEntry:
        """Remove the card behind `ref` with all its labels; who has it open keeps it until they let go.

        A card that this node published is removed everywhere and for good, by a signed tombstone. Another's is only
        hidden here: no sync fetches it again until it is imported by hand, or `unhide` lets it come.
        """
        entry = self._catalog.entry(ref, quarantined=True)
        if entry.publisher == self.identity.id:
            if not self._bury(Tombstone.of(entry, self.identity, now=datetime.now(UTC))):
                raise UnknownCardError(f"no card is known as {ref[:200]!r}", hint="another process has removed it")
        else:
            with self._pending.working_on(entry.digest):
                self._catalog.remove(entry.digest)
                self._blobs.delete(entry.digest)
        _log.info("card_removed", name=entry.name, version=entry.version, digest=entry.digest)
        return entry

    def apply_tombstone(self, tombstone: Tombstone, *, origin: Origin | None = None) -> bool:
        """Remove the card of a tombstone that `origin` passed on, or keep it from ever coming; False if known before.

        Raises `CardIntegrityError` if it is not signed by its publisher, or is not of that publisher's card.
        """
        tombstone.verify()
        news = self._bury(tombstone)
        if news:
            source = None if origin is None else origin.peer_id
            _log.info("tombstone_applied", card=tombstone.label, digest=tombstone.digest, peer=source)
        return news

    def _bury(self, tombstone: Tombstone) -> bool:
        """The row first, then the file."""
        with self._pending.working_on(tombstone.digest):
            news = self._catalog.bury(tombstone)
            if news:
                self._blobs.delete(tombstone.digest)
        return news

    def hidden(self) -> HiddenCards:
        """The cards that were removed here only."""
        return self._catalog.hidden()

    def unhide(self, ref: str) -> HiddenCard:
        """Let the hidden card behind `ref` come back by a sync. Raises `UnknownCardError` or `AmbiguousCardError`."""
        return self._catalog.unhide(ref)

    def refused(self, offered: Iterable[tuple[Digest, str | None]]) -> set[Digest]:
        """Those of the `offered` cards (digest, publisher) that need not come: removed, or in quarantine here."""
        return self._catalog.refused(offered)

    def check_removed(self, card: LoRACard) -> None:
        """Raise `RemovedCardError` for a card that its publisher removed, or this node's owner."""
        self._catalog.check(card, by_hand=False, exclusive=False, newest=False)

    def held_from(self, peer_id: str) -> Holding:
        """How much came from the peer and is still here, in quarantine or not."""
        return self._catalog.held_from(peer_id)

    def entries(self, digests: Iterable[Digest]) -> Entries:
        """Those of the cards that are here and not in quarantine, in no stated order."""
        return self._catalog.entries(digests)

    def changes(self, since: int = 0, limit: int = 1000) -> Changes:
        """What changed here after number `since`: cards that came, were removed or hidden. See `registry.changes`."""
        return self._catalog.changes(since, limit)

    def verify(self, ref: str | None = None) -> Reports:
        """Read every byte of one card, or of all, and of files without rows; what is damaged stays as it is."""
        if ref is not None:
            digests = {self._catalog.resolve(ref, quarantined=True)}
        else:
            self.recover()
            digests = self._catalog.digests(quarantined=True) | self._blobs.digests()
        reports = (verified(digest, self._catalog, self._blobs, self._pending) for digest in sorted(digests))
        return [report for report in reports if report is not None]

    def export(self, ref: str, directory: Path | str) -> Path:
        """Write the card behind `ref` as a PEFT adapter directory, and return its path."""
        directory = Path(directory)
        self.get(ref, verify=True).to_peft(directory)
        return directory

    def digests(self, *, quarantined: bool = False) -> set[Digest]:
        """All cards here; with `quarantined`, those in quarantine too."""
        return self._catalog.digests(quarantined=quarantined)

    def path_of(self, digest: Digest) -> Path:
        """The file that holds a card. Raises `UnknownCardError` for a card that is not here, or is in quarantine."""
        if not self._catalog.is_admitted(digest):
            raise UnknownCardError(f"no card is known as {digest[:80]!r}")
        return self._blobs.path_of(digest)

    def recover(self) -> None:
        """Undo what a killed process, or one whose database failed, left half done.

        That is drafts, and files whose row was not written yet or is gone.
        """
        for digest in self._pending.interrupted():
            self._blobs.clean(digest)
            if not self._catalog.holds(digest) and self._blobs.delete(digest):
                _log.warning("interrupted_work_undone", digest=digest)

    def close(self) -> None:
        """Let go of the catalog; cards that were loaded stay usable."""
        self.database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _store(
        self,
        card: LoRACard,
        *,
        tags: Iterable[str],
        origin: Origin | None = None,
        exclusive: bool = False,
        newest: bool = False,
        verify: bool = False,
        quarantine_for: str | None = None,
        draft: Path | None = None,
    ) -> CardEntry:
        """The file first, then the row."""
        if verify:
            card.verify()
        if draft is None:  # else nothing would be saved: `add` checks too
            self._catalog.check(card, by_hand=origin is None, exclusive=exclusive, newest=newest)
        refusal: RegistryError | None = None
        with room_for(f"card {card.name}@{card.version}", self.home), self._pending.working_on(card.digest):
            self._place(card, draft)
            try:
                entry = self._catalog.add(
                    card, tags=tags, origin=origin, exclusive=exclusive, newest=newest, quarantine_for=quarantine_for
                )
            except (LabelTakenError, RemovedCardError) as error:  # since the check
                if not self._catalog.holds(card.digest):  # it may be in quarantine
                    self._blobs.delete(card.digest)
                refusal = error
        if refusal is not None:
            raise refusal
        _log_stored(entry)
        return entry

    def _place(self, card: LoRACard, draft: Path | None) -> None:
        if draft is None:
            self._blobs.put(card)
        else:
            self._blobs.adopt(card, draft)


def _shown(arrivals: Sequence[Arrival]) -> str:
    first = arrivals[0].card
    return f"card {first.name}@{first.version}" + (f" and {len(arrivals) - 1} more" if arrivals[1:] else "")


def _log_stored(entry: CardEntry) -> None:
    _log.info("card_stored", name=entry.name, version=entry.version, digest=entry.digest, quarantined=entry.quarantined)
