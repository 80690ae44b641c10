"""Nodes in one process, without gRPC: what one answers, the other decodes; lines between them can be cut."""

from __future__ import annotations

import shutil
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from federation import wire
from federation.answers import Answers
from federation.errors import PeerUnreachableError
from federation.peer import Peer
from federation.sync import SyncReport, sync
from registry.card import LoRACard
from registry.changes import Position
from registry.digest import Digest
from registry.format import described
from registry.manifest import FORMAT_VERSION
from registry.store import Registry


class Direct:
    """A client of `answers`. After `calls` calls (None: never) the line is cut."""

    def __init__(self, answers: Answers | None, calls: int | None) -> None:
        self._answers, self._calls = answers, calls

    def health(self) -> wire.Health:
        (answer,) = self._ask(wire.ACTION_HEALTH)
        return wire.decode_health(answer)

    def changes(self, known: Position) -> wire.ChangesPage:
        (answer,) = self._ask(wire.ACTION_CHANGES, wire.encode_changes_request(known))
        return wire.decode_changes(answer, known)

    def describe(self, digest: Digest) -> LoRACard:
        parts = [*self._ask(wire.ACTION_MANIFEST, wire.encode_card_request(wire.CardRequest(digest=digest)))]
        metadata = {wire.FORMAT_KEY: b"%d" % FORMAT_VERSION, wire.MANIFEST_KEY: parts[0]}
        manifest, signature = described(metadata | dict(zip([wire.SIGNATURE_KEY], parts[1:], strict=False)))
        return LoRACard(manifest_bytes=parts[0], manifest=manifest, tensors=(), signature=signature)

    def read(self, digest: Digest, offset: int, nbytes: int) -> Generator[memoryview, None, None]:
        request = wire.CardRequest(digest=digest, offset=offset, nbytes=nbytes)
        yield from map(memoryview, self._ask(wire.ACTION_TENSORS, wire.encode_card_request(request)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""

    def _ask(self, action: str, body: bytes = b"") -> Iterator[bytes]:
        if self._answers is None or self._calls == 0:
            raise PeerUnreachableError("the line is cut")
        self._calls = None if self._calls is None else self._calls - 1
        return map(bytes, self._answers.actions[action].answer(body))


@dataclass
class Swarm:
    """Nodes with homes under `directory`, copies of `empty_home`. `cut`: pairs of nodes with no line between them."""

    directory: Path
    empty_home: Path
    nodes: list[Registry] = field(default_factory=list)
    cut: set[frozenset[int]] = field(default_factory=set)

    def add(self) -> None:
        home = self.directory / f"node-{len(self.nodes)}"
        shutil.copytree(self.empty_home, home)
        self.nodes.append(Registry.open(home))

    def restart(self, index: int) -> None:
        home = self.nodes[index].home
        self.nodes[index].close()
        self.nodes[index] = Registry.open(home)

    def sync(self, index: int, *, calls: int | None = None) -> SyncReport:
        """Have one node sync with all others; each line is cut after so many calls."""
        peers = [Peer(host="10.0.0.1", port=other + 1) for other in range(len(self.nodes)) if other != index]

        def connect(peer: Peer, timeout_s: float) -> Direct:
            other = peer.port - 1
            if {index, other} in self.cut:
                return Direct(None, None)
            registry = self.nodes[other]
            return Direct(Answers(registry, node_id=registry.identity.id, name=f"node-{other}"), calls)

        return sync(self.nodes[index], peers, connect=connect)

    def close(self) -> None:
        for node in self.nodes:
            node.close()
