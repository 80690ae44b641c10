"""Notes of work under way: exclusive while it lasts, told of when it did not end well, silent otherwise."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from registry.digest import Digest, digest_of
from registry.pending import Pending

ONE = digest_of(b"one")
NEIGHBOUR = Digest(f"{ONE[:-1]}{'0' if ONE[-1] != '0' else '1'}")
FAR = digest_of(b"far")


@pytest.fixture
def pending(tmp_path: Path) -> Pending:
    return Pending(tmp_path)


def fail(pending: Pending, digest: Digest) -> None:
    with pytest.raises(KeyboardInterrupt), pending.working_on(digest):
        raise KeyboardInterrupt


def test_work_that_ends_well_leaves_nothing(pending: Pending, tmp_path: Path) -> None:
    with pending.working_on(ONE), pending.working_on(FAR):
        assert len(list(tmp_path.iterdir())) == 2
    with pending.looking_at(ONE):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_was_interrupted_is_told_once(pending: Pending, tmp_path: Path) -> None:
    for digest in (ONE, NEIGHBOUR, FAR):
        fail(pending, digest)
    assert set(pending.interrupted()) == {ONE, NEIGHBOUR, FAR}
    assert list(tmp_path.iterdir()) == []


def test_later_work_in_the_same_folder_forgets_nothing(pending: Pending) -> None:
    fail(pending, ONE)
    with pending.working_on(NEIGHBOUR):
        pass
    with pending.looking_at(NEIGHBOUR):
        pass
    assert list(pending.interrupted()) == [ONE]


def test_work_under_way_is_not_interrupted_work(pending: Pending, tmp_path: Path) -> None:
    with pending.working_on(ONE):
        assert list(Pending(tmp_path).interrupted()) == []
    assert list(pending.interrupted()) == []


def test_an_undoing_that_fails_is_told_of_again(pending: Pending) -> None:
    fail(pending, ONE)
    with pytest.raises(KeyboardInterrupt), closing(pending.interrupted()) as telling:
        raise KeyboardInterrupt(next(telling))
    assert list(pending.interrupted()) == [ONE]


def test_only_one_works_in_a_folder(pending: Pending) -> None:
    inside: list[Digest] = []

    def work(digest: Digest) -> None:
        for _ in range(25):
            with pending.working_on(digest):
                inside.append(digest)
                time.sleep(0.0005)  # lets the others in, if anything does
                assert inside == [digest]
                inside.remove(digest)

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(work, digest) for digest in [ONE, NEIGHBOUR] * 4]:
            done.result()


def test_work_on_many_is_noted_for_each(pending: Pending, tmp_path: Path) -> None:
    with pending.working_on(ONE, FAR, NEIGHBOUR):
        assert list(Pending(tmp_path).interrupted()) == []
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyboardInterrupt), pending.working_on(FAR, ONE, NEIGHBOUR):
        raise KeyboardInterrupt
    assert set(pending.interrupted()) == {ONE, NEIGHBOUR, FAR}


def test_who_work_on_many_in_another_order_do_not_wait_for_one_another_for_ever(pending: Pending) -> None:
    def work(digests: tuple[Digest, Digest]) -> None:
        for _ in range(50):
            with pending.working_on(*digests):
                time.sleep(0.0002)  # lets the other in, if anything does

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(work, digests) for digests in [(ONE, FAR), (FAR, ONE)]]:
            done.result(timeout=30)
