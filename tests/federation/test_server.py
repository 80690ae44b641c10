from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import flight

from federation import limits, wire
from federation.client import LoRAFlightClient
from federation.errors import FederationError, PeerError, TransportError
from federation.server import LoRAFlightServer
from registry.card import LoRACard
from registry.digest import digest_of
from registry.format import SCHEMA
from registry.store import Registry
from tests.federation.conftest import serving
from tests.registry.cards import module_shapes, small_card


@pytest.fixture
def raw(server: LoRAFlightServer) -> Any:
    """A plain Flight client that knows nothing of us."""
    with flight.connect(f"grpc://{server.address}") as client:
        yield client


def failure(call: Callable[[], Any]) -> str:
    with pytest.raises(flight.FlightError) as caught:
        call()
    assert "Traceback" not in str(caught.value)
    assert "site-packages" not in str(caught.value)
    return str(caught.value)


def test_a_plain_flight_client_in_another_process_than_the_server_reads_a_card_as_a_table(
    theirs: Registry, tmp_path: Path
) -> None:
    card = small_card("poet", modules=3, description="rhymes")
    entry = theirs.publish(card)
    with serving(tmp_path / "theirs") as other, flight.connect(("127.0.0.1", other.port)) as client:
        (info,) = client.list_flights()
        assert info.descriptor.path == [b"skills", b"poet", b"1", entry.digest.encode()]
        assert (info.total_records, info.total_bytes) == (6, card.nbytes)
        (endpoint,) = info.endpoints
        table = client.do_get(endpoint.ticket).read_all()
    assert table.schema.remove_metadata() == SCHEMA
    manifest = table.schema.metadata[b"arrowmoe.manifest"]
    assert digest_of(manifest) == entry.digest
    assert json.loads(manifest)["description"] == "rhymes"
    assert (
        dict(zip(table["name"].to_pylist(), table["data"].to_pylist(), strict=True)).keys() == module_shapes(3).keys()
    )
    assert table["data"].to_pylist() == [bytes(tensor.data) for tensor in card.tensors]
    assert info.schema.metadata == table.schema.metadata


def test_a_listing_by_name(theirs: Registry, raw: flight.FlightClient) -> None:
    for name in ("a", "b"):
        theirs.publish(small_card(name))
    assert [info.descriptor.path[1] for info in raw.list_flights()] == [b"a", b"b"]
    assert [info.descriptor.path[1] for info in raw.list_flights(b"b")] == [b"b"]


def test_a_card_is_found_by_name_label_and_digest(theirs: Registry, raw: flight.FlightClient) -> None:
    entry = theirs.publish(small_card("poet", version="2"))
    for path in (["poet"], ["poet@2"], ["poet", "2"], [entry.digest], ["poet", "2", entry.digest]):
        info = raw.get_flight_info(flight.FlightDescriptor.for_path("skills", *path))
        assert info.endpoints[0].ticket.ticket == entry.digest.encode()
        assert raw.get_schema(flight.FlightDescriptor.for_path("skills", *path)).schema == info.schema


def test_what_is_not_there_is_said_so(theirs: Registry, raw: flight.FlightClient) -> None:
    theirs.publish(small_card("poet"))
    absent = digest_of(b"absent")
    for path in (["skills", "nobody"], ["skills", absent], ["skills"], ["else", "poet"], []):
        failure(lambda path=path: raw.get_flight_info(flight.FlightDescriptor.for_path(*path)))
    for ticket in (b"poet", absent.encode(), b"", b"\xff\x00", b"../../identity.key"):
        failure(lambda ticket=ticket: raw.do_get(flight.Ticket(ticket)).read_all())
    assert "unknown" in failure(lambda: list(raw.do_action("shutdown")))


def test_uploads_are_refused(raw: flight.FlightClient) -> None:
    def put() -> None:
        writer, _ = raw.do_put(flight.FlightDescriptor.for_path("skills", "x"), SCHEMA)
        with writer:
            writer.done_writing()

    assert "no uploads" in failure(put)
    assert "does not exchange" in failure(
        lambda: raw.do_exchange(flight.FlightDescriptor.for_path("x"))[1].read_chunk()
    )


