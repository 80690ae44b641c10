from __future__ import annotations

import itertools
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import flight

from federation import limits, wire
from federation.client import LoRAFlightClient, probe
from federation.errors import FederationError, PeerError, PeerUnreachableError, TransportError
from registry.digest import digest_of
from registry.identity import Identity
from registry.manifest import base_fingerprint
from tests.federation.liar import Liar, changes_of, entry_of, header, health, tensor_bytes
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
    liar.header = lambda: header(other)
    with pytest.raises(PeerError, match="expected the manifest of card"):
        fetch(liar)


def test_the_right_manifest_over_other_tensors(liar: Liar) -> None:
    liar.tensor_bytes = lambda: tensor_bytes(small_card("honest", modules=3, seed=1))
    with pytest.raises(PeerError, match=r"damaged or forged.*expected blake3"):
        fetch(liar)


def test_a_wrong_tensor_stops_the_transfer_at_once(liar: Liar) -> None:
    card = liar.card = small_card("large", modules=module_shapes(64, d_in=1 << 16, d_out=4))
    sent = 0

    def wrong_at_first() -> Iterator[bytes]:
        nonlocal sent
        for index, data in enumerate(tensor_bytes(card)):
            sent += len(data)
            yield bytes(len(data)) if index == 0 else data

    liar.tensor_bytes = wrong_at_first
    with pytest.raises(PeerError, match="expected blake3"):
        fetch(liar)
    assert sent < card.nbytes  # what gRPC had buffered; the rest was cancelled


def test_nan_that_the_manifest_promises(liar: Liar) -> None:
    card = small_card("honest")
    data = np.full(card.tensors[0].shape, np.nan, dtype=np.float32).tobytes()
    fields = json.loads(card.manifest_bytes)
    fields["tensors"][0]["digest"] = digest_of(data)
    manifest = json.dumps(fields).encode()
    liar.header = lambda: iter([manifest])
    liar.tensor_bytes = lambda: iter([data, *list(tensor_bytes(card))[1:]])
    with LoRAFlightClient(liar.address) as client, pytest.raises(PeerError, match="NaN"):
        client.fetch_skill(digest_of(manifest))


def test_a_signature_of_somebody_else(liar: Liar) -> None:
    card = liar.card = small_card("signed").signed(Identity.generate())
    forged = Identity.generate().sign(card.manifest_bytes)
    liar.header = lambda: iter([card.manifest_bytes, str(forged).encode()])
    with pytest.raises(PeerError, match="publisher"):
        fetch(liar)


def test_fewer_bytes_than_promised(liar: Liar) -> None:
    liar.tensor_bytes = lambda: itertools.islice(tensor_bytes(liar.card), 2)
    with pytest.raises(PeerError, match="not whole"):
        fetch(liar)


def test_nothing_at_all(liar: Liar) -> None:
    liar.tensor_bytes = lambda: iter([])
    with pytest.raises(PeerError, match="not whole"):
        fetch(liar)


def test_more_than_promised_is_stopped_early(liar: Liar) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        yield from tensor_bytes(liar.card)
        for _ in range(100_000):
            sent += 1
            yield bytes(10_000)

    liar.tensor_bytes = endless
    with pytest.raises(PeerError, match="got more, so the transfer was stopped"):
        fetch(liar)
    assert sent < 50_000  # what gRPC had buffered; the rest was cancelled


def test_messages_may_be_cut_anywhere(liar: Liar) -> None:
    whole = b"".join(tensor_bytes(liar.card))
    liar.tensor_bytes = lambda: (whole[at : at + 7] for at in range(0, len(whole), 7))
    assert fetch(liar) == liar.card


