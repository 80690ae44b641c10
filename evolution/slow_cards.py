"""Slow cards: in one card for a base, what its experts have learnt; and the way back.

They are a stack. Each is an ordinary card that holds what the one below it holds, and one expert more. Those below stay
in the registry, where the newest of a name is the one that is routed to: taking the top one back removes it, and what
was served before it is served again, bit for bit. What a stack is made of is noted in the journal; no torch, no model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from typing import Any, Final

from evolution.clock import Now, utc_now
from evolution.errors import JobError
from evolution.journal import Journal
from registry.errors import UnknownCardError
from registry.logs import get_logger
from registry.store import Registry

MOST: Final = 10_000
"""Gaps and jobs that are looked through."""
_MOST_OF_BASE: Final = 64
"""Characters of a base's name in its slow card's."""
_DIGITS_OF_NODE: Final = 8

log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Expert:
    """An expert of this node: its card's digest and name, and the job that has grown it."""

    card: str
    name: str
    job: int


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A slow card, by digest and label, and the expert that it holds beyond the layer below."""

    card: str
    label: str
    expert: Expert


@dataclass(frozen=True, kw_only=True)
class SetAside:
    """Why an expert was not consolidated or is no longer, and when; `until_told` ones are not tried again."""

    why: str
    at: datetime
    until_told: bool = False


@dataclass(frozen=True, kw_only=True)
class Slow:
    """The stack of one base, the lowest first, and experts that were set aside, by digest.

    `published` counts all cards that ever were on it, so that no version is given twice.
    """

    layers: tuple[Layer, ...] = ()
    aside: Mapping[str, SetAside] = field(default_factory=dict)
    published: int = 0

    @property
    def next_version(self) -> str:
        """Of the card that is put on next."""
        return str(self.published + 1)

    @property
    def held(self) -> Mapping[str, Expert]:
        """The experts in the top card, by name: of two of one name the later one has replaced the other."""
        return {layer.expert.name: layer.expert for layer in self.layers}

    def to_json(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        aside = {card: asdict(one) | {"at": one.at.isoformat()} for card, one in self.aside.items()}
        return {"layers": [asdict(layer) for layer in self.layers], "aside": aside, "published": self.published}

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Slow:
        """What `to_json` gave."""
        return cls(
            layers=tuple(Layer(**layer | {"expert": Expert(**layer["expert"])}) for layer in said["layers"]),
            aside={
                card: SetAside(**one | {"at": datetime.fromisoformat(one["at"])}) for card, one in said["aside"].items()
            },
            published=said["published"],
        )


class SlowCards:
    """The stacks of one home. One process at a time may change that of a base: a night's job, or its owner."""

    def __init__(self, registry: Registry, journal: Journal, *, now: Now = utc_now) -> None:
        self._registry, self._journal, self._now = registry, journal, now

    def of(self, base: str) -> Slow:
        """The stack of `base`; a card that somebody has removed was taken back by that."""
        noted = self._journal.note(_key(base))
        slow = Slow() if noted is None else Slow.from_json(noted)
        while slow.layers and not self.is_here(slow.layers[-1].card):
            slow = _without_top(slow, self._aside("its slow card was removed", until_told=True))
        return slow

    def bases(self) -> list[str]:
        """Bases that have a slow card."""
        grown = dict.fromkeys(gap.base for gap in self._journal.gaps(limit=MOST))
        return [base for base in grown if self.of(base).layers]

    def name(self, base: str) -> str:
        """What the slow card of `base` is called.

        The node is part of it: every node has one, and of cards of one name only the newest is routed to.
        """
        short = re.sub(r"[^A-Za-z0-9._-]+", "-", base.rpartition("/")[2])[:_MOST_OF_BASE].strip("._-")
        return f"slow-{short or 'base'}-{self._registry.identity.id[:_DIGITS_OF_NODE]}"

    def put_on(self, base: str, layer: Layer) -> None:
        """Enter a card that was published."""
        slow = self.of(base)
        self._keep(base, replace(slow, layers=(*slow.layers, layer), published=slow.published + 1))

    def set_aside(self, base: str, expert: Expert, why: str) -> None:
        """Note why an expert was not consolidated."""
        slow = self.of(base)
        self._keep(base, replace(slow, aside={**slow.aside, expert.card: self._aside(why)}))

    def take_back(self, base: str, why: str, *, may_return: bool = False) -> Layer:
        """Remove the top card, so that the one below is served again; its expert stays, as an expert.

        It is not consolidated again unless it `may_return`. Raises `JobError` where there is no slow card.
        """
        slow = self.of(base)
        if not slow.layers:
            raise JobError(f"expected a base with a slow card, got {base}, so there is nothing to take back")
        top = slow.layers[-1]
        self._registry.remove(top.card)  # first: a process that dies between the two has taken it back as well
        self._keep(base, _without_top(slow, None if may_return else self._aside(why, until_told=True)))
        log.warning("slow_card_taken_back", label=top.label, expert=top.expert.name, why=why)
        return top

    def is_here(self, digest: str) -> bool:
        """Whether the registry has a card."""
        try:
            self._registry.entry(digest)
        except UnknownCardError:
            return False
        return True

    def _aside(self, why: str, *, until_told: bool = False) -> SetAside:
        return SetAside(why=why, at=self._now(), until_told=until_told)

    def _keep(self, base: str, slow: Slow) -> None:
        self._journal.keep_note(_key(base), slow.to_json())


def _without_top(slow: Slow, aside: SetAside | None) -> Slow:
    top = slow.layers[-1]
    noted = {} if aside is None else {top.expert.card: aside}
    return replace(slow, layers=slow.layers[:-1], aside={**slow.aside, **noted})


def _key(base: str) -> str:
    return f"slow:{base}"


__all__ = ["Expert", "Layer", "SetAside", "Slow", "SlowCards"]
