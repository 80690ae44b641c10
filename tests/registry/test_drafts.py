from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from threading import Thread

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from registry.card import LoRACard
from registry.digest import digest_of
from registry.drafts import BLOCK_BYTES, MAX_AGE_S, MAX_KEPT_BYTES, Draft, Drafts
from registry.entries import Origin
from registry.errors import BusyDraftError, CardIntegrityError, NoSpaceError
from registry.format import LoRAFormat
from registry.identity import Identity
from registry.manifest import Manifest
from registry.store import Registry
from tests.registry.cards import cards, module_shapes, small_card

ORIGIN = Origin(peer_id="0123456789abcdef" * 2, address="192.0.2.1:7420")


@pytest.fixture
def drafts(tmp_path: Path) -> Drafts:
    return Drafts(tmp_path / "drafts")


@pytest.fixture(scope="module")
def large() -> LoRACard:
    """Two tensors of 4 MiB and six small ones."""
    return small_card("large", modules=module_shapes(1, 1 << 18, 1 << 18) | {"x": (8, 6), "y": (8, 6), "z": (8, 6)})


def data_of(card: LoRACard) -> bytes:
    return b"".join(tensor.data for tensor in card.tensors)


def without_tensors(card: LoRACard) -> LoRACard:
    return replace(card, tensors=())


def write(draft: Draft, data: bytes, *spans: tuple[int, int]) -> None:
    for start, end in spans:
        assert draft.write(start, memoryview(data)[start:end]) == []


def pieces(start: int, end: int, nbytes: int) -> Iterator[tuple[int, int]]:
    return ((at, min(at + nbytes, end)) for at in range(start, end, nbytes))


def saved(card: LoRACard, directory: Path) -> bytes:
    LoRAFormat.save(card, directory / "reference")
    return (directory / "reference").read_bytes()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cards(), st.randoms(use_true_random=False), st.integers(1, 100))
def test_bytes_in_any_order_make_the_card_and_its_file(
    tmp_path: Path, drafts: Drafts, card: LoRACard, random: Random, nbytes: int
) -> None:
    spans = [*pieces(0, card.nbytes, nbytes)]
    random.shuffle(spans)
    with drafts.open(without_tensors(card)) as draft:
        for index, span in enumerate(spans):
            assert draft.is_whole == (index == len(spans)) or all(spec.nbytes == 0 for spec in card.manifest.tensors)
            write(draft, data_of(card), span)
        assert draft.is_whole
        assert draft.gaps() == []
        finished = draft.finish()
        assert draft.path.read_bytes() == saved(card, tmp_path)
        finished.verify()
        assert finished == card
        draft.discard()


