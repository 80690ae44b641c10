from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import flight

from federation import limits, wire
from federation.client import LoRAFlightClient, probe
from federation.errors import FederationError, PeerError, PeerUnreachableError, TransportError
from registry.format import SCHEMA, card_batches, card_schema
from registry.identity import Identity
from tests.federation.liar import Liar, entry_of, health
from tests.registry.cards import module_shapes, small_card


def fetch(liar: Liar) -> Any:
    with LoRAFlightClient(liar.address) as client:
        return client.fetch_skill(liar.card.digest)


def test_an_honest_exchange(liar: Liar) -> None:
    with LoRAFlightClient(liar.address) as client:
        assert client.health() == health()
        assert client.list_remote_skills() == [entry_of(liar.card)]
        arrived: list[int] = []
        card = client.fetch_skill(liar.card.digest, arrived.append)
    assert card == liar.card
    assert [bytes(tensor.data) for tensor in card.tensors] == [bytes(tensor.data) for tensor in liar.card.tensors]
    assert sum(arrived) == liar.card.nbytes


def test_another_card_than_asked(liar: Liar) -> None:
    other = small_card("other")
    liar.info_schema = card_schema(other)
    with pytest.raises(PeerError, match="expected the manifest of card"):
        fetch(liar)


def test_another_card_in_the_stream_than_in_the_info(liar: Liar) -> None:
    other = small_card("other")
    liar.stream_schema, liar.batches = card_schema(other), lambda: card_batches(other)
    with pytest.raises(PeerError, match="expected the manifest of card"):
        fetch(liar)


def test_the_right_manifest_over_other_tensors(liar: Liar) -> None:
    liar.batches = lambda: card_batches(small_card("honest", modules=3, seed=1))
    with pytest.raises(PeerError, match=r"damaged or forged.*expected blake3"):
        fetch(liar)


def test_a_signature_of_somebody_else(liar: Liar) -> None:
    card = liar.card = small_card("signed").signed(Identity.generate())
    forged = Identity.generate().sign(card.manifest_bytes)
    metadata = {**card_schema(card).metadata, b"arrowmoe.signature": str(forged).encode()}
    liar.info_schema = liar.stream_schema = SCHEMA.with_metadata(metadata)
    liar.batches = lambda: card_batches(card)
    with pytest.raises(PeerError, match="publisher"):
        fetch(liar)


def test_fewer_tensors_than_promised(liar: Liar) -> None:
    liar.batches = lambda: (batch.slice(0, 2) for batch in card_batches(liar.card))
    with pytest.raises(PeerError, match="damaged or forged"):
        fetch(liar)


def test_nothing_at_all(liar: Liar) -> None:
    liar.batches = lambda: iter([])
    with pytest.raises(PeerError, match="not whole"):
        fetch(liar)


def test_more_than_promised_is_stopped_early(liar: Liar) -> None:
    sent = 0

    def endless() -> Iterator[pa.RecordBatch]:
        nonlocal sent
        for _ in range(10_000):
            sent += 1
            yield from card_batches(liar.card)

    liar.batches = endless
    with pytest.raises(PeerError, match="got more, so the transfer was stopped"):
        fetch(liar)
    assert sent < 5_000  # what gRPC had buffered; the rest was cancelled


def test_no_more_arrives_ahead_of_a_slow_reader_than_the_limit_says(liar: Liar) -> None:
    card = liar.card = small_card("large", modules=module_shapes(64, d_in=1 << 16, d_out=4))
    sent, sent_while_waiting = 0, []

    def counted() -> Iterator[pa.RecordBatch]:
        nonlocal sent
        for batch in card_batches(card):
            sent += batch.nbytes
            yield batch

    def slow(_: int) -> None:
        if not sent_while_waiting:
            time.sleep(1)
            sent_while_waiting.append(sent)

    liar.batches = counted
    with LoRAFlightClient(liar.address) as client:
        assert client.fetch_skill(card.digest, slow) == card
    assert sent_while_waiting[0] < limits.READ_AHEAD_BYTES + (24 << 20)  # and what the sockets and the server hold
    assert sent > 2 * sent_while_waiting[0]


def test_fat_rows_are_stopped_by_their_bytes(liar: Liar) -> None:
    (batch,) = card_batches(liar.card)
    fat = pa.record_batch(
        [*batch.columns[:4], pa.array([bytes(1 << 20)] * batch.num_rows, pa.large_binary())], schema=SCHEMA
    )
    liar.batches = lambda: iter([fat])
    with pytest.raises(PeerError, match="got more, so the transfer was stopped"):
        fetch(liar)


def test_empty_batches_without_end(liar: Liar) -> None:
    empty = pa.record_batch([pa.array([], field.type) for field in SCHEMA], schema=SCHEMA)
    liar.batches = lambda: itertools.repeat(empty)
    with pytest.raises(PeerError, match="got an empty one"):
        fetch(liar)


def test_other_columns(liar: Liar) -> None:
    schema = pa.schema([("a", pa.int64())]).with_metadata(card_schema(liar.card).metadata)
    liar.stream_schema = schema
    liar.batches = lambda: iter([pa.record_batch([pa.array([1])], schema=schema)])
    with pytest.raises(PeerError, match="expected the columns of a card"):
        fetch(liar)


