"""The replay buffer: a fixed number in all, shared evenly, the highest scores stay."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolution.errors import TrainingError
from evolution.replay_buffer import Item, refreshed


def items(task: int, scores: list[float], group: int = 0) -> list[Item]:
    return [Item(task=task, row=row, group=group, score=score) for row, score in enumerate(scores)]


def test_each_task_has_its_share_and_the_highest_scores_stay() -> None:
    kept = refreshed((), items(0, [0.1, 0.9, 0.5, 0.7]), 3)
    assert [item.row for item in kept] == [1, 3, 2]
    kept = refreshed(kept, items(1, [3.0, 1.0, 2.0]), 3)
    assert [(item.task, item.row) for item in kept] == [(0, 1), (0, 3), (1, 0)]


def test_classes_of_one_task_share_alike() -> None:
    kept = refreshed((), [*items(0, [9.0, 8.0, 7.0], group=4), *items(0, [1.0, 2.0], group=5)], 4)
    assert [(item.group, item.row) for item in kept] == [(4, 0), (4, 1), (5, 1), (5, 0)]


def test_what_one_has_too_few_of_goes_to_the_others() -> None:
    kept = refreshed(items(0, [1.0]), items(1, [1.0, 2.0, 3.0, 4.0]), 4)
    assert [item.task for item in kept] == [0, 1, 1, 1]


def test_more_groups_than_places_is_refused() -> None:
    with pytest.raises(TrainingError, match="at least 3 items"):
        refreshed(items(0, [1.0]), [*items(1, [1.0], group=1), *items(1, [1.0], group=2)], 2)


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6), room=st.integers(6, 40))
def test_it_is_full_and_even(sizes: list[int], room: int) -> None:
    kept = refreshed((), [item for task, size in enumerate(sizes) for item in items(task, [1.0] * size)], room)
    counts = [sum(item.task == task for item in kept) for task in range(len(sizes))]
    assert sum(counts) == min(room, sum(sizes))
    # Whoever has fewer than another had no more to give, give or take the one that does not divide.
    assert all(count == size or count >= max(counts) - 1 for count, size in zip(counts, sizes, strict=True))
