"""A process that spends: `python -m tests.evolution.budget_worker CATALOG CALLS`; -1 reserves once and dies."""

from __future__ import annotations

import os
import sys

from evolution.budget import Budget
from evolution.errors import BudgetSpentError
from registry.database import Database


def main(url: str, calls: int) -> None:
    budget = Budget(Database(url), "night", limit_microusd=200, limit_tokens=200)
    if calls < 0:
        budget.reserve(7, 7)
        os._exit(1)
    spent = 0
    for _ in range(calls):
        try:
            reservation = budget.reserve(7, 7)
        except BudgetSpentError:
            continue
        budget.settle(reservation, 5, 5)
        spent += 5
    print(spent, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