def test_no_more_arrives_ahead_of_a_slow_reader_than_the_limit_says(liar: Liar) -> None:
    card = liar.card = small_card("large", modules=module_shapes(64, d_in=1 << 16, d_out=4))
    sent, sent_while_waiting = 0, []

    def counted() -> Iterator[bytes]:
        nonlocal sent
        for data in tensor_bytes(card):
            sent += len(data)
            yield data

    def slow(_: int) -> None:
        if not sent_while_waiting:
            time.sleep(1)
            sent_while_waiting.append(sent)

    liar.tensor_bytes = counted
    with LoRAFlightClient(liar.address) as client:
        assert client.fetch_skill(card.digest, slow) == card
    assert sent_while_waiting[0] < limits.READ_AHEAD_BYTES + (24 << 20)  # and what the sockets and the server hold
    assert sent > 2 * sent_while_waiting[0]


def test_empty_messages_without_end(liar: Liar) -> None:
    liar.tensor_bytes = lambda: itertools.repeat(b"")
    with pytest.raises(PeerError, match="not whole"):
        fetch(liar)


@pytest.mark.parametrize("parts", [[], [b""], [b"\xff\x00"], [b"{}"] * 3])
def test_no_manifest(liar: Liar, parts: list[bytes]) -> None:
    liar.header = lambda: iter(parts)
    with pytest.raises(PeerError, match="manifest"):
        fetch(liar)


@pytest.mark.parametrize("signature", [b"", b"\xff", b"ed25519:00:00", b"x" * 1000])
def test_a_signature_that_is_none(liar: Liar, signature: bytes) -> None:
    liar.header = lambda: iter([liar.card.manifest_bytes, signature])
    with pytest.raises(PeerError, match="expected a signature"):
        fetch(liar)


