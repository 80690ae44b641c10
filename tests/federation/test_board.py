from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from federation import limits
from federation.board import Board, Holder, Task, parts_of
from registry.drafts import Drafts
from tests.federation.sources import holder_of, holding, wanted
from tests.registry.cards import module_shapes, small_card

CARD = small_card("large", modules=module_shapes(1, 1 << 20, 1 << 20))
"""Two tensors of 16 MiB."""
MIB = 1 << 20


@pytest.fixture
def holders() -> list[Holder]:
    return [holder_of(holding(CARD), number) for number in (1, 2)]


def opened(board: Board, tmp_path: Path) -> Task:
    task = board.next()
    assert task is not None
    assert task.part is None
    with Drafts(tmp_path).open(replace(CARD, tensors=())) as draft:
        board.opened(task.job, draft)
    board.ended(task)
    return task


def test_the_least_busy_peer_is_asked(tmp_path: Path, holders: list[Holder]) -> None:
    board = Board([wanted(CARD, *holders)])
    opened(board, tmp_path)
    tasks = [board.next(), board.next()]
    assert [task.holder for task in tasks if task] == holders
    assert board.next() is None  # nothing is left but what others do
    assert not board.is_done


def test_a_peer_is_asked_for_few_things_at_once(holders: list[Holder]) -> None:
    board = Board([wanted(small_card("a", seed=seed), holders[0]) for seed in range(9)])
    tasks = [board.next() for _ in range(9)]
    assert sum(task is not None for task in tasks) == limits.CALLS_PER_PEER


def test_few_streams_are_read_at_once_and_no_more_cards_are_opened_meanwhile(
    tmp_path: Path, holders: list[Holder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_PART_BYTES", MIB)
    board = Board([wanted(CARD, holders[0]), *(wanted(small_card("a", seed=seed), holders[0]) for seed in range(9))])
    opened(board, tmp_path)
    tasks = [board.next() for _ in range(9)]
    assert [task.part for task in tasks if task] == [(0, MIB), (MIB, 2 * MIB)]
    assert limits.STREAMS_PER_PEER == 2


def test_a_card_that_nobody_can_give_is_settled(holders: list[Holder]) -> None:
    board = Board([wanted(CARD, *holders), wanted(small_card("none"))])
    for holder in holders:
        task = board.next()
        assert task is not None
        assert not board.is_done
        board.refuse(task.job, task.holder, f"not from {holder.origin.address}")
        board.ended(task)
    assert board.is_done
    assert [why for _, why in board.jobs[0].failures] == ["not from 192.0.2.1:7420", "not from 192.0.2.2:7420"]
    assert board.jobs[1].settled


@pytest.mark.parametrize(("second", "lied"), [(0, True), (1, False)])
def test_only_who_gave_all_of_a_tensor_lied(tmp_path: Path, holders: list[Holder], second: int, lied: bool) -> None:
    board = Board([wanted(CARD, *holders)])
    job = opened(board, tmp_path).job
    job.parts.clear()
    board.came(Task(job=job, holder=holders[0]), 0, 10 * MIB)
    last = Task(job=job, holder=holders[second])
    board.came(last, 10 * MIB, 20 * MIB)
    assert board.thrown_away(last, (0, 16 * MIB)) == lied
    assert [*job.parts] == [(0, 16 * MIB)]  # whole, so that one peer gives all of it
    assert [(start, end) for start, end, _ in job.given] == [(16 * MIB, 20 * MIB)]


@given(st.lists(st.integers(0, 100 * MIB), unique=True, max_size=8).map(sorted))
def test_parts_are_the_gaps_and_none_is_too_large(ends: list[int]) -> None:
    gaps = [(start, end) for start, end in zip(ends[::2], ends[1::2], strict=False)]
    parts = parts_of(gaps)
    assert all(0 < end - start <= limits.MAX_PART_BYTES for start, end in parts)
    joined: list[tuple[int, int]] = []
    for start, end in parts:
        if joined and joined[-1][1] == start and all(start != first for first, _ in gaps):
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    assert joined == gaps
