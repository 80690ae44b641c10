"""The registry as its users see it: publish, find, label, remove, verify, export, and homes that cannot be used."""

from __future__ import annotations

import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from registry.card import LoRACard
from registry.catalog import Catalog
from registry.errors import (
    CardError,
    CardIntegrityError,
    HomeError,
    LabelTakenError,
    MissingFileError,
    RegistryError,
    UnknownCardError,
)
from registry.format import LoRAFormat
from registry.identity import Identity
from registry.store import CardEntry, Origin, Registry
from tests.registry.cards import small_card

PEER = Origin(peer_id="0" * 32, address="192.0.2.1:8815")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def registry(home: Path) -> Iterator[Registry]:
    with Registry.open(home) as registry:
        yield registry


def damage(path: Path, card: LoRACard) -> None:
    """Flip one bit of the first tensor, as a disk would: in place."""
    data = bytearray(path.read_bytes())
    data[data.index(bytes(card.tensors[0].data))] ^= 1
    path.write_bytes(data)


def files(home: Path) -> list[Path]:
    return sorted(path for folder in ("cards", "tmp") for path in (home / folder).rglob("*") if path.is_file())


# Publishing ---------------------------------------------------------------------------------------------------------


def test_a_published_card_is_signed_by_the_node_and_comes_back_whole(registry: Registry) -> None:
    card = small_card(description="does things")
    entry = registry.publish(card, tags=["mine"])
    found = registry.get("sample", verify=True)
    assert entry == registry.entry("sample")
    assert (found.digest, found.manifest.publisher) == (entry.digest, registry.identity.id)
    assert [bytes(tensor.data) for tensor in found.tensors] == [bytes(tensor.data) for tensor in card.tensors]
    assert (entry.publisher, entry.tags, entry.origin) == (registry.identity.id, ("mine",), None)


def test_publishing_again_is_no_news(registry: Registry, home: Path) -> None:
    first = registry.publish(small_card())
    before = files(home)
    assert registry.publish(small_card()) == first
    assert registry.publish(registry.get("sample")) == first
    assert files(home) == before


def test_a_taken_label_names_the_next_and_leaves_no_file(registry: Registry, home: Path) -> None:
    registry.publish(small_card(seed=1))
    before = files(home)
    with pytest.raises(LabelTakenError) as caught:
        registry.publish(small_card(seed=2))
    assert caught.value.hint == "publish it as version 2"
    assert files(home) == before
    registry.publish(small_card(seed=2).describe(version=registry.next_version("sample")))
    assert registry.get("sample").version == "2"


def test_a_card_that_breaks_its_promise_is_not_published(registry: Registry, home: Path) -> None:
    good, other = small_card(seed=1), small_card(seed=2)
    with pytest.raises(CardIntegrityError):
        registry.publish(LoRACard(manifest_bytes=good.manifest_bytes, manifest=good.manifest, tensors=other.tensors))
    assert files(home) == []


def test_an_author_s_signature_is_kept(registry: Registry) -> None:
    author = Identity.generate()
    card = small_card().signed(author)
    assert registry.publish(card).publisher == author.id
    assert registry.get("sample").signature == card.signature


def test_a_peer_s_card_is_kept_byte_for_byte_beside_ours(registry: Registry) -> None:
    ours = registry.publish(small_card(seed=1, created="2026-01-01T00:00:00+00:00"))
    theirs = small_card(seed=2).signed(Identity.generate())
    entry = registry.admit(theirs, origin=PEER)
    assert registry.get(theirs.digest).manifest_bytes == theirs.manifest_bytes
    assert entry.origin == PEER
    assert registry.digests() == {ours.digest, theirs.digest}
    assert registry.get("sample@1").digest == theirs.digest  # created later, so every node says the same


def test_a_peer_s_card_with_a_false_signature_is_not_admitted(registry: Registry, home: Path) -> None:
    card = small_card().signed(Identity.generate())
    changed = small_card(description="changed").signed(Identity.generate())
    forged = LoRACard(
        manifest_bytes=changed.manifest_bytes, manifest=changed.manifest, tensors=card.tensors, signature=card.signature
    )
    with pytest.raises(CardIntegrityError):
        registry.admit(forged, origin=PEER)
    assert files(home) == []


def test_a_foreign_file_is_written_anew(registry: Registry, tmp_path: Path) -> None:
    card = small_card().signed(Identity.generate())
    foreign = tmp_path / "foreign.lora.arrow"
    LoRAFormat.save(card, foreign)
    entry = registry.import_file(foreign, tags=["found"])
    stored = registry.path_of(entry.digest)
    assert not stored.samefile(foreign)
    foreign.write_bytes(b"")
    assert registry.get("sample", verify=True) == card
    assert (entry.tags, entry.origin) == (("found",), None)