def test_the_actions_are_listed_and_speak_json(theirs: Registry, raw: flight.FlightClient) -> None:
    entry = theirs.publish(small_card("poet", examples=["a line"]))
    assert [action.type for action in raw.list_actions()] == ["health", "changes", "manifest", "tensors"]
    (said,) = raw.do_action("health")
    fields = json.loads(said.body.to_pybytes())
    assert fields == {
        "node_id": theirs.identity.id,
        "name": "theirs",
        "protocol": 2,
        "index_id": theirs.changes().index_id,
        "last": 1,
    }
    (page,) = raw.do_action(flight.Action("changes", b'{"index_id":null,"since":0}'))
    (listed,) = json.loads(page.body.to_pybytes())["added"]
    assert (listed["digest"], listed["examples"]) == (entry.digest, ["a line"])


def test_health_says_when_the_cards_change(theirs: Registry, server: LoRAFlightServer) -> None:
    with LoRAFlightClient(server.address) as client:
        empty = client.health()
        theirs.publish(small_card("poet"))
        assert (empty.last, client.health().last) == (0, 1)
        assert empty.index_id == client.health().index_id == theirs.changes().index_id


@pytest.mark.parametrize("offset", [0, 1, 4 << 20, (4 << 20) + 5, 1 << 40])
@pytest.mark.parametrize("nbytes", [None, 0, 1, 4 << 20, (4 << 20) + 7, 1 << 40])
def test_tensors_leave_as_one_run_of_bytes_from_any_offset(
    theirs: Registry, raw: flight.FlightClient, offset: int, nbytes: int | None
) -> None:
    card = small_card("large", modules=module_shapes(8, d_in=1 << 17, d_out=8))
    entry = theirs.publish(card)
    request = json.dumps({"digest": entry.digest, "offset": offset, "nbytes": nbytes}).encode()
    messages = [result.body.to_pybytes() for result in raw.do_action(flight.Action("tensors", request))]
    end = None if nbytes is None else offset + nbytes
    assert b"".join(messages) == b"".join(tensor.data for tensor in card.tensors)[offset:end]
    assert all(0 < len(message) <= limits.TENSOR_CHUNK_BYTES for message in messages)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b'{"digest": "../../etc/passwd"}',
        b'{"digest": 5}',
        b"x" * 5000,
        b'{"digest": "blake3:%s", "offset": -1}' % (b"0" * 64),
        b'{"digest": "blake3:%s", "nbytes": -1}' % (b"0" * 64),
        b'{"digest": "blake3:%s", "nbytes": "1"}' % (b"0" * 64),
    ],
)
@pytest.mark.parametrize("action", ["manifest", "tensors"])
def test_a_request_for_a_card_that_is_none(raw: flight.FlightClient, action: str, body: bytes) -> None:
    assert "a request for a card" in failure(lambda: list(raw.do_action(flight.Action(action, body))))


@pytest.mark.parametrize("action", ["manifest", "tensors"])
def test_a_request_for_a_card_that_is_not_there(raw: flight.FlightClient, action: str) -> None:
    body = json.dumps({"digest": "blake3:" + "0" * 64}).encode()
    assert "no card" in failure(lambda: list(raw.do_action(flight.Action(action, body))))


def test_a_manifest_comes_with_its_signature(theirs: Registry, raw: flight.FlightClient) -> None:
    card = theirs.get(theirs.publish(small_card("poet")).digest)
    body = json.dumps({"digest": card.digest}).encode()
    parts = [result.body.to_pybytes() for result in raw.do_action(flight.Action("manifest", body))]
    assert parts == [card.manifest_bytes, str(card.signature).encode()]