def test_threads_fill_one_draft(drafts: Drafts, large: LoRACard, tmp_path: Path) -> None:
    data = data_of(large)
    with drafts.open(without_tensors(large)) as draft:
        spans = [*pieces(0, len(data), 300_001)]
        threads = [Thread(target=write, args=(draft, data, *spans[number::4])) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert draft.is_whole
        draft.finish()
        assert draft.path.read_bytes() == saved(large, tmp_path)


def test_a_draft_is_no_card_before_it_is_whole(drafts: Drafts, large: LoRACard) -> None:
    with drafts.open(without_tensors(large)) as draft:
        write(draft, data_of(large), (0, large.nbytes - 1))
        assert not draft.is_whole
        with pytest.raises(CardIntegrityError, match="verified tensors"):
            draft.finish()


def test_a_wrong_tensor_is_thrown_away_whole_and_no_other(drafts: Drafts, large: LoRACard) -> None:
    data = data_of(large)
    spans = [*pieces(0, len(data), 1 << 20)]
    size = large.tensors[0].nbytes
    with drafts.open(without_tensors(large)) as draft:
        bad = bytearray(data)
        bad[size + 7] ^= 1
        wrong = [span for start, end in spans for span in draft.write(start, memoryview(bad)[start:end])]
        assert wrong == draft.gaps() == [(size, 2 * size)]
        assert not draft.is_whole
        write(draft, data, (size, 2 * size))
        assert draft.is_whole
        draft.finish().verify()


def test_bytes_that_are_here_cannot_be_written_again(drafts: Drafts, large: LoRACard) -> None:
    with drafts.open(without_tensors(large)) as draft:
        write(draft, data_of(large), (0, 5 << 20))
        with pytest.raises(ValueError, match="not here"):
            draft.write((5 << 20) - 1, memoryview(b"xx"))
        with pytest.raises(ValueError, match="not here"):
            draft.write(large.nbytes - 1, memoryview(b"xx"))


def test_what_has_come_need_not_come_again(drafts: Drafts, large: LoRACard) -> None:
    data, first = data_of(large), (5 << 20) + 17
    with drafts.open(without_tensors(large)) as draft:
        write(draft, data, *pieces(0, first, 100_000))
    with drafts.open(without_tensors(large)) as draft:
        (gap,) = draft.gaps()
        assert first - BLOCK_BYTES < gap[0] <= first
        assert draft.tensors_verified == 1
        write(draft, data, gap)
        draft.finish().verify()
    with drafts.open(without_tensors(large)) as draft:  # as if killed before it became a card
        assert draft.is_whole


def test_what_was_damaged_meanwhile_comes_again(drafts: Drafts, large: LoRACard) -> None:
    data, size = data_of(large), large.tensors[0].nbytes
    with drafts.open(without_tensors(large)) as draft:
        write(draft, data, (0, len(data)))
        path = draft.path
    with path.open("r+b") as file:
        file.seek(2 << 20)
        file.write(b"damage")
    with drafts.open(without_tensors(large)) as draft:
        assert draft.gaps() == [(0, size)]
        write(draft, data, (0, size))
        draft.finish().verify()


def test_a_file_that_is_no_draft_is_begun_anew(drafts: Drafts, large: LoRACard) -> None:
    with drafts.open(without_tensors(large)) as draft:
        write(draft, data_of(large), (0, 1 << 20))
        path = draft.path
    path.write_bytes(b"\1" * 12_345)
    with drafts.open(without_tensors(large)) as draft:
        assert draft.gaps() == [(0, large.nbytes)]


def test_a_draft_of_which_nothing_came_is_not_kept(drafts: Drafts, large: LoRACard) -> None:
    with drafts.open(without_tensors(large)) as draft:
        assert draft.path.stat().st_blocks * 512 >= large.nbytes  # taken before the first byte comes
    assert not draft.path.exists()


def test_a_draft_has_one_user_at_a_time(drafts: Drafts, large: LoRACard) -> None:
    with drafts.open(without_tensors(large)) as draft:
        write(draft, data_of(large), (0, 1 << 20))
        with pytest.raises(BusyDraftError):
            drafts.open(without_tensors(large))
    drafts.open(without_tensors(large)).close()


def test_weights_that_are_nan_as_signed_are_refused_for_good(drafts: Drafts, large: LoRACard) -> None:
    data = bytearray(data_of(large))
    data[-4:] = np.float32(np.nan).tobytes()
    fields = json.loads(large.manifest_bytes)
    fields["tensors"][-1]["digest"] = digest_of(data[-fields["tensors"][-1]["nbytes"] :])
    manifest = json.dumps(fields).encode()
    card = LoRACard(manifest_bytes=manifest, manifest=Manifest.parse(manifest), tensors=())
    with drafts.open(card) as draft, pytest.raises(CardIntegrityError, match="NaN"):
        write(draft, bytes(data), *pieces(0, len(data), 1 << 20))
    with pytest.raises(CardIntegrityError, match="NaN"):
        drafts.open(card)
    assert not draft.path.exists()


def test_tensors_of_other_cards_are_copied_and_checked(drafts: Drafts, large: LoRACard) -> None:
    damaged = bytearray(large.tensors[1].data)
    damaged[100] ^= 1
    tensors = list(large.tensors)
    tensors[1] = replace(tensors[1], data=memoryview(damaged))
    anew = large.describe(name="anew", description="the same weights")
    size = large.tensors[0].nbytes
    with drafts.open(without_tensors(anew)) as draft:
        write(draft, data_of(large), (0, 1000))
        draft.take_from(replace(large, tensors=tuple(tensors)))
        assert draft.gaps() == [(size, 2 * size)]
        draft.take_from(large)
        assert draft.finish() == anew


def test_a_full_disk_is_said_before_a_byte_comes(tmp_path: Path, large: LoRACard) -> None:
    LoRAFormat.save(large, tmp_path / "card")
    (tmp_path / "drafts").mkdir()
    # The kernel refuses files of more than 1 MiB to this process, as a full disk would.
    code = """
import resource, signal, sys
from dataclasses import replace
from pathlib import Path
from registry.drafts import Drafts
from registry.errors import NoSpaceError
from registry.format import LoRAFormat
card = replace(LoRAFormat.load(sys.argv[1]), tensors=())
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    Drafts(Path(sys.argv[2])).open(card)
except NoSpaceError as error:
    print(error)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "card"), str(tmp_path / "drafts")]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert f"expected room for the {large.nbytes} bytes" in said
    assert [*(tmp_path / "drafts").iterdir()] == []


def test_no_space_is_an_error_of_its_own(drafts: Drafts, large: LoRACard, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(NoSpaceError, match="bytes free"):
        drafts.open(without_tensors(large))


def test_old_drafts_and_too_many_are_swept(drafts: Drafts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = datetime(2026, 11, 21, tzinfo=UTC)
    paths = {}
    for seed, age_s in enumerate([0, 60, MAX_AGE_S + 60, 300 * 24 * 3600, -300 * 24 * 3600]):
        card = small_card("some", seed=seed)
        with drafts.open(without_tensors(card)) as draft:
            write(draft, data_of(card), (0, 10))
        moment = (now - timedelta(seconds=age_s)).timestamp()
        os.utime(draft.path, (moment, moment))
        paths[age_s] = draft.path
    used = small_card("used")
    with drafts.open(without_tensors(used)) as draft:
        write(draft, data_of(used), (0, 10))
        os.utime(draft.path, (0, 0))
        drafts.sweep(now)
        assert {*(tmp_path / "drafts").iterdir()} == {paths[0], paths[60], draft.path}
    monkeypatch.setattr("registry.drafts.MAX_KEPT_BYTES", paths[0].stat().st_blocks * 512)
    drafts.sweep(now)
    assert [*(tmp_path / "drafts").iterdir()] == [paths[0]]
    assert MAX_KEPT_BYTES > 8 << 30  # the largest card may be kept


def test_a_finished_draft_becomes_the_card(tmp_path: Path, large: LoRACard) -> None:
    signed = large.signed(Identity.generate())
    with Registry.open(tmp_path / "home") as registry:
        with registry.drafts.open(without_tensors(signed)) as draft:
            write(draft, data_of(signed), (0, signed.nbytes))
            entry = registry.admit(draft.finish(), origin=ORIGIN, draft=draft.path)
            assert registry.path_of(signed.digest).stat().st_ino == draft.path.stat().st_ino
            draft.discard()
        assert entry.digest == signed.digest
        assert registry.path_of(signed.digest).read_bytes() == saved(signed, tmp_path)
        assert registry.path_of(signed.digest).stat().st_mode & 0o777 == 0o644
        assert [report.ok for report in registry.verify()] == [True]


def test_a_draft_that_has_become_a_card_is_never_written_to(tmp_path: Path, large: LoRACard) -> None:
    with Registry.open(tmp_path / "home") as registry:
        with registry.drafts.open(without_tensors(large)) as draft:
            write(draft, data_of(large), (0, large.nbytes))
            registry.admit(draft.finish(), origin=ORIGIN, draft=draft.path)
        before = registry.path_of(large.digest).stat()
        with registry.drafts.open(without_tensors(large)) as again:  # as if killed before the draft went
            assert again.gaps() == [(0, large.nbytes)]
        after = registry.path_of(large.digest).stat()
        assert (after.st_mtime_ns, after.st_ino, after.st_nlink) == (before.st_mtime_ns, before.st_ino, 1)


def test_a_card_whose_admission_was_killed_need_not_come_again(tmp_path: Path, large: LoRACard) -> None:
    home = tmp_path / "home"
    with Registry.open(home) as registry:
        with registry.drafts.open(without_tensors(large)) as draft:
            write(draft, data_of(large), (0, large.nbytes))
            draft.finish()
        registry._blobs.adopt(large, draft.path)  # killed before the row was written
        (home / "tmp" / f"{large.digest[7:9]}.pending").write_text(f"{large.digest}\n")
    with Registry.open(home) as registry:
        assert registry.verify() == []
        with registry.drafts.open(without_tensors(large)) as draft:
            assert draft.is_whole
            registry.admit(draft.finish(), origin=ORIGIN, draft=draft.path)
        assert [report.ok for report in registry.verify()] == [True]


def test_a_kill_at_any_moment_makes_at_most_a_block_come_again(drafts: Drafts, large: LoRACard, tmp_path: Path) -> None:
    LoRAFormat.save(large, tmp_path / "card")
    random, total = Random(20261121), 0
    for _ in range(6):
        command = [
            sys.executable,
            "-m",
            "tests.registry.draft_worker",
            str(tmp_path / "card"),
            str(tmp_path / "drafts"),
        ]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            begun = int(process.stdout.readline())
            lines = [process.stdout.readline() for _ in range(random.randrange(1, 25))]
            process.kill()
            lines += process.stdout.readlines()
        come = sum(map(int, (line for line in lines if line.endswith("\n"))))
        with drafts.open(without_tensors(large)) as draft:
            here = large.nbytes - sum(end - start for start, end in draft.gaps())
            assert here >= begun + come - BLOCK_BYTES
            total += come
            if draft.is_whole:
                break
    assert total > BLOCK_BYTES
    with drafts.open(without_tensors(large)) as draft:
        write(draft, data_of(large), *draft.gaps())
        draft.finish().verify()
