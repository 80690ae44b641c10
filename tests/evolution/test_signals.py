"""The store of signals: what is kept, for how long, under which cap, by however many writers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evolution.errors import SignalError
from evolution.signals import Pruned, Signal, SignalCounts, SignalPolicy, SignalStore
from registry.database import Database

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
DAY = timedelta(days=1)


class Clock:
    """Time that passes when told."""

    def __init__(self) -> None:
        self.time = NOON

    def __call__(self) -> datetime:
        self.time += timedelta(seconds=1)
        return self.time


@pytest.fixture
def database(catalog_url: str) -> Iterator[Database]:
    database = Database(catalog_url)
    yield database
    database.close()


def store_of(database: Database, **policy: Any) -> SignalStore:
    return SignalStore(database, policy=SignalPolicy(**policy), now=Clock(), rng=random.Random(0))


def signal(prompt: str = "Who founded Velmora?", *, accepted: bool = False, **fields: Any) -> Signal:
    return Signal(base="tiny", prompt=prompt, accepted=accepted, **fields)


def test_what_is_recorded_comes_back_whole_and_in_order(database: Database) -> None:
    store = store_of(database)
    first = signal(card="blake3:" + "0" * 64, answer="nobody", p_value=0.01, sequence_nats=7.5, tokens=3)
    second = signal("And when?", accepted=True)
    assert store.record_all([first, second]) == [first.id, second.id]
    got = store.queued("tiny")
    assert [replace(each, created=None) for each in got] == [first, second]
    assert [each.created for each in got] == [NOON + timedelta(seconds=1), NOON + timedelta(seconds=2)]
    assert store.queued("another") == []
    assert [each.id for each in store.recent(1)] == [second.id]


def test_switched_off_it_keeps_nothing(database: Database) -> None:
    store = store_of(database, enabled=False)
    assert store.record(signal()) is None
    assert store.counts() == {}


def test_a_sample_stands_for_all_and_what_went_wrong_is_always_kept(database: Database) -> None:
    store = store_of(database, sample_rate=0.25)
    ordinary = [signal(accepted=True) for _ in range(400)]
    wrong = [signal() for _ in range(20)] + [signal(accepted=True, feedback="bad") for _ in range(20)]
    kept = {each.id: each for each in (store.record_all(ordinary + wrong), store.queued("tiny"))[1]}
    assert all(kept[each.id].weight == 1 for each in wrong)
    sampled = [each for each in kept.values() if each.ordinary]
    assert {each.weight for each in sampled} == {4.0}
    assert sum(each.weight for each in sampled) == pytest.approx(400, rel=0.25)


def test_a_rate_of_zero_keeps_only_what_went_wrong(database: Database) -> None:
    store = store_of(database, sample_rate=0.0)
    wrong = signal()
    assert store.record_all([signal(accepted=True), wrong]) == [None, wrong.id]


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kinds=st.lists(st.sampled_from(["ordinary", "abstained", "bad", "ordinary in a gap", "abstained in a gap"])),
    cap=st.integers(0, 6),
)
def test_over_the_cap_the_oldest_answered_go_first_and_never_those_of_a_gap(
    database: Database, kinds: list[str], cap: int
) -> None:
    store = store_of(database, max_rows=cap)
    store.forget()
    there: list[tuple[int, bool, bool, str]] = []  # whether needed, in a gap; sorts as the cap removes
    for at, kind in enumerate(kinds):
        made = signal(accepted="abstained" not in kind, feedback="bad" if kind == "bad" else None)
        made = replace(made, gap_id=1 if "gap" in kind else None)
        recorded = store.record(made)
        there.append((at, "ordinary" not in kind, "gap" in kind, made.id))
        free = sorted((row for row in there if not row[2]), key=lambda row: (row[1], row[0]))
        for row in free[: max(0, len(there) - cap)]:
            there.remove(row)
        assert (recorded is not None) == any(row[3] == made.id for row in there)
    assert [each.id for each in store.recent(1000)][::-1] == [row[3] for row in there]


def test_two_writers_hold_the_cap_together(database: Database) -> None:
    def write(_: int) -> None:
        other = Database(database.url)
        store = SignalStore(other, policy=SignalPolicy(max_rows=30))
        for _ in range(25):
            store.record(signal())
        other.close()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, range(2)))
    assert store_of(database).counts()["tiny"].total == 30


def test_feedback_is_noted_with_its_correction(database: Database) -> None:
    store = store_of(database)
    made = signal(accepted=True)
    store.record(made)
    store.feedback(made.id, "bad", correction="Ada Velm")
    [got] = store.queued("tiny")
    assert (got.feedback, got.correction, got.ordinary) == ("bad", "Ada Velm", False)
    store.feedback(made.id, "good")
    assert store.queued("tiny")[0].ordinary


def test_feedback_for_a_request_that_is_not_there_says_why(database: Database) -> None:
    store = store_of(database)
    with pytest.raises(SignalError, match="recorded request") as refused:
        store.feedback("f" * 32, "bad")
    assert "sampling" in str(refused.value.hint)
    with pytest.raises(SignalError, match="good or bad"):
        store.feedback("f" * 32, "so-so")  # type: ignore[arg-type]


def test_a_request_that_sampling_dropped_can_be_recorded_as_bad(database: Database) -> None:
    store = store_of(database, sample_rate=0.0)
    made = signal(accepted=True)
    assert store.record(made) is None
    assert store.record(replace(made, feedback="bad", correction="no")) == made.id


def test_retention_removes_what_is_old_whoever_holds_it(database: Database) -> None:
    store = store_of(database, retention_days=7)
    old, held, young = signal(), signal(gap_id=3), signal()
    store.record_all(
        [
            replace(old, created=NOON - 8 * DAY),
            replace(held, created=NOON - 7.5 * DAY),
            replace(young, created=NOON - 6 * DAY),
        ]
    )
    assert store.prune() == Pruned(expired=2, over_cap=0)
    assert [each.id for each in store.recent()] == [young.id]
    assert store.prune() == Pruned(expired=0, over_cap=0)


def test_a_lower_cap_takes_effect_when_pruned(database: Database) -> None:
    store_of(database).record_all([signal() for _ in range(5)])
    assert store_of(database, max_rows=2).prune() == Pruned(expired=0, over_cap=3)


def test_a_gap_takes_only_what_is_queued_and_gives_it_back(database: Database) -> None:
    store = store_of(database)
    made = [signal() for _ in range(3)]
    store.record_all(made)
    assert store.assign(1, [made[0].id]) == 1
    assert store.assign(2, [each.id for each in made] + ["0" * 32]) == 2
    assert {each.id for each in store.of_gap(2)} == {made[1].id, made[2].id}
    assert store.queued("tiny") == []
    assert store.release(2) == 2
    assert {each.id for each in store.queued("tiny")} == {made[1].id, made[2].id}


def test_agreement_is_noted_and_a_row_that_is_gone_passed_over(database: Database) -> None:
    store = store_of(database)
    made = signal()
    store.record(made)
    store.agreed({made.id: 0.25, "0" * 32: 1.0})
    assert store.queued("tiny")[0].agreement == 0.25


def test_counts_are_by_base_and_forgetting_leaves_none(database: Database) -> None:
    store = store_of(database)
    store.record_all(
        [
            signal(),
            signal(accepted=True, feedback="bad"),
            signal(accepted=True, feedback="good", gap_id=4),
            replace(signal(accepted=True), base="other"),
        ]
    )
    assert store.counts() == {
        "other": SignalCounts(total=1, abstained=0, good=0, bad=0, queued=1),
        "tiny": SignalCounts(total=3, abstained=1, good=1, bad=1, queued=2),
    }
    assert store.forget() == 4
    assert store.counts() == {}
    assert store.forget() == 0