def test_a_small_cards_tensors_come_with_its_manifest_if_asked_for(theirs: Registry, raw: flight.FlightClient) -> None:
    small = theirs.get(theirs.publish(small_card("small")).digest)
    large = theirs.get(theirs.publish(small_card("large", modules=module_shapes(2, 1 << 14, 1 << 14))).digest)

    def parts(card: LoRACard, nbytes: int | None) -> list[bytes]:
        body = wire.encode_card_request(wire.CardRequest(digest=card.digest, nbytes=nbytes))
        return [result.body.to_pybytes() for result in raw.do_action(flight.Action("manifest", body))]

    for nbytes in (small.nbytes, 1 << 40):
        assert b"".join(parts(small, nbytes)[2:]) == b"".join(bytes(tensor.data) for tensor in small.tensors)
    for card, nbytes in ((small, None), (small, 0), (small, small.nbytes - 1), (large, 1 << 40)):
        assert len(parts(card, nbytes)) == 2


def test_batches_leave_as_they_lie_in_the_file(theirs: Registry, raw: flight.FlightClient) -> None:
    card = small_card("large", modules=module_shapes(8, d_in=1 << 17, d_out=8))
    entry = theirs.publish(card)
    sizes = [chunk.data.nbytes for chunk in raw.do_get(flight.Ticket(entry.digest))]
    with pa.memory_map(str(theirs.path_of(entry.digest))) as file:
        assert len(sizes) == pa.ipc.open_file(file).num_record_batches
    assert 1 << 20 < max(sizes) <= 4 << 20


def test_off_loopback_it_refuses_to_be_made(ours: Registry) -> None:
    for host in ("0.0.0.0", "192.168.1.4", "node.example"):
        with pytest.raises(FederationError, match="loopback") as caught:
            LoRAFlightServer(ours, node_id=ours.identity.id, name="n", host=host)
        assert "credentials" in (caught.value.hint or "")


def test_off_loopback_plaintext_is_refused_however_open(ours: Registry) -> None:
    with pytest.raises(FederationError, match="loopback"):
        LoRAFlightServer(ours, node_id=ours.identity.id, name="n", host="0.0.0.0", open=True)


def test_a_taken_port_is_an_error_not_a_shared_port(ours: Registry, server: LoRAFlightServer) -> None:
    second = LoRAFlightServer(ours, node_id=ours.identity.id, name="n", port=server.port)
    with pytest.raises(FederationError, match="cannot listen"):
        second.start()
    with socket.create_server(("127.0.0.1", 0)) as other:
        third = LoRAFlightServer(ours, node_id=ours.identity.id, name="n", port=other.getsockname()[1])
        with pytest.raises(FederationError, match="cannot listen"):
            third.start()


@pytest.mark.parametrize("name", ["", "x" * 65, "a\nb"])
def test_a_name_that_peers_would_refuse_is_refused_here(ours: Registry, name: str) -> None:
    with pytest.raises(FederationError, match="node name"):
        LoRAFlightServer(ours, node_id=ours.identity.id, name=name)


def publish_large(registry: Registry) -> bytes:
    card = small_card("large", modules=module_shapes(16, d_in=1 << 18, d_out=8))
    return registry.publish(card).digest.encode()


def stalled(server: LoRAFlightServer, ticket: bytes, stack: ExitStack) -> flight.FlightStreamReader:
    """A reader that takes the first batch of a card too large for any buffer on the way, and no more."""
    client = stack.enter_context(flight.connect(f"grpc://{server.address}", generic_options=LOCAL))
    reader = client.do_get(flight.Ticket(ticket))
    reader.read_chunk()
    return reader


# A connection of its own, and a window that does not grow until the client has buffered the whole card.
LOCAL = [("grpc.use_local_subchannel_pool", 1), ("grpc.http2.bdp_probe", 0)]


def test_close_ends_quickly_though_readers_stall(theirs: Registry, server: LoRAFlightServer) -> None:
    ticket = publish_large(theirs)
    with ExitStack() as stack:
        readers = [stalled(server, ticket, stack) for _ in range(3)]
        started = time.monotonic()
        server.close()
        assert time.monotonic() - started < 3
        for reader in readers:
            with pytest.raises(flight.FlightError):
                reader.read_all()
    with socket.create_server(("127.0.0.1", server.port)):  # the port is free again
        pass