def test_a_damaged_foreign_file_is_refused(registry: Registry, home: Path, tmp_path: Path) -> None:
    card = small_card()
    foreign = tmp_path / "foreign.lora.arrow"
    LoRAFormat.save(card, foreign)
    damage(foreign, card)
    with pytest.raises(CardError):
        registry.import_file(foreign)
    assert files(home) == []


@pytest.mark.parametrize("tag", ["", "two words", "-x", "ü", "a" * 97])
def test_odd_tags_and_labels_are_refused(registry: Registry, tag: str) -> None:
    registry.publish(small_card())
    for attempt in (
        lambda: registry.tag("sample", tag),
        lambda: registry.publish(small_card(seed=9), tags=[tag]),
        lambda: registry.label("sample", tag, "1"),
        lambda: registry.label("sample", "name", tag),
    ):
        with pytest.raises(RegistryError, match="expected a"):
            attempt()
    assert len(registry.list()) == 1


# Removing, labelling, exporting -------------------------------------------------------------------------------------


def test_removal_takes_row_and_file_and_spares_who_reads(registry: Registry, home: Path) -> None:
    entry = registry.publish(small_card())
    reader = registry.get("sample")
    assert registry.remove("sample").digest == entry.digest
    assert files(home) == []
    reader.verify()
    for attempt in (registry.get, registry.entry, registry.remove):
        with pytest.raises(UnknownCardError):
            attempt("sample")
    with pytest.raises(UnknownCardError):
        registry.path_of(entry.digest)
    assert registry.publish(small_card()).digest != entry.digest, "what was removed does not come back"


def test_a_removed_card_with_a_lost_file_is_gone_too(registry: Registry) -> None:
    entry = registry.publish(small_card())
    registry.path_of(entry.digest).unlink()
    with pytest.raises(MissingFileError):
        registry.get("sample")
    registry.remove("sample")
    assert registry.list() == []


def test_labels_and_tags_are_the_owner_s(registry: Registry) -> None:
    registry.publish(small_card())
    registry.label("sample", "best", "3")
    registry.tag("best", "fast", "small")
    registry.untag("best", "small")
    assert registry.get("best@3") == registry.get("sample")
    assert [entry.name for entry in registry.list(tag="fast")] == ["sample"]
    assert registry.next_version("best") == "4"


def test_a_card_goes_out_as_peft_and_comes_back(registry: Registry, tmp_path: Path) -> None:
    card = small_card(peft={"peft_type": "LORA", "target_modules": ["up_proj"], "r": 4, "lora_alpha": 8.0})
    registry.publish(card)
    directory = registry.export("sample", tmp_path / "out")
    again = LoRACard.from_peft(directory, name="again")
    assert {tensor.name: bytes(tensor.data) for tensor in again.tensors if tensor.role == "A"} == {
        tensor.name: bytes(tensor.data) for tensor in card.tensors if tensor.role == "A"
    }


# Verifying ----------------------------------------------------------------------------------------------------------


def test_whole_cards_verify(registry: Registry) -> None:
    for seed in range(3):
        registry.publish(small_card(f"card-{seed}", seed=seed))
    reports = registry.verify()
    assert [report.ok for report in reports] == [True] * 3
    assert {report.entry for report in reports} == set(registry.list())
    assert registry.verify("card-1")[0].entry == registry.entry("card-1")


def test_a_damaged_file_is_reported_kept_and_healed_by_its_source(registry: Registry) -> None:
    card = small_card()
    registry.publish(small_card("whole"))
    path = registry.path_of(registry.publish(card).digest)
    damage(path, card)
    [bad] = [report for report in registry.verify() if not report.ok]
    assert bad.entry == registry.entry("sample")
    assert "blake3:" in str(bad.reason)
    assert "import the card again" in str(bad.hint)
    assert path.exists()
    with pytest.raises(CardIntegrityError):
        registry.get("sample", verify=True)
    registry.publish(card)
    assert all(report.ok for report in registry.verify())


def test_a_missing_file_is_reported(registry: Registry) -> None:
    registry.path_of(registry.publish(small_card()).digest).unlink()
    [report] = registry.verify()
    assert not report.ok
    assert "not there" in str(report.reason)


