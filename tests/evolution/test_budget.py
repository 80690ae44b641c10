"""Budgets: never exceeded, whoever races, and whatever dies in between."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta

import pytest

from evolution.budget import LEASE_S, Budget, Cost, Price
from evolution.errors import BudgetSpentError
from registry.database import Database


@pytest.fixture
def url(catalog_url: str) -> str:
    return catalog_url


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    opened = Database(url)
    yield opened
    opened.close()


def budget(database: Database, **options: object) -> Budget:
    return Budget(database, "night", **{"limit_microusd": 1000, "limit_tokens": 100} | options)  # type: ignore[arg-type]


def test_money_and_tokens_are_set_aside_then_settled(database: Database) -> None:
    ours = budget(database)
    reservation = ours.reserve(600, 60)
    assert ours.left() == Cost(microusd=400, tokens=40)
    ours.settle(reservation, 100, 10)
    assert ours.left() == Cost(microusd=900, tokens=90)
    assert ours.standing().spent == Cost(microusd=100, tokens=10)
    assert ours.standing().reserved == Cost()


@pytest.mark.parametrize(("microusd", "tokens"), [(401, 1), (1, 41)])
def test_too_much_of_either_is_refused_and_says_where_it_went(database: Database, microusd: int, tokens: int) -> None:
    ours = budget(database)
    ours.settle(ours.reserve(200, 20), 200, 20)
    ours.reserve(400, 40)
    with pytest.raises(BudgetSpentError, match=r"200 µ.* and 20 tokens are spent and 400 µ.* and 40 tokens promised"):
        ours.reserve(microusd, tokens)
    ours.reserve(400, 40)  # to the last cent


def test_what_nobody_settles_counts_as_spent_in_full(database: Database) -> None:
    clock = [datetime(2026, 11, 21, tzinfo=UTC)]
    ours = budget(database, now=lambda: clock[0])
    lost = ours.reserve(700, 70)
    clock[0] += timedelta(seconds=LEASE_S)
    ours.reserve(100, 10)
    assert ours.standing().spent == Cost(microusd=700, tokens=70)
    ours.settle(lost, 1, 1)  # late: it stays as it is
    assert ours.left() == Cost(microusd=200, tokens=20)


def test_settling_twice_counts_once(database: Database) -> None:
    ours = budget(database)
    reservation = ours.reserve(10, 10)
    ours.settle(reservation, 10, 10)
    ours.settle(reservation, 10, 10)
    assert ours.standing().spent == Cost(microusd=10, tokens=10)


def test_a_new_limit_holds_for_what_was_already_spent(database: Database) -> None:
    ours = budget(database)
    ours.settle(ours.reserve(1000, 100), 1000, 100)
    assert budget(database, limit_microusd=1500, limit_tokens=150).left() == Cost(microusd=500, tokens=50)
    assert ours.left() == Cost(microusd=500, tokens=50)


def test_accounts_are_apart(database: Database) -> None:
    budget(database).reserve(1000, 100)
    assert Budget(database, "other", limit_microusd=5, limit_tokens=5).left() == Cost(microusd=5, tokens=5)


def spend(ours: Budget, calls: int) -> int:
    """Tokens settled; each call reserves 7 and costs 5."""
    spent = 0
    for _ in range(calls):
        try:
            reservation = ours.reserve(7, 7)
        except BudgetSpentError:
            continue
        standing = ours.standing()
        assert (standing.spent + standing.reserved).within(standing.limit)
        ours.settle(reservation, 5, 5)
        spent += 5
    return spent


def test_eight_threads_do_not_exceed_it(database: Database) -> None:
    ours = budget(database, limit_microusd=200, limit_tokens=200)
    with ThreadPoolExecutor(8) as pool:
        spent = sum(pool.map(lambda _: spend(ours, 12), range(8)))
    assert spent == ours.standing().spent.tokens <= 200
    assert spent >= 195  # and is used up: less than one call is left
    assert ours.standing().reserved == Cost()


def test_eight_processes_do_not_exceed_it_and_one_that_dies_keeps_its_promise(url: str, database: Database) -> None:
    ours = budget(database, limit_microusd=200, limit_tokens=200)
    with ExitStack() as stack:
        dead = start(stack, url, -1)
        assert dead.wait(60) == 1
        workers = [start(stack, url, 12) for _ in range(7)]
        spent = sum(int(worker.communicate(timeout=60)[0]) for worker in workers)
    standing = ours.standing()
    assert standing.reserved == Cost(microusd=7, tokens=7)
    assert spent == standing.spent.tokens == 190  # of 193 that the dead one left


def start(stack: ExitStack, url: str, calls: int) -> subprocess.Popen[bytes]:
    """A process that spends, and does not outlive the test."""
    command = [sys.executable, "-m", "tests.evolution.budget_worker", url, str(calls)]
    process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE))
    stack.callback(process.kill)
    return process


@pytest.mark.parametrize(
    ("tokens", "microusd"), [((0, 0), 0), ((1, 0), 1), ((1_000_000, 0), 150_000), ((1000, 500), 450)]
)
def test_prices_are_rounded_up(tokens: tuple[int, int], microusd: int) -> None:
    price = Price(prompt_usd_per_million=0.15, completion_usd_per_million=0.6)
    assert price.cost(*tokens) == Cost(microusd=microusd, tokens=sum(tokens))
