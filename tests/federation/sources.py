"""Peers without a network, for transfers: they hold cards, and do what is set of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace

from federation.board import Holder, Wanted
from federation.errors import PeerError, PeerUnreachableError, TransferError
from registry.card import LoRACard
from registry.digest import Digest
from registry.entries import Origin


@dataclass(kw_only=True, eq=False)
class FakeSource:
    """Gives `cards` in pieces of `piece_bytes`.

    `cut_after`: the line breaks for good after so many tensor bytes in all, `cuts_left` so many times. `damage`
    changes what is given from an offset on. `on_piece` is called before each piece.
    """

    cards: dict[Digest, LoRACard] = field(default_factory=dict)
    piece_bytes: int = 1 << 20
    cut_after: int | None = None
    cuts_left: int = 1 << 30
    damage: Callable[[int, bytes], bytes] = lambda offset, data: data
    on_piece: Callable[[], object] = lambda: None
    on_cut: Callable[[], object] = lambda: None
    is_down: bool = False
    described: list[Digest] = field(default_factory=list)
    given: int = 0
    asked: list[tuple[int, int]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def describe(self, digest: Digest) -> LoRACard:
        with self.lock:
            self.described.append(digest)
        if self.is_down:
            raise PeerUnreachableError("nobody answers")
        if digest not in self.cards:
            raise PeerError("it does not have that")
        return replace(self.cards[digest], tensors=())

    def read(self, digest: Digest, offset: int, nbytes: int) -> Generator[memoryview, None, None]:
        with self.lock:
            self.asked.append((offset, nbytes))
        data = b"".join(tensor.data for tensor in self.cards[digest].tensors)[offset : offset + nbytes]
        for at in range(0, nbytes, self.piece_bytes):
            self.on_piece()
            piece = self.damage(offset + at, data[at : at + self.piece_bytes])
            with self.lock:
                if self.cut_after is not None and self.cuts_left and self.given + len(piece) > self.cut_after:
                    self.cuts_left -= 1
                    self.on_cut()
                    raise TransferError("the line broke")
                self.given += len(piece)
            yield memoryview(piece)


def holder_of(source: FakeSource, number: int = 1) -> Holder:
    return Holder(source=source, origin=Origin(peer_id=f"{number:032x}", address=f"192.0.2.{number}:7420"))


def holding(*cards: LoRACard, **behaviour: object) -> FakeSource:
    return FakeSource(cards={card.digest: card for card in cards}, **behaviour)  # type: ignore[arg-type]


def wanted(card: LoRACard, *holders: Holder) -> Wanted:
    return Wanted(digest=card.digest, label=f"{card.name}@{card.version}", nbytes=card.nbytes, holders=holders)