def test_a_lost_catalog_loses_no_file_and_says_how_to_go_on(home: Path) -> None:
    with Registry.open(home) as registry:
        digest = registry.publish(small_card()).digest
    for path in home.glob("catalog.sqlite*"):
        path.unlink()
    with Registry.open(home) as registry:
        [report] = registry.verify()
        assert (report.digest, report.entry, report.ok) == (digest, None, False)
        assert "import" in str(report.hint)
        [path] = files(home)
        registry.import_file(path)
        assert registry.verify()[0].ok
        assert registry.get("sample").digest == digest


def test_verifying_a_stray_damaged_file_does_not_touch_it(registry: Registry, home: Path) -> None:
    card = small_card()
    stray = home / "cards" / "ab" / f"{'ab' * 32}.lora.arrow"
    stray.parent.mkdir()
    LoRAFormat.save(card, stray)
    [report] = registry.verify()
    assert not report.ok
    assert stray.exists()
    assert str(stray) in str(report.hint)


def test_what_stopped_between_file_and_row_is_undone_at_the_next_start(
    registry: Registry, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = registry.publish(small_card("kept"))

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("registry.catalog.Catalog.add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        registry.publish(small_card())
    monkeypatch.setattr("registry.blobs.FileBlobStore.delete", interrupted)
    with pytest.raises(KeyboardInterrupt):
        registry.remove("kept")
    monkeypatch.undo()
    assert len([path for path in files(home) if path.suffix == ".arrow"]) == 2
    with Registry.open(home) as again:
        assert again.list() == []
        assert files(home) == []
        assert again.publish(small_card("kept")).epoch == kept.epoch + 1


def test_opening_leaves_alone_what_another_is_at(
    registry: Registry, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = Catalog.add

    def opened_meanwhile(*args: Any, **settings: Any) -> CardEntry:
        with Registry.open(home) as another:
            assert another.list() == []
        return add(*args, **settings)

    monkeypatch.setattr(Catalog, "add", opened_meanwhile)
    registry.publish(small_card())
    assert registry.verify()[0].ok


# Homes --------------------------------------------------------------------------------------------------------------


def test_a_home_is_its_owner_s_alone_and_keeps_its_identity(home: Path) -> None:
    with Registry.open(home) as registry:
        first = registry.identity.id
    for path in (home, home / "cards", home / "tmp"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert stat.S_IMODE((home / "identity.key").stat().st_mode) == 0o600
    with Registry.open(str(home)) as registry:
        assert (registry.identity.id, registry.home) == (first, home)


def test_a_home_may_have_any_name(tmp_path: Path) -> None:
    home = tmp_path / "a home? with %20 & ünïcode#1"
    with Registry.open(home) as registry:
        registry.publish(small_card())
    with Registry.open(home) as registry:
        assert registry.verify()[0].ok


def test_a_home_that_moves_keeps_its_cards(home: Path, tmp_path: Path) -> None:
    with Registry.open(home) as registry:
        registry.publish(small_card())
    shutil.move(home, tmp_path / "moved")
    with Registry.open(tmp_path / "moved") as registry:
        assert registry.get("sample", verify=True).name == "sample"


def test_a_home_that_cannot_be_is_an_error_with_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"")
    for home in (file, file / "home", Path("/proc/home")):
        with pytest.raises(HomeError) as caught:
            Registry.open(home)
        assert caught.value.hint
    monkeypatch.setattr("os.access", lambda *_: False)  # as on a read-only file system: root may write anywhere else
    with pytest.raises(HomeError, match="cannot use the home"):
        Registry.open(tmp_path / "read-only")


def test_an_unchanged_adapter_published_again_is_the_same_card(home: Path) -> None:
    with Registry.open(home) as registry:
        first = registry.publish(small_card("poet", created="2026-01-01T00:00:00+00:00"))
        again = registry.publish(small_card("poet", created="2026-02-02T00:00:00+00:00"), tags=["seen"])
        assert (again.digest, again.tags) == (first.digest, ("seen",))
        with pytest.raises(LabelTakenError):
            registry.publish(small_card("poet", seed=1))
        with pytest.raises(LabelTakenError):
            registry.publish(small_card("poet", description="another"))


def test_opening_an_existing_home_reads_no_card(home: Path) -> None:
    """Opening stays cheap however many cards there are: a damaged one is none of its business."""
    with Registry.open(home) as registry:
        registry.path_of(registry.publish(small_card()).digest).write_bytes(b"damaged")
    with Registry.open(home) as registry:
        assert [entry.name for entry in registry.list()] == ["sample"]


# The package --------------------------------------------------------------------------------------------------------


def test_the_floor_knows_neither_torch_nor_flight() -> None:
    code = (
        "import sys, registry.store;"
        "print([m for m in ('torch', 'transformers', 'peft', 'zeroconf', 'pyarrow.flight') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
