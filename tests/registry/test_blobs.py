"""The blob store: a contract for every place where cards can lie, and what holds of a directory or elsewhere only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from moto.server import ThreadedMotoServer
from pyarrow import fs

from registry.blobs import BlobStore, FileBlobStore, relative_path
from registry.digest import Digest, hex_of
from registry.errors import (
    BlobStoreError,
    CardError,
    CardIntegrityError,
    HomeError,
    MissingFileError,
    UnknownCardError,
)
from registry.format import LoRAFormat
from registry.remote_blobs import RemoteBlobStore
from registry.store import Registry
from tests.registry.cards import small_card

REMOTE = ("mounted", "s3")


@dataclass(frozen=True, kw_only=True)
class Place:
    """A blob store, and what lies in it, seen past it."""

    blobs: BlobStore
    files: fs.FileSystem

    def read(self, name: str) -> bytes:
        with self.files.open_input_stream(name) as stream:
            return bytes(stream.read())

    def write(self, name: str, data: bytes) -> None:
        self.files.create_dir(name.rpartition("/")[0])
        if self.files.get_file_info(name).is_file:
            self.files.delete_file(name)  # never in place: somebody may have it mapped
        with self.files.open_output_stream(name) as stream:
            stream.write(data)

    def names(self) -> list[str]:
        found = self.files.get_file_info(fs.FileSelector("", recursive=True, allow_not_found=True))
        return sorted(info.path for info in found if info.is_file)

    def damage(self, digest: Digest, tensor: bytes) -> None:
        """Flip one bit of a tensor."""
        data = bytearray(self.read(relative_path(digest)))
        data[data.index(tensor)] ^= 1
        self.write(relative_path(digest), bytes(data))


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """An S3 on loopback, as HOST:PORT."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"{host}:{port}"
    server.stop()