def test_close_is_idempotent_and_a_client_that_idles_does_not_hold_it(server: LoRAFlightServer) -> None:
    with LoRAFlightClient(server.address, timeout_s=2) as client:
        client.health()
        started = time.monotonic()
        server.close()
        server.close()
        assert time.monotonic() - started < 1
        with pytest.raises(TransportError):
            client.health()


def test_too_many_streams_are_told_to_come_back(
    theirs: Registry, server: LoRAFlightServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticket = publish_large(theirs)
    with ExitStack() as stack:
        readers = [stalled(server, ticket, stack) for _ in range(limits.MAX_STREAMS)]
        with LoRAFlightClient(server.address) as client:
            assert client.health().last == 1  # health needs no place
            with pytest.raises(TransportError, match="streams are open"):
                client.fetch_skill(ticket.decode())  # type: ignore[arg-type]
            readers.pop().cancel()
            deadline = time.monotonic() + 5
            while not fetched(client, ticket) and time.monotonic() < deadline:
                time.sleep(0.05)
            assert fetched(client, ticket)


def fetched(client: LoRAFlightClient, ticket: bytes) -> bool:
    try:
        client.fetch_skill(ticket.decode())  # type: ignore[arg-type]
    except TransportError:
        return False
    return True


def test_places_are_given_back_by_calls_that_never_read(theirs: Registry, server: LoRAFlightServer) -> None:
    ticket = theirs.publish(small_card("poet")).digest.encode()
    for _ in range(3 * limits.MAX_STREAMS):
        with flight.connect(f"grpc://{server.address}", generic_options=LOCAL) as client:
            client.do_get(flight.Ticket(ticket)).cancel()
    deadline = time.monotonic() + 5
    with LoRAFlightClient(server.address) as client:
        while not fetched(client, ticket) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert fetched(client, ticket)


def test_a_damaged_file_is_served_by_nobody_as_whole(theirs: Registry, server: LoRAFlightServer) -> None:
    entry = theirs.publish(small_card("poet"))
    path = theirs.path_of(entry.digest)
    data = bytearray(path.read_bytes())
    data[data.find(small_card("poet").tensors[0].data[:16])] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)
    with LoRAFlightClient(server.address) as client, pytest.raises(PeerError, match="damaged"):
        client.fetch_skill(entry.digest)
    path.write_bytes(b"no arrow at all")
    with (
        LoRAFlightClient(server.address) as client,
        pytest.raises(PeerError, match="damaged or gone"),
    ):
        client.fetch_skill(entry.digest)


def test_a_rotten_offset_in_a_file_does_not_take_the_server_down(theirs: Registry, tmp_path: Path) -> None:
    entry = theirs.publish(small_card("poet"))
    path = theirs.path_of(entry.digest)
    good = struct.pack("<5q", 0, 128, 224, 352, 448)
    data = path.read_bytes()
    assert data.count(good) == 1
    path.chmod(0o600)
    path.write_bytes(data.replace(good, struct.pack("<5q", 0, 128, 224, 1 << 44, 1 << 45)))
    with serving(tmp_path / "theirs") as other, LoRAFlightClient(f"127.0.0.1:{other.port}") as client:
        with pytest.raises(PeerError, match="damaged or gone"):
            client.fetch_skill(entry.digest)
        raw = flight.connect(f"grpc://127.0.0.1:{other.port}")
        assert "damaged or gone" in failure(lambda: raw.do_get(flight.Ticket(entry.digest.encode())).read_all())
        raw.close()
        assert client.health().last == 1


def test_many_clients_at_once(theirs: Registry, server: LoRAFlightServer) -> None:
    entries = [theirs.publish(small_card(f"c{index}")) for index in range(6)]
    failures: list[BaseException] = []

    def work() -> None:
        try:
            with LoRAFlightClient(server.address) as client:
                for entry in entries:
                    assert client.fetch_skill(entry.digest).digest == entry.digest
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert failures == []