@pytest.mark.parametrize("metadata", [None, {}, {b"arrowmoe.manifest": b""}, {b"arrowmoe.manifest": b"\xff\x00"}])
def test_no_manifest(liar: Liar, metadata: dict[bytes, bytes] | None) -> None:
    liar.info_schema = SCHEMA.with_metadata(metadata)
    with pytest.raises(PeerError, match="manifest"):
        fetch(liar)


def test_a_card_that_promises_too_much_is_refused_before_its_data(liar: Liar, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_CARD_BYTES", liar.card.nbytes - 1)
    asked: list[int] = []
    liar.batches = lambda: iter(asked.append(1) or [])
    with pytest.raises(PeerError, match="so it is not fetched"):
        fetch(liar)
    assert not asked


def test_a_card_with_a_tensor_over_the_message_limit_is_fetched(liar: Liar) -> None:
    liar.card = small_card("large", modules=module_shapes(1, d_in=1 << 20, d_out=4), rank=5)
    assert max(tensor.nbytes for tensor in liar.card.tensors) > limits.MAX_MESSAGE_BYTES
    liar.batches = lambda: card_batches(liar.card)
    assert fetch(liar) == liar.card


@pytest.mark.parametrize(
    "results",
    [
        lambda: iter([]),
        lambda: iter([b"{}"]),
        lambda: iter([b"not json"]),
        lambda: iter([b"x" * 5000]),
        lambda: iter([wire.encode_health(health(protocol=9))]),
        lambda: itertools.repeat(b"{}"),
    ],
)
def test_a_health_answer_that_is_none(liar: Liar, results: Callable[[], Iterator[bytes]]) -> None:
    liar.results[wire.ACTION_HEALTH] = results
    with LoRAFlightClient(liar.address) as client, pytest.raises(PeerError):
        client.health()


def test_what_a_peer_says_cannot_drive_a_terminal(liar: Liar) -> None:
    def failing() -> Iterator[bytes]:
        raise flight.FlightServerError("\x1b[2J\x07 evil\n" + "long" * 1000)

    liar.results[wire.ACTION_HEALTH] = failing
    with LoRAFlightClient(liar.address) as client, pytest.raises(PeerError) as caught:
        client.health()
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (flight.FlightUnavailableError("busy"), TransportError),
        (flight.FlightTimedOutError("slow"), TransportError),
        (flight.FlightUnauthorizedError("no"), PeerError),
        (flight.FlightServerError("none", wire.NOT_FOUND), PeerError),
        (KeyError("x"), PeerError),
        (NotImplementedError(), PeerError),
    ],
)
def test_what_a_server_raises_is_one_of_ours(liar: Liar, raised: Exception, expected: type[FederationError]) -> None:
    def failing() -> Iterator[pa.RecordBatch]:
        yield from card_batches(liar.card)
        raise raised

    liar.batches = failing
    with pytest.raises(expected):
        fetch(liar)


def measured(address: str, what: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.federation.measure", address, what]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    answer: dict[str, Any] = json.loads(said.stdout)
    return answer


def test_200_mib_of_metadata_take_no_memory(liar: Liar) -> None:
    liar.info_schema = SCHEMA.with_metadata({b"arrowmoe.manifest": bytes(200 << 20)})
    answer = measured(liar.address, liar.card.digest)
    assert answer["error"] == "PeerError", answer
    assert answer["grown_mib"] < 64


def test_200_mib_of_metadata_in_the_stream_take_no_memory(liar: Liar) -> None:
    liar.stream_schema = SCHEMA.with_metadata({b"arrowmoe.manifest": bytes(200 << 20)})
    answer = measured(liar.address, liar.card.digest)
    assert answer["error"] == "PeerError", answer
    assert answer["grown_mib"] < 64


def test_an_endless_inventory_takes_bounded_memory_and_time(liar: Liar) -> None:
    (page,) = wire.encode_inventory([entry_of(liar.card, examples=("x" * 50_000,))] * 20)
    liar.results[wire.ACTION_INVENTORY] = lambda: itertools.repeat(page)
    started = time.monotonic()
    answer = measured(liar.address, "inventory")
    assert answer["error"] == "PeerError", answer
    assert answer["grown_mib"] < 64
    assert time.monotonic() - started < 20


def test_a_health_answer_of_100_mib_takes_no_memory(liar: Liar) -> None:
    liar.results[wire.ACTION_HEALTH] = lambda: iter([os.urandom(100 << 20)])
    answer = measured(liar.address, "health")
    assert answer["error"] == "PeerError", answer
    assert answer["grown_mib"] < 64


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with LoRAFlightClient(f"127.0.0.1:{port}") as client, pytest.raises(PeerUnreachableError, match="not available"):
        client.health()


def test_somebody_listens_and_never_answers() -> None:
    started = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with LoRAFlightClient(address, timeout_s=0.5) as client, pytest.raises(PeerUnreachableError):
            client.health()
    assert time.monotonic() - started < 3


def test_a_proxy_of_the_environment_is_not_asked(liar: Liar, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "grpc_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    with LoRAFlightClient(liar.address) as client:
        assert client.health() == health()


def test_a_probe(liar: Liar) -> None:
    assert probe(liar.address) == health()
    with pytest.raises(PeerUnreachableError):
        probe("127.0.0.1:1")


def test_no_connection_is_made_before_the_first_call() -> None:
    with LoRAFlightClient("127.0.0.1:1"):
        pass
