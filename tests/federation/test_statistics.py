"""A peer's statistics for the router without its weights: served, fetched, and verified though the peer lies."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pyarrow import flight

from federation import limits, wire
from federation.client import LoRAFlightClient
from federation.errors import PeerError, TransportError
from federation.server import LoRAFlightServer
from registry.card import LoRACard
from registry.digest import digest_of
from registry.identity import Identity
from registry.manifest import Manifest
from registry.store import Registry
from registry.tensor import Role, Tensor
from tests.federation.liar import Liar, header
from tests.registry.cards import module_shapes, small_card, statistics


def described_card(**changes: Any) -> LoRACard:
    return small_card("honest", **changes).with_routing(*statistics())


@pytest.fixture
def card(liar: Liar) -> LoRACard:
    liar.card = described_card(modules=3, dtype="bfloat16")  # statistics lie before and behind the weights
    return liar.card


def fetch(liar: Liar) -> tuple[Manifest, tuple[Tensor, ...]]:
    with LoRAFlightClient(liar.address) as client:
        return client.fetch_statistics(liar.card.digest)


def bits(tensors: Any) -> dict[str, bytes]:
    return {tensor.name: bytes(tensor.data) for tensor in tensors}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_statistics_come_from_a_server_and_weights_stay_there(
    theirs: Registry, server: LoRAFlightServer, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = described_card(modules=module_shapes(8, d_in=1 << 17, d_out=8), dtype=dtype)
    entry = theirs.publish(card)
    received: list[int] = []
    results = LoRAFlightClient._results

    def counted(*args: Any) -> Iterator[memoryview]:
        for result in results(*args):
            received.append(len(result))
            yield result

    monkeypatch.setattr(LoRAFlightClient, "_results", counted)
    with LoRAFlightClient(server.address) as client:
        manifest, tensors = client.fetch_statistics(entry.digest)
    assert manifest.routing == card.manifest.routing
    assert bits(tensors) == bits(statistics()[1])
    assert sum(received) < sum(len(part) for part in header(theirs.get(entry.digest))) + limits.TENSOR_CHUNK_BYTES // 16


def test_an_inventory_says_which_cards_have_statistics(theirs: Registry, server: LoRAFlightServer) -> None:
    plain, described = theirs.publish(small_card("plain")), theirs.publish(described_card())
    with LoRAFlightClient(server.address) as client:
        for _ in range(2):
            said = {entry.digest: entry.has_statistics for entry in client.list_remote_skills()}
            assert said == {plain.digest: False, described.digest: True}


def test_a_damaged_card_does_not_take_the_inventory_with_it(theirs: Registry, server: LoRAFlightServer) -> None:
    good, bad, rotten, gone = (theirs.publish(described_card().describe(version=version)) for version in "1234")
    bad_path, rotten_path = theirs.path_of(bad.digest), theirs.path_of(rotten.digest)
    for path in (bad_path, rotten_path):
        path.chmod(0o600)
    bad_path.write_bytes(b"no arrow at all")
    rotten_path.write_bytes(rotten_path.read_bytes().replace(b'{"adapter"', b'!"adapter"'))
    theirs.path_of(gone.digest).unlink()
    with LoRAFlightClient(server.address) as client:
        said = {entry.digest: entry.has_statistics for entry in client.list_remote_skills()}
    assert said == {good.digest: True} | dict.fromkeys((bad.digest, rotten.digest, gone.digest), False)


def test_a_card_without_statistics_gives_none_and_is_asked_for_no_bytes(liar: Liar) -> None:
    manifest, tensors = fetch(liar)
    assert (manifest, tensors) == (liar.card.manifest, ())
    assert len(liar.asked) == 1


def test_only_the_statistics_are_asked_for(liar: Liar, card: LoRACard) -> None:
    assert bits(fetch(liar)[1]) == bits(card.statistics.values())
    _, *requests = map(wire.decode_card_request, liar.asked)
    assert len(requests) == 2
    assert sum(request.nbytes or 0 for request in requests) == sum(t.nbytes for t in card.statistics.values())


def test_a_peer_that_sends_all_though_asked_for_a_part(liar: Liar, card: LoRACard) -> None:
    whole = b"".join(bytes(tensor.data) for tensor in card.tensors)
    liar.tensor_bytes = lambda: iter([whole[wire.decode_card_request(liar.asked[-1]).offset :]])
    with pytest.raises(PeerError, match="got more"):
        fetch(liar)


LIES: list[tuple[str, Callable[[bytes], list[bytes]]]] = [
    ("not whole", lambda data: []),
    ("not whole", lambda data: [data[:-1]]),
    ("not whole", lambda data: [b""]),
    ("got more", lambda data: [data, b"x"]),
    ("got more", lambda data: [data, b""]),
    ("expected blake3", lambda data: [bytes([data[0] ^ 1]) + data[1:]]),
    ("expected blake3", lambda data: [bytes(len(data))]),
]


@pytest.mark.parametrize(("match", "lie"), LIES)
def test_statistics_are_held_to_the_manifest(
    liar: Liar, card: LoRACard, match: str, lie: Callable[[bytes], list[bytes]]
) -> None:
    honest = liar.tensor_bytes
    liar.tensor_bytes = lambda: iter(lie(b"".join(honest())))
    with pytest.raises(PeerError, match=match):
        fetch(liar)


def test_nan_that_the_manifest_promises(liar: Liar, card: LoRACard) -> None:
    at = [tensor.name for tensor in card.tensors].index("routing.calibration")
    data = np.full(5, np.nan, np.float32).tobytes()
    fields = json.loads(card.manifest_bytes)
    fields["tensors"][at]["digest"] = digest_of(data)
    manifest = json.dumps(fields).encode()
    bad = replace(card.tensors[at], data=memoryview(data))
    forged = (*card.tensors[:at], bad, *card.tensors[at + 1 :])
    liar.card = replace(card, manifest_bytes=manifest, manifest=Manifest.parse(manifest), tensors=forged)
    with pytest.raises(PeerError, match="NaN"):
        fetch(liar)


def test_a_signature_of_somebody_else(liar: Liar, card: LoRACard) -> None:
    liar.card = signed = card.signed(Identity.generate())
    forged = Identity.generate().sign(signed.manifest_bytes)
    liar.header = lambda: iter([signed.manifest_bytes, str(forged).encode()])
    with pytest.raises(PeerError, match="publisher"):
        fetch(liar)
    assert len(liar.asked) == 1, "no byte of a forged card is asked for"


def test_the_manifest_of_another_card(liar: Liar, card: LoRACard) -> None:
    liar.header = lambda: header(small_card("other"))
    with pytest.raises(PeerError, match="expected the manifest of card"):
        fetch(liar)


def test_more_statistics_than_a_card_may_have(liar: Liar, card: LoRACard) -> None:
    fields = json.loads(card.manifest_bytes)
    large = {"name": "x", "role": "stats", "dtype": "float32", "shape": [1 << 20], "nbytes": 4 << 20}
    fields["tensors"].append(large | {"digest": digest_of(b"")})
    manifest = json.dumps(fields).encode()
    liar.header = lambda: iter([manifest])
    with LoRAFlightClient(liar.address) as client, pytest.raises(PeerError, match="statistics of at most 65536"):
        client.fetch_statistics(digest_of(manifest))
    assert len(liar.asked) == 1


def test_statistics_scattered_over_the_card_are_not_collected(liar: Liar) -> None:
    card = small_card("honest", modules=limits.MAX_STATISTICS_RUNS)
    fields = json.loads(card.manifest_bytes)
    crumb = {"role": "stats", "dtype": "float32", "shape": [1], "nbytes": 4, "digest": digest_of(bytes(4))}
    rows = [[{"name": f"x{index}", **crumb}, row] for index, row in enumerate(fields["tensors"])]
    fields["tensors"] = [row for pair in rows for row in pair]
    manifest = json.dumps(fields).encode()
    liar.header = lambda: iter([manifest])
    with LoRAFlightClient(liar.address) as client, pytest.raises(PeerError, match="in at most 8 places"):
        client.fetch_statistics(digest_of(manifest))
    assert len(liar.asked) == 1


def test_statistics_of_no_bytes(liar: Liar) -> None:
    empty = Tensor.from_numpy("later", Role.STATS, np.zeros((0, 3), np.float32))
    liar.card = small_card("honest").with_routing(None, [empty])
    (tensor,) = fetch(liar)[1]
    assert (tensor.name, tensor.shape, tensor.nbytes) == ("later", (0, 3), 0)


def test_a_busy_peer_is_no_liar(liar: Liar, card: LoRACard) -> None:
    def busy() -> Iterator[bytes]:
        raise flight.FlightUnavailableError("busy")
        yield b""

    liar.tensor_bytes = busy
    with pytest.raises(TransportError):
        fetch(liar)