def test_a_card_that_promises_too_much_is_refused_before_its_data(liar: Liar, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_CARD_BYTES", liar.card.nbytes - 1)
    asked: list[int] = []
    liar.tensor_bytes = lambda: iter(asked.append(1) or [])
    with pytest.raises(PeerError, match="so it is not fetched"):
        fetch(liar)
    assert not asked


def test_a_message_over_the_limit_is_refused(liar: Liar) -> None:
    liar.card = small_card("large", modules=module_shapes(1, d_in=1 << 20, d_out=4), rank=5)
    assert max(tensor.nbytes for tensor in liar.card.tensors) > limits.MAX_MESSAGE_BYTES
    with pytest.raises(PeerError, match="size limit"):
        fetch(liar)


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
    def failing() -> Iterator[bytes]:
        yield from itertools.islice(tensor_bytes(liar.card), 2)
        raise raised

    liar.tensor_bytes = failing
    with pytest.raises(expected):
        fetch(liar)


def measured(address: str, what: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.federation.measure", address, what]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    answer: dict[str, Any] = json.loads(said.stdout)
    return answer


@pytest.mark.parametrize("what", ["health", "inventory", "card"])
def test_a_message_of_256_mib_is_cut_off_after_a_few(liar: Liar, what: str) -> None:
    huge = bytes(256 << 20)
    liar.results |= dict.fromkeys(liar.results, lambda: iter([huge]))
    answer = measured(liar.address, liar.card.digest if what == "card" else what)
    assert answer["error"] == "PeerError", answer
    assert "more than was asked for" in answer["message"], answer
    assert answer["grown_mib"] < 32  # gRPC alone would receive it whole before it looks at its own limit


def test_a_server_that_never_stops_sending_costs_a_little(liar: Liar) -> None:
    answers = itertools.repeat(bytes(1 << 20))
    liar.results[wire.ACTION_HEALTH] = lambda: answers
    liar.results[wire.ACTION_TENSORS] = lambda: answers
    for what in ("health", liar.card.digest):
        answer = measured(liar.address, what)
        assert answer["error"] == "PeerError", answer
        assert answer["grown_mib"] < 32, answer


def test_a_promise_of_3_gib_takes_no_memory_until_it_is_kept(liar: Liar) -> None:
    fields = json.loads(liar.card.manifest_bytes)
    module = liar.card.manifest.adapter.target_modules[0]
    for spec in fields["tensors"]:
        if (spec["name"], spec["role"]) == (module, "A"):
            d_in = (3 << 30) // 16
            spec |= {"shape": [spec["shape"][0], d_in], "nbytes": spec["shape"][0] * d_in * 4}
    shapes = {spec["name"]: (spec["shape"][1], 6) for spec in fields["tensors"] if spec["role"] == "A"}
    fields["base"]["fingerprint"] = base_fingerprint(shapes)
    manifest = json.dumps(fields).encode()
    liar.header = lambda: iter([manifest])
    liar.tensor_bytes = lambda: iter([bytes(1000)])
    answer = measured(liar.address, digest_of(manifest))
    assert (answer["error"], "not whole" in answer["message"]) == ("PeerError", True), answer
    assert answer["grown_mib"] < 64


def test_a_page_that_is_wrong_everywhere_takes_bounded_memory(liar: Liar) -> None:
    wrong = json.loads(changes_of([entry_of(liar.card)]))
    wrong["added"][0]["domains"] = [1] * 500_000
    liar.results[wire.ACTION_CHANGES] = lambda: iter([json.dumps(wrong, separators=(",", ":")).encode()])
    answer = measured(liar.address, "inventory")
    assert answer["error"] == "PeerError", answer
    assert answer["grown_mib"] < 64


def test_a_compressed_record_batch_is_never_inflated(liar: Liar) -> None:
    bomb = pa.record_batch([pa.array([bytes(1 << 30)], pa.large_binary())], names=["data"])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, bomb.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_batch(bomb)
    message = sink.getvalue().to_pybytes()
    del bomb
    assert len(message) < 1 << 20
    liar.results |= dict.fromkeys(liar.results, lambda: iter([message]))
    for what in (liar.card.digest, "health", "inventory"):
        answer = measured(liar.address, what)
        assert answer["error"] == "PeerError", answer
        assert answer["grown_mib"] < 64, answer


def test_an_endless_inventory_takes_bounded_memory_and_time(liar: Liar) -> None:
    card, numbers = liar.card, itertools.count()

    def endless() -> Iterator[bytes]:
        since = json.loads(liar.asked[-1])["since"]
        entries = [entry_of(card, digest=digest_of(b"%d" % next(numbers)), examples=("x" * 50_000,)) for _ in range(20)]
        return itertools.repeat(changes_of(entries, since=since, last=1 << 40))

    liar.results[wire.ACTION_CHANGES] = endless
    started = time.monotonic()
    answer = measured(liar.address, "inventory")
    assert answer["error"] == "PeerError", answer
    assert answer["grown_mib"] < 64 + 64
    assert time.monotonic() - started < 20


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


@pytest.mark.parametrize("identity", [None, Identity.generate()])
def test_a_small_card_comes_with_its_manifest(liar: Liar, identity: Identity | None) -> None:
    card = liar.card = small_card("small") if identity is None else small_card("small").signed(identity)
    signature = b"" if card.signature is None else str(card.signature).encode()
    liar.header = lambda: iter([card.manifest_bytes, signature, *tensor_bytes(card)])
    with LoRAFlightClient(liar.address) as client:
        assert client.describe(card.digest) == card
    assert len(liar.asked) == 1


def test_tensors_that_come_with_a_manifest_are_verified(liar: Liar) -> None:
    card = liar.card
    wrong = bytes(card.nbytes)
    for parts in ([wrong], [wrong[:-1]], [*tensor_bytes(card), b"x"], [b""]):
        liar.header = lambda parts=parts: iter([*header(card), *([b""] if card.signature is None else []), *parts])
        with LoRAFlightClient(liar.address) as client, pytest.raises(PeerError):
            client.describe(card.digest)


def test_tensors_of_a_large_card_do_not_come_with_its_manifest(liar: Liar) -> None:
    card = liar.card = small_card("large", modules=module_shapes(1, 1 << 14, 1 << 14))
    liar.header = lambda: iter([card.manifest_bytes, b"", *tensor_bytes(card)])
    with LoRAFlightClient(liar.address) as client, pytest.raises(PeerError, match="got more"):
        client.describe(card.digest)