@pytest.fixture
def bucket_url(s3_server: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store in a bucket of its own; its key stands in the URL."""
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    bucket = f"cards-{abs(hash(request.node.nodeid))}"
    server = {"endpoint_override": s3_server, "scheme": "http", "region": "us-east-1"}
    admin = fs.S3FileSystem(access_key="me", secret_key="hush", allow_bucket_creation=True, **server)
    admin.create_dir(bucket)
    return f"s3://me:hush@{bucket}/cards?scheme=http&endpoint_override={s3_server}&region=us-east-1"


@pytest.fixture
def url_of(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], str]:
    """The URL of a store elsewhere, by kind."""

    def url(kind: str) -> str:
        return str(request.getfixturevalue("bucket_url")) if kind == "s3" else (tmp_path / "mounted").as_uri()

    return url


@pytest.fixture(params=["directory", *REMOTE])
def place(request: pytest.FixtureRequest, url_of: Callable[[str], str], tmp_path: Path) -> Place:
    if request.param == "directory":
        files = fs.SubTreeFileSystem(str(tmp_path / "cards"), fs.LocalFileSystem())
        return Place(blobs=FileBlobStore(tmp_path / "cards"), files=files)
    return _elsewhere(url_of(request.param), tmp_path)


@pytest.fixture(params=REMOTE)
def elsewhere(request: pytest.FixtureRequest, url_of: Callable[[str], str], tmp_path: Path) -> Place:
    return _elsewhere(url_of(request.param), tmp_path)


def _elsewhere(url: str, tmp_path: Path) -> Place:
    files, root = fs.FileSystem.from_uri(url)
    return Place(blobs=RemoteBlobStore.open(url, tmp_path / "cache"), files=fs.SubTreeFileSystem(root, files))


# The contract -------------------------------------------------------------------------------------------------------


def test_a_card_comes_back_with_its_bits(place: Place) -> None:
    card = small_card(modules=3)
    place.blobs.put(card)
    found = place.blobs.load(card.digest, verify=True)
    assert found.manifest_bytes == card.manifest_bytes
    assert [bytes(tensor.data) for tensor in found.tensors] == [bytes(tensor.data) for tensor in card.tensors]
    assert place.blobs.holds(card.digest)
    assert place.blobs.path_of(card.digest).is_file()


def test_the_name_follows_from_the_digest_alone(place: Place) -> None:
    card = small_card("any-name")
    place.blobs.put(card)
    name = hex_of(card.digest)
    assert place.names() == [f"{name[:2]}/{name}.lora.arrow"]
    assert place.blobs.place_of(card.digest).endswith(f"/{name[:2]}/{name}.lora.arrow")


@pytest.mark.parametrize(
    "digest", ["", "blake3:../../etc/passwd", "blake3:" + "A" * 64, "a" * 64, "blake3:" + "a" * 63 + "\n"]
)
def test_what_is_no_digest_has_no_place(place: Place, digest: str) -> None:
    for ask in (place.blobs.path_of, place.blobs.place_of, place.blobs.holds, place.blobs.load, place.blobs.delete):
        with pytest.raises(UnknownCardError, match="expected a digest"):
            ask(Digest(digest))


def test_putting_again_leaves_the_file_alone(place: Place) -> None:
    card = small_card()
    place.blobs.put(card)
    before = place.files.get_file_info(relative_path(card.digest)).mtime_ns
    place.blobs.put(card)
    assert place.files.get_file_info(relative_path(card.digest)).mtime_ns == before


def test_putting_again_replaces_a_damaged_file_and_spares_its_readers(place: Place) -> None:
    card = small_card()
    place.blobs.put(card)
    reader = place.blobs.load(card.digest)
    place.damage(card.digest, bytes(card.tensors[0].data))
    with pytest.raises(CardIntegrityError):
        place.blobs.load(card.digest, verify=True)
    place.blobs.put(card)
    place.blobs.load(card.digest, verify=True)
    assert bytes(reader.tensors[0].data) == bytes(card.tensors[0].data)


def test_a_mapped_card_outlives_its_file(place: Place) -> None:
    card = small_card()
    place.blobs.put(card)
    reader = place.blobs.load(card.digest)
    assert place.blobs.delete(card.digest)
    assert not place.blobs.delete(card.digest)
    assert not place.blobs.holds(card.digest)
    reader.verify()


def test_a_missing_file_says_what_to_do(place: Place) -> None:
    with pytest.raises(MissingFileError) as caught:
        place.blobs.load(small_card().digest)
    assert caught.value.hint is not None
    assert "import" in caught.value.hint


def test_one_card_in_the_place_of_another_is_refused(place: Place) -> None:
    card, other = small_card("one"), small_card("other")
    place.blobs.put(card)
    place.write(relative_path(other.digest), place.read(relative_path(card.digest)))
    with pytest.raises(CardIntegrityError, match="exchanged"):
        place.blobs.load(other.digest)


def test_cleaning_removes_drafts_and_keeps_cards(place: Place) -> None:
    card = small_card()
    place.blobs.put(card)
    name = hex_of(card.digest)
    drafts = [f"{name[:2]}/{name}.0123456789abcdef.draft"]
    if isinstance(place.blobs, FileBlobStore):
        drafts = [f"{name[:2]}/.0123456789abcdef.draft"]
    for draft in drafts:
        place.write(draft, b"half")
    assert place.blobs.digests() == {card.digest}
    place.blobs.clean(card.digest)
    assert place.names() == [relative_path(card.digest)]


def test_only_cards_are_listed(place: Place) -> None:
    assert place.blobs.digests() == set()
    cards = [small_card(seed=seed) for seed in range(3)]
    for card in cards:
        place.blobs.put(card)
    folder = relative_path(cards[0].digest)[:2]
    place.write(f"{folder}/notes.lora.arrow", b"-")
    place.write(f"{folder}/.0.draft", b"-")
    assert place.blobs.digests() == {card.digest for card in cards}


# In a directory -----------------------------------------------------------------------------------------------------


def test_a_link_out_of_the_store_is_refused(tmp_path: Path) -> None:
    card, blobs = small_card(), FileBlobStore(tmp_path / "cards")
    blobs.put(card)
    path = blobs.path_of(card.digest)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CardError, match="symbolic link"):
        blobs.load(card.digest)


# Elsewhere ----------------------------------------------------------------------------------------------------------


def test_the_cache_may_go_at_any_time(elsewhere: Place) -> None:
    card = small_card()
    elsewhere.blobs.put(card)
    cached = elsewhere.blobs.path_of(card.digest)
    cached.unlink()
    elsewhere.blobs.load(card.digest).verify()
    cached.unlink()
    cached.write_bytes(b"rotten")
    elsewhere.blobs.load(card.digest).verify()
    assert [path.name for path in cached.parent.parent.rglob("*") if path.is_file()] == [cached.name]


def test_what_is_damaged_in_the_store_never_gets_into_the_cache(elsewhere: Place) -> None:
    card = small_card()
    elsewhere.blobs.put(card)
    elsewhere.blobs.path_of(card.digest).unlink()
    whole = elsewhere.read(relative_path(card.digest))
    for data in (whole[:-1], whole + b"\0", b"", b"x" * 1000):
        elsewhere.write(relative_path(card.digest), data)
        with pytest.raises(CardError):
            elsewhere.blobs.load(card.digest)
        with pytest.raises(CardError):
            elsewhere.blobs.path_of(card.digest)


def test_many_readers_fetch_one_card_at_once(elsewhere: Place) -> None:
    card = small_card()
    elsewhere.blobs.put(card)
    elsewhere.blobs.path_of(card.digest).unlink()
    with ThreadPoolExecutor(8) as pool:
        found = [*pool.map(lambda _: elsewhere.blobs.load(card.digest), range(8))]
    assert {one.digest for one in found} == {card.digest}


@pytest.mark.parametrize("step", ["_write", "_settle"])
def test_an_upload_that_breaks_shows_nothing(elsewhere: Place, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    card = small_card()
    original = getattr(RemoteBlobStore, step)

    def broken(self: RemoteBlobStore, source: Any, target: str) -> None:
        if step == "_write":
            original(self, source, target)
        raise OSError("the line is cut")

    monkeypatch.setattr(RemoteBlobStore, step, broken)
    with pytest.raises(BlobStoreError, match="the line is cut") as caught:
        elsewhere.blobs.put(card)
    assert caught.value.hint
    assert elsewhere.names() == []
    assert not elsewhere.blobs.holds(card.digest)
    monkeypatch.undo()
    elsewhere.blobs.put(card)
    assert elsewhere.blobs.holds(card.digest)


@pytest.mark.parametrize("kind", REMOTE)
def test_a_registry_keeps_its_rules_elsewhere(kind: str, url_of: Callable[[str], str], tmp_path: Path) -> None:
    home, url = tmp_path / "home", url_of(kind)
    with Registry.open(home, blobs_url=url) as registry:
        kept, orphan, removed = (registry.publish(small_card(name)) for name in ("kept", "orphan", "removed"))
        registry.remove("removed")
        registry._catalog.remove(orphan.digest)
        assert [(report.digest, report.ok) for report in registry.verify()] == sorted(
            [(kept.digest, True), (orphan.digest, False)]
        )
    with Registry.open(tmp_path / "second", blobs_url=url) as other:  # its catalog is its own
        assert {report.digest for report in other.verify()} == {kept.digest, orphan.digest}
        entry = other.import_file(other._blobs.path_of(kept.digest))
        assert other.get("kept", verify=True).digest == entry.digest == kept.digest
        with pytest.raises(UnknownCardError):
            other.path_of(removed.digest)


def test_a_killed_publish_is_undone_at_the_next_start(elsewhere: Place, tmp_path: Path) -> None:
    digest = small_card().digest
    elsewhere.blobs.put(small_card())
    elsewhere.write(f"{relative_path(digest).removesuffix('.lora.arrow')}.00.draft", b"half")
    with Registry.open(tmp_path / "home") as plain:
        plain._blobs = elsewhere.blobs
        (tmp_path / "home" / "tmp" / f"{hex_of(digest)[:2]}.pending").write_text(f"{digest}\n")
        plain.recover()
    assert elsewhere.names() == []


@pytest.mark.parametrize("url", ["cards", "ftp://host/cards", "file://cards", "s3://", "gs+x://a:hush@b/c"])
def test_a_url_that_names_no_store_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(HomeError) as caught:
        RemoteBlobStore.open(url, tmp_path)
    assert caught.value.hint
    assert "hush" not in str(caught.value)


def test_a_bucket_that_is_not_there_is_named_without_the_key(bucket_url: str, tmp_path: Path) -> None:
    blobs = RemoteBlobStore.open(bucket_url.replace("@cards-", "@absent-"), tmp_path)
    with pytest.raises(BlobStoreError, match=r"write the blob store s3://me:\*\*\*@absent") as caught:
        blobs.put(small_card())
    assert "hush" not in str(caught.value)


def test_a_whole_file_is_adopted(place: Place, tmp_path: Path) -> None:
    card = small_card("adopted")
    LoRAFormat.save(card, tmp_path / "whole")
    place.blobs.adopt(card, tmp_path / "whole")
    assert place.names() == [relative_path(card.digest)]
    assert place.read(relative_path(card.digest)) == (tmp_path / "whole").read_bytes()
    place.blobs.load(card.digest, verify=True)
    place.blobs.adopt(card, tmp_path / "whole")  # as after a kill
    assert place.names() == [relative_path(card.digest)]


def test_without_links_the_card_is_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def impossible(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    card = small_card("adopted")
    LoRAFormat.save(card, tmp_path / "whole")
    monkeypatch.setattr(Path, "hardlink_to", impossible)
    blobs = FileBlobStore(tmp_path / "cards")
    blobs.adopt(card, tmp_path / "whole")
    assert blobs.load(card.digest, verify=True) == card
    assert (tmp_path / "whole").stat().st_nlink == 1
