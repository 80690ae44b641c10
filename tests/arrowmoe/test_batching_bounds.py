"""Where batching ends: its limits, those who give up or are late, and failures, which stay with their own rows."""

from __future__ import annotations

import gc
import logging
import random
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from arrowmoe.batching import Batching
from arrowmoe.errors import BusyError, DeadlineError, EngineError, UnknownAdapterError
from arrowmoe.generation import Chunk, Sampling
from arrowmoe.lora.manager import LoRAManager
from tests.arrowmoe.benches import LONG, Bench, bench, finished, no_collector


def test_threads_that_give_up_are_late_or_come_too_many_at_once_leave_nothing_behind(tmp_path: Path) -> None:
    found = bench(path=tmp_path, rows=3, waiting=4)
    expected = {adapter: found.alone("w8 w9", adapter, 9) for adapter in (None, 0, 1, 2)}
    wrong: list[object] = []
    seen: set[str] = set()

    def work(seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(12):
            adapter = dice.choice([None, 0, 1, 2])
            stream = found.stream("w8 w9", adapter, timeout_s=dice.choice([None, 6.0]), max_new_tokens=9)
            try:
                if dice.random() < 0.3:
                    next(stream)
                    stream.close()
                    seen.add("closed")
                else:
                    tokens = list(finished(stream).tokens)
                    seen.add("answered")
                    wrong.extend([] if tokens == expected[adapter] else [tokens])
            except (BusyError, DeadlineError) as error:
                seen.add(type(error).__name__)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []
    assert seen >= {"closed", "answered"}
    found.passes.clear()
    assert list(finished(found.stream("w8 w9", 1, max_new_tokens=9)).tokens) == expected[1]
    assert all(rows == 1 for rows, _ in found.passes)


def test_no_more_rows_than_the_limit_are_computed_at_once() -> None:
    found = bench(rows=3)
    made = list(found.batching.generate(["w5"] * 10, [{}] * 10, Sampling(max_new_tokens=3)))
    assert sorted(chunk.row for chunk in made if chunk.generation) == list(range(10))
    assert max(rows for rows, _ in found.passes) == 3


def test_the_cache_holds_no_more_tokens_than_the_limit() -> None:
    found = bench(tokens=40)  # a long row takes 12 + 6 of them
    made = list(found.batching.generate([LONG] * 5, [{}] * 5, Sampling(max_new_tokens=6)))
    assert sum(chunk.generation is not None for chunk in made) == 5
    assert max(rows for rows, _ in found.passes) == 2
    assert finished(found.stream(LONG, max_new_tokens=80)).prompt_tokens == 12  # alone a row is always answered


def test_adapters_take_turns(tmp_path: Path) -> None:
    found = bench(path=tmp_path, rows=1)
    weights = [found.weights(0)] * 6 + [found.weights(1)] + [{}]
    chunks = found.batching.generate(["w5"] * 8, weights, Sampling(max_new_tokens=2))
    done = [chunk.row for chunk in chunks if chunk.generation is not None]
    assert done == [0, 6, 7, 1, 2, 3, 4, 5]


def test_a_full_queue_says_when_to_ask_again() -> None:
    found = bench(rows=1, waiting=2)
    first = found.stream(max_new_tokens=8)
    next(first)
    waiting = found.batching.generate(["w5", "w6", "w7"], [{}] * 3, Sampling(max_new_tokens=3))
    next(waiting)  # a call may bring more rows than may wait; one of them is answered now
    with pytest.raises(BusyError, match="fewer than 2 rows to wait, got 2") as caught:
        next(found.stream())
    assert caught.value.retry_s > 0
    assert sum(chunk.generation is not None for chunk in waiting) == 3
    assert finished(found.stream()).text


def test_a_deadline_ends_a_request_and_no_other(tmp_path: Path) -> None:
    found = bench(path=tmp_path, rows=2)
    expected = found.alone(LONG, 0, 12)
    found.passes.clear()
    late, other = found.stream(timeout_s=4, max_new_tokens=50), found.stream(LONG, 0, max_new_tokens=12)
    next(late)
    next(other)
    waits = found.stream("w30", timeout_s=5, max_new_tokens=50)
    with pytest.raises(DeadlineError, match="in time"):
        list(late)
    with pytest.raises(DeadlineError):
        list(waits)
    assert list(finished(other).tokens) == expected
    assert finished(found.stream()).finish_reason


def test_closing_a_stream_makes_room_at_once() -> None:
    found = bench(rows=1)
    first = found.stream(max_new_tokens=60)
    next(first)
    first.close()
    found.passes.clear()
    assert len(finished(found.stream("w30", max_new_tokens=3)).tokens) == 3
    assert found.passes == [(1, 1)] * 3


def test_a_stream_that_nobody_holds_any_more_is_given_up() -> None:
    found = bench(rows=1)
    next(found.stream(max_new_tokens=60))
    gc.collect()
    found.passes.clear()
    finished(found.stream("w30", max_new_tokens=3))
    assert len(found.passes) == 3


def test_what_fails_for_one_row_leaves_others_alone(tmp_path: Path) -> None:
    found = bench(path=tmp_path)
    expected = found.alone("w5 w9", 0, 6)
    good = found.stream(adapter=0)
    next(good)
    overflow = found.batching.generate(["w8"], [{found.cards[1].digest: 1e30}], Sampling(max_new_tokens=5))
    unknown = found.batching.generate(["w8"], [{"sha256:none": 1.0}], Sampling(max_new_tokens=5))
    with pytest.raises(EngineError, match="NaN"):
        list(overflow)
    with pytest.raises(UnknownAdapterError):
        list(unknown)
    assert list(finished(good).tokens) == expected


def test_an_unknown_adapter_fails_its_own_call_of_those_that_come_together(tmp_path: Path) -> None:
    found = bench(path=tmp_path, rows=4)
    holder = found.stream(max_new_tokens=50)
    next(holder)
    outcomes: dict[int, object] = {}
    weights = [found.weights(0), {"sha256:none": 1.0}, found.weights(2)]
    expected = [found.alone("w8", 0, 6), None, found.alone("w8", 2, 6)]

    def ask(index: int) -> None:
        try:
            chunks = found.batching.generate(["w8"], [weights[index]], Sampling(max_new_tokens=6))
            outcomes[index] = list(finished(chunks).tokens)
        except UnknownAdapterError as error:
            outcomes[index] = error

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert isinstance(outcomes[1], UnknownAdapterError)
    assert [outcomes[0], outcomes[2]] == [expected[0], expected[2]]


def within(budget: int, found: Bench) -> Batching:
    """The same adapters where only `budget` of them fit in at once."""
    loaded = found.manager.loaded()
    for one in loaded:
        found.manager.remove_card(one.digest)
    manager = LoRAManager(found.tiny.model, budget_bytes=budget * max(one.nbytes for one in loaded))
    for card in found.cards:
        manager.apply_card(card)
    return Batching(found.tiny, plan=manager.plan, running=manager.running)


def test_rows_whose_adapters_do_not_fit_in_together_are_answered_one_after_another(tmp_path: Path) -> None:
    found = bench(path=tmp_path)
    found.batching = within(1, found)
    chunks = found.call([("w8 w9", 0), ("w8 w9", 2), ("w8 w9", 1)], 6)
    answers = {chunk.row: list(chunk.generation.tokens) for chunk in chunks if chunk.generation}
    assert answers == {row: found.alone("w8 w9", adapter, 6) for row, adapter in enumerate((0, 2, 1))}


def test_a_row_whose_adapter_waits_for_room_joins_when_another_left(tmp_path: Path) -> None:
    found = bench(path=tmp_path)
    found.batching = within(2, found)
    expected = [found.alone("w8 w9", adapter, 20) for adapter in (0, 1, 2)]
    streams = [found.stream("w8 w9", adapter, max_new_tokens=20) for adapter in (0, 1, 2)]
    for stream in streams[:2]:
        next(stream)
    streams[0].close()
    found.passes.clear()
    assert [list(finished(stream).tokens) for stream in streams[:0:-1]] == expected[:0:-1]
    assert (2, 1) in found.passes


def test_an_adapter_that_is_removed_answers_whom_it_was_answering_and_nobody_new(tmp_path: Path) -> None:
    found = bench(path=tmp_path)
    expected = [found.alone("w8 w9", adapter, 12) for adapter in (0, 1)]
    streams = [found.stream("w8 w9", adapter, max_new_tokens=12) for adapter in (0, 1)]
    short = found.stream(adapter=2, max_new_tokens=3)
    for stream in [*streams, short]:
        next(stream)
    found.manager.remove_card(found.cards[0].digest)
    list(short)
    assert [list(finished(stream).tokens) for stream in streams] == expected
    with pytest.raises(UnknownAdapterError):
        next(found.stream(adapter=0))


def test_an_interrupted_step_ends_what_was_in_it_and_the_next_request_is_answered() -> None:
    found = bench()
    other = found.stream("w30", max_new_tokens=9)
    next(other)
    interrupted = found.stream(max_new_tokens=9)
    hook = found.tiny.model.lm_head.register_forward_hook(_interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(interrupted)
    hook.remove()
    with pytest.raises(EngineError, match="interrupted"):
        list(other)
    assert list(finished(found.stream("w30")).tokens) == found.alone("w30", None, 6)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_pass_that_breaks_is_an_error_for_its_rows_only_and_not_for_later_ones() -> None:
    found = bench()
    stream = found.stream("w30", max_new_tokens=9)
    next(stream)
    hook = found.tiny.model.lm_head.register_forward_hook(_break)
    with pytest.raises(RuntimeError, match="broken"):
        list(stream)
    hook.remove()
    assert list(finished(found.stream("w30")).tokens) == found.alone("w30", None, 6)


@pytest.fixture
def unlogged(caplog: pytest.LogCaptureFixture) -> None:
    """pytest keeps what is logged, and with it the traceback of an error."""
    caplog.set_level(logging.CRITICAL)


def test_what_failed_holds_no_memory_though_its_error_is_kept(tmp_path: Path, unlogged: None) -> None:
    found = bench(path=tmp_path)
    stream = found.stream(adapter=0, max_new_tokens=9)
    next(stream)
    hook = found.tiny.model.lm_head.register_forward_hook(_break)
    with no_collector():
        with pytest.raises(RuntimeError, match="broken") as kept:
            list(stream)
        hook.remove()
        assert {one.in_flight for one in found.manager.residences()} == {0}
    assert kept.value.__traceback__ is not None


@pytest.mark.parametrize("reads_on", [True, False])
def test_a_request_that_failed_is_gone_with_its_error(tmp_path: Path, unlogged: None, reads_on: bool) -> None:
    found = bench(path=tmp_path, rows=2)
    with no_collector():
        stream = found.stream(adapter=0, max_new_tokens=60)
        other = found.stream(adapter=1, max_new_tokens=60)
        next(stream)
        next(other)
        hook = found.tiny.model.lm_head.register_forward_hook(_break)
        failed = [weakref.ref(one) for one in _errors_of(stream)]
        hook.remove()
        if reads_on:
            _errors_of(other)
        del other
        assert [one() for one in failed] == [None]


def _errors_of(stream: Iterator[Chunk]) -> list[Exception]:
    try:
        list(stream)
    except RuntimeError as error:
        return [error]
    return []


class _Broken(RuntimeError):
    """One that can be referred to weakly."""


def _break(*_: object) -> None:
    raise _Broken("broken")
