"""Cards in a file system of Arrow's: S3, Google Cloud Storage, Azure, or a mounted directory. Mapped from a cache.

Rules: an object has its final key only once it is whole (written under a draft's key, measured, then copied there), and
what is read from the store is as foreign as a peer's card: bounded, parsed, verified in full, and written anew into the
cache, the only thing that is mapped. Nothing but `digests` believes a listing, which a store may give late.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from registry.blobs import FileBlobStore, relative_path
from registry.card import LoRACard
from registry.digest import Digest, hex_of, is_digest
from registry.errors import (
    BlobStoreError,
    CardError,
    CardIntegrityError,
    CardLimitError,
    HomeError,
    MissingFileError,
)
from registry.files import DRAFT_SUFFIX
from registry.format import SUFFIX, LoRAFormat
from registry.ipc_guard import CardLimits
from registry.logs import get_logger
from registry.pending import Pending
from registry.urls import shown

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

_SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "file")
_CHUNK_BYTES = 4 << 20
_MAX_BYTES = CardLimits().max_file_bytes

_log = get_logger(__name__)


class RemoteBlobStore:
    """Cards as objects ``ab/<64 hex digits>.lora.arrow`` under a root, and a cache on disk that may be deleted.

    Every method raises `BlobStoreError` where the store cannot be reached or refuses.
    """

    def __init__(self, filesystem: FileSystem, root: str, cache: Path, *, place: str) -> None:
        """`place` is how errors and reports call the store."""
        self._fs = filesystem
        self._root = root.rstrip("/")
        self._place = place.rstrip("/")
        self._is_local = filesystem.type_name == "local"
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._cache = FileBlobStore(cache)
        self._locks = Pending(cache)

    @classmethod
    def open(cls, url: str, cache: Path) -> RemoteBlobStore:
        """The store at a URL, such as ``s3://bucket/prefix?region=eu-central-1``. Raises `HomeError`."""
        from pyarrow import fs  # a tenth of a second, for homes that mostly keep their cards themselves

        scheme = url.partition("://")[0]
        if scheme not in _SCHEMES:
            raise HomeError(f"expected a blob store's URL, got {shown(url)[:80]!r}", hint=_URL_HINT)
        try:
            filesystem, root = fs.FileSystem.from_uri(url)
        except (OSError, ValueError, ImportError, pa.ArrowException) as error:
            reason = str(error).replace(url, shown(url))
            raise HomeError(f"cannot use the blob store {shown(url)}: {reason}", hint=_URL_HINT) from None
        if not root.strip("/"):
            raise HomeError(f"expected a bucket or a directory in {shown(url)}", hint=_URL_HINT)
        return cls(filesystem, root, cache, place=shown(url).partition("?")[0])

    def put(self, card: LoRACard) -> None:
        """Store the card, unless a whole one is there; a damaged object is replaced."""
        if self.holds(card.digest) and self._is_whole(card.digest):
            return
        with self._locks.looking_at(card.digest):
            self._cache.put(card)
            self._upload(card.digest)

    def adopt(self, card: LoRACard, file: Path) -> None:
        """Make the file the cache's, and store it."""
        with self._locks.looking_at(card.digest):
            self._cache.adopt(card, file)
            self._upload(card.digest)

    def load(self, digest: Digest, *, verify: bool = False, memory_map: bool = True) -> LoRACard:
        """Read the card from the cache; with `verify` it is fetched anew, for the store's own bytes are meant."""
        if verify or not self._is_cached(digest):
            self._fetch(digest, again=verify)
        return self._cache.load(digest, verify=verify, memory_map=memory_map)

    def holds(self, digest: Digest) -> bool:
        """Whether an object is there."""
        return self._nbytes(self._key(digest)) is not None

    def path_of(self, digest: Digest) -> Path:
        """The card's file in the cache, fetched if need be."""
        if not self._is_cached(digest):
            self._fetch(digest)
        return self._cache.path_of(digest)

    def place_of(self, digest: Digest) -> str:
        """The object's URL."""
        return f"{self._place}/{relative_path(digest)}"

    def delete(self, digest: Digest) -> bool:
        """Delete the object, and the cache's file."""
        with self._locks.looking_at(digest):
            self._cache.delete(digest)
        return self._delete_object(self._key(digest))

    def clean(self, digest: Digest) -> None:
        """Delete the digest's drafts, here and there."""
        with self._locks.looking_at(digest):
            self._cache.clean(digest)
        for key in self._files(self._key(digest).rpartition("/")[0]):
            if key.rpartition("/")[2].startswith(hex_of(digest)) and key.endswith(DRAFT_SUFFIX):
                self._delete_object(key)

    def digests(self) -> set[Digest]:
        """All objects whose keys are those of cards; one that was stored just now may be missing."""
        named = (key.removeprefix(f"{self._root}/") for key in self._files(self._root))
        found = ((Digest(f"blake3:{name.removesuffix(SUFFIX)[3:]}"), name) for name in named)
        return {digest for digest, name in found if is_digest(digest) and relative_path(digest) == name}

    def _key(self, digest: Digest) -> str:
        return f"{self._root}/{relative_path(digest)}"

    def _is_cached(self, digest: Digest) -> bool:
        try:
            self._cache.load(digest)
        except MissingFileError:
            return False
        except CardError as error:
            _log.warning("damaged_cache_replaced", digest=digest, reason=str(error))
            return False
        return True

    def _is_whole(self, digest: Digest) -> bool:
        try:
            self._fetch(digest, again=True)
        except CardError as error:
            _log.warning("damaged_card_replaced", digest=digest, reason=str(error))
            return False
        except MissingFileError:  # another machine has just deleted it
            return False
        return True

    def _fetch(self, digest: Digest, *, again: bool = False) -> None:
        """Put the object's card into the cache; whoever waited for another to do that need not do it `again`."""
        path = self._cache.path_of(digest)
        with self._locks.looking_at(digest):
            if not again and self._is_cached(digest):
                return
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._cache.clean(digest)  # what a killed process left, for nobody else is in this folder now
            draft = path.parent / f".{secrets.token_hex(8)}{DRAFT_SUFFIX}"
            try:
                self._download(digest, draft)
                card = LoRAFormat.load(draft, verify=True)
                if card.digest != digest:
                    raise CardIntegrityError(
                        f"expected card {digest} in {self.place_of(digest)}, got {card.digest}, so it was exchanged",
                        hint="remove the card, then import or sync it again",
                    )
                self._cache.put(card)
            finally:
                draft.unlink(missing_ok=True)

    def _download(self, digest: Digest, draft: Path) -> None:
        place, nbytes = self.place_of(digest), self._nbytes(self._key(digest))
        if nbytes is None:
            raise MissingFileError(
                f"the object of card {digest} is not there: {place}",
                hint="import the card again, or remove it and sync it from a peer",
            )
        if nbytes > _MAX_BYTES:
            raise CardLimitError(f"expected a card of at most {_MAX_BYTES} bytes, {place} has {nbytes}")
        with self._errors("read"):
            source = self._fs.open_input_stream(self._key(digest))
        with source, draft.open("xb") as file:
            left = nbytes  # an object that grows meanwhile is another one: it is cut, and does not verify
            while left > 0 and (chunk := self._read(source, min(left, _CHUNK_BYTES))):
                file.write(chunk)
                left -= len(chunk)

    def _read(self, source: Any, nbytes: int) -> bytes:
        with self._errors("read"):
            return bytes(source.read(nbytes))

    def _upload(self, digest: Digest) -> None:
        """From the cache to a draft's key, and from there, once all of it is there, to the card's."""
        path, key = self._cache.path_of(digest), self._key(digest)
        draft = f"{key.removesuffix(SUFFIX)}.{secrets.token_hex(8)}{DRAFT_SUFFIX}"
        try:
            with self._errors("write"):
                self._write(path, draft)
            self._check_size(draft, path)
            with self._errors("write"):
                self._settle(draft, key)
        except BaseException:
            with suppress(BlobStoreError):  # what went wrong first is what counts; `clean` comes back to the draft
                self._delete_object(draft)
            raise
        self._check_size(key, path)

    def _write(self, path: Path, draft: str) -> None:
        if self._is_local:  # object stores have no directories
            self._fs.create_dir(draft.rpartition("/")[0], recursive=True)
        with path.open("rb") as file, self._fs.open_output_stream(draft) as out:
            while chunk := file.read(_CHUNK_BYTES):
                out.write(chunk)

    def _settle(self, draft: str, key: str) -> None:
        """Renamed where that is one step, and durable; copied, which is one step in an object store, elsewhere."""
        if self._is_local:
            _flush(draft)
            self._fs.move(draft, key)
            _flush(key.rpartition("/")[0])
        else:
            self._fs.copy_file(draft, key)
            self._fs.delete_file(draft)

    def _check_size(self, key: str, path: Path) -> None:
        stored, wanted = self._nbytes(key), path.stat().st_size
        if stored != wanted:
            raise BlobStoreError(
                f"expected {wanted} bytes at {key} after writing them, got {stored}",
                hint="try again",
            )

    def _delete_object(self, key: str) -> bool:
        with self._errors("delete from"):
            try:
                self._fs.delete_file(key)
            except FileNotFoundError:
                return False
            return True

    def _nbytes(self, key: str) -> int | None:
        """The size of an object; None if there is none."""
        with self._errors("look into"):
            info = self._fs.get_file_info(key)
            return int(info.size) if info.is_file else None

    def _files(self, folder: str) -> list[str]:
        from pyarrow import fs

        with self._errors("list"):
            found = self._fs.get_file_info(fs.FileSelector(folder, recursive=True, allow_not_found=True))
            return [info.path for info in found if info.is_file]

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, pa.ArrowException) as error:
            raise BlobStoreError(
                f"could not {what} the blob store {self._place}: {error}",
                hint="check blobs_url, the credentials, and that the store is up; what was begun is undone later",
            ) from error


_URL_HINT = "for example s3://bucket/prefix?region=eu-central-1, gs://bucket/prefix or file:///mnt/cards"


def _flush(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
