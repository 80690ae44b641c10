"""Where adapters are, and which must leave the device when others come: decided from sizes and uses, nothing is moved.

device   slots in the model, within a budget in bytes
host     pinned memory beside a CUDA device, within a budget of its own
file     the card, mapped. On the CPU there is no tier between: the kernel's page cache is the host memory, and in
         the card's own dtype the slots lie over the mapped file itself
peer     a card that is not here: `arrowmoe.swarm`
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Generic, Literal, TypeVar

from arrowmoe.errors import AdapterMemoryError

Tier = Literal["device", "host", "file"]
_V = TypeVar("_V")


@dataclass(frozen=True, kw_only=True)
class Residence:
    """Where an adapter is, and why it stays: `nbytes` are those of its slots, `in_flight` the batches that use it.

    `uses` counts the batches so far. One that is `leaving` was removed, and goes when the batches in flight are done.
    """

    digest: str
    name: str
    tier: Tier
    nbytes: int
    uses: int
    used_at: datetime | None
    pinned: bool
    priority: int
    in_flight: int
    leaving: bool


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What adapters take, in bytes: slots on the device, of at most `budget`; layouts in flight; on the host."""

    slots: int
    budget: int | None
    layouts: int
    host: int


@dataclass(frozen=True, kw_only=True)
class Claim:
    """An adapter that takes `nbytes` of the device, last used at `turn`; pinned or in flight, it stays."""

    digest: str
    nbytes: int
    priority: int
    turn: int
    pinned: bool
    in_flight: bool


def leavers(wanted: str, needed_bytes: int, claims: Iterable[Claim], budget_bytes: int | None) -> list[str]:
    """Who must go so that `wanted` finds room: the lowest priority first, then what was used the longest ago.

    Raises `AdapterMemoryError` where it would find none even so; its `later` says whether waiting may help.
    """
    if budget_bytes is None:
        return []
    staying = list(claims)
    over = needed_bytes + sum(claim.nbytes for claim in staying) - budget_bytes
    going: list[str] = []
    loose = [claim for claim in staying if not (claim.pinned or claim.in_flight)]
    for claim in sorted(loose, key=lambda one: (one.priority, one.turn)):
        if over <= 0:
            break
        going.append(claim.digest)
        over -= claim.nbytes
    if over > 0:
        pinned = sum(claim.nbytes for claim in staying if claim.pinned)
        flying = sum(claim.nbytes for claim in staying if claim.in_flight and not claim.pinned)
        raise _no_room(wanted, needed_bytes, budget_bytes, pinned, flying)
    return going


def _no_room(wanted: str, needed: int, budget: int, pinned: int, flying: int) -> AdapterMemoryError:
    later = needed + pinned <= budget
    wait = "ask again when the batches in flight are done, or " if later else "use fewer adapters in one batch, or "
    return AdapterMemoryError(
        f"{wanted}: expected room for {needed} bytes of adapters on the device, got {budget - pinned - flying}: "
        f"of {budget}, {pinned} are pinned and {flying} in flight",
        hint=f"{wait}raise engine.budget_mib",
        later=later,
    )


class Kept(Generic[_V]):
    """Values by key within `budget_bytes`; the one that was kept the longest ago goes first. For any thread."""

    def __init__(self, budget_bytes: int) -> None:
        self._budget = budget_bytes
        self._values: dict[str, tuple[_V, int]] = {}
        self._lock = threading.RLock()
        self.nbytes = 0

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def get(self, key: str) -> _V | None:
        """The value of `key`; None if it is not kept."""
        value, _ = self._values.get(key, (None, 0))
        return value

    def keep(self, key: str, value: _V, nbytes: int) -> None:
        """Keep a value as the newest, unless it alone exceeds the budget."""
        with self._lock:
            self.drop(key)
            if nbytes > self._budget:
                return
            self._values[key] = (value, nbytes)
            self.nbytes += nbytes
            self.shrink(self.nbytes - self._budget)

    def shrink(self, nbytes: int) -> int:
        """Let go of the oldest values until so many bytes are free that were not; how many are, if that is all."""
        with self._lock:
            before = self.nbytes
            while self._values and before - self.nbytes < nbytes:
                self.drop(next(iter(self._values)))
            return before - self.nbytes

    def drop(self, key: str) -> None:
        """Let go of a value, if it is kept."""
        with self._lock:
            _, nbytes = self._values.pop(key, (None, 0))
            self.nbytes -= nbytes
