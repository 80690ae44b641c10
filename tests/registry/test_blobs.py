"""The blob store: placed by digest, idempotent, immutable, and it heals what the disk damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from registry.blobs import FileBlobStore
from registry.digest import Digest, hex_of
from registry.errors import CardError, CardIntegrityError, MissingFileError, UnknownCardError
from tests.registry.cards import small_card


@pytest.fixture
def blobs(tmp_path: Path) -> FileBlobStore:
    return FileBlobStore(tmp_path / "cards")


def test_a_card_comes_back_with_its_bits(blobs: FileBlobStore) -> None:
    card = small_card(modules=3)
    blobs.put(card)
    found = blobs.load(card.digest, verify=True)
    assert found.manifest_bytes == card.manifest_bytes
    assert [bytes(tensor.data) for tensor in found.tensors] == [bytes(tensor.data) for tensor in card.tensors]


def test_the_path_follows_from_the_digest_alone(blobs: FileBlobStore, tmp_path: Path) -> None:
    card = small_card("any-name")
    blobs.put(card)
    name = hex_of(card.digest)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()] == [
        f"cards/{name[:2]}/{name}.lora.arrow"
    ]


@pytest.mark.parametrize(
    "digest", ["", "blake3:../../etc/passwd", "blake3:" + "A" * 64, "a" * 64, "blake3:" + "a" * 63 + "\n"]
)
def test_what_is_no_digest_has_no_path(blobs: FileBlobStore, digest: str) -> None:
    with pytest.raises(UnknownCardError, match="expected a digest"):
        blobs.path_of(Digest(digest))


def test_putting_again_leaves_the_file_alone(blobs: FileBlobStore) -> None:
    card = small_card()
    blobs.put(card)
    before = blobs.path_of(card.digest).stat()
    blobs.put(card)
    assert blobs.path_of(card.digest).stat().st_ino == before.st_ino


def test_putting_again_replaces_a_damaged_file_and_spares_its_readers(blobs: FileBlobStore) -> None:
    card = small_card()
    blobs.put(card)
    reader = blobs.load(card.digest)
    path = blobs.path_of(card.digest)
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(bytes(card.tensors[0].data))] ^= 1
    path.unlink()
    path.write_bytes(damaged)
    with pytest.raises(CardIntegrityError):
        blobs.load(card.digest, verify=True)
    blobs.put(card)
    blobs.load(card.digest, verify=True)
    assert bytes(reader.tensors[0].data) == bytes(card.tensors[0].data)


def test_a_mapped_card_outlives_its_file(blobs: FileBlobStore) -> None:
    card = small_card()
    blobs.put(card)
    reader = blobs.load(card.digest)
    assert blobs.delete(card.digest)
    assert not blobs.delete(card.digest)
    reader.verify()


def test_a_missing_file_says_what_to_do(blobs: FileBlobStore) -> None:
    with pytest.raises(MissingFileError) as caught:
        blobs.load(small_card().digest)
    assert caught.value.hint is not None
    assert "import" in caught.value.hint


def test_one_card_in_the_place_of_another_is_refused(blobs: FileBlobStore) -> None:
    card, other = small_card("one"), small_card("other")
    blobs.put(card)
    blobs.path_of(other.digest).parent.mkdir(parents=True, exist_ok=True)
    blobs.path_of(card.digest).rename(blobs.path_of(other.digest))
    with pytest.raises(CardIntegrityError, match="exchanged"):
        blobs.load(other.digest)


def test_a_link_out_of_the_store_is_refused(blobs: FileBlobStore, tmp_path: Path) -> None:
    card = small_card()
    blobs.put(card)
    path = blobs.path_of(card.digest)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CardError, match="symbolic link"):
        blobs.load(card.digest)


def test_cleaning_removes_drafts_and_keeps_cards(blobs: FileBlobStore) -> None:
    card = small_card()
    blobs.put(card)
    draft = blobs.path_of(card.digest).parent / ".0123456789abcdef.draft"
    draft.write_bytes(b"half")
    blobs.clean(card.digest)
    assert not draft.exists()
    assert blobs.digests() == {card.digest}


def test_only_cards_are_listed(blobs: FileBlobStore) -> None:
    cards = [small_card(seed=seed) for seed in range(5)]
    for card in cards:
        blobs.put(card)
    folder = blobs.path_of(cards[0].digest).parent
    (folder / "notes.lora.arrow").write_bytes(b"")
    (folder / ".0.draft").write_bytes(b"")
    assert blobs.digests() == {card.digest for card in cards}
    assert FileBlobStore(folder / "none").digests() == set()
