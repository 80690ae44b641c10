from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pytest

from federation import limits
from federation.allowances import CLIENT_RULES, Budget, Rules
from federation.turnstile import Turnstile, place_of
from tests.federation.behind import Behind, echo

FREE = Rules(caller_bytes=None)


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@contextmanager
def connected(turnstile: Turnstile, source: str = "127.0.0.1") -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", turnstile.port), timeout=5, source_address=(source, 0)) as connection:
        yield connection


@contextmanager
def relaying(
    target: tuple[str, int],
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    rules: Rules | None = None,
    budget: Budget | None = None,
    now: Callable[[], float] = time.monotonic,
) -> Iterator[Turnstile]:
    turnstile = Turnstile(host=host, port=port, rules=rules, budget=budget, now=now)
    turnstile.start(target)
    try:
        yield turnstile
    finally:
        turnstile.close()


def exactly(connection: socket.socket, count: int) -> bytes:
    """The next `count` bytes, or as many as came before the connection ended or was reset."""
    parts = bytearray()
    with contextlib.suppress(ConnectionError):
        while len(parts) < count and (part := connection.recv(min(count - len(parts), 1 << 20))):
            parts += part
    return bytes(parts)


def ended(connection: socket.socket) -> bool:
    """Whether the connection ends, by its end or a reset, within its timeout; what still comes is thrown away."""
    try:
        while connection.recv(1 << 20):
            pass
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return True


def refused(turnstile: Turnstile, source: str = "127.0.0.1") -> bool:
    """Whether a connection ends at once; the reset may even come before it is made."""
    try:
        with connected(turnstile, source) as connection:
            return ended(connection)
    except ConnectionError:
        return True


def soon(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 5
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    return holds()


def place(turnstile: Turnstile) -> int:
    """The place of the only connection."""
    assert soon(lambda: [c.connecting for c in turnstile._connections.values()] == [False])
    (found,) = turnstile._connections
    return found


def test_bytes_pass_unchanged_both_ways_on_many_connections_at_once() -> None:
    wrong: list[int] = []

    def work(turnstile: Turnstile, index: int) -> None:
        data = os.urandom(3 << 20)
        with connected(turnstile) as connection:
            sender = threading.Thread(target=connection.sendall, args=(data,))
            sender.start()
            if exactly(connection, len(data)) != data:
                wrong.append(index)
            sender.join(10)

    with Behind() as behind, relaying(behind.target, rules=FREE) as turnstile:
        threads = [threading.Thread(target=work, args=(turnstile, index)) for index in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert wrong == []


def test_the_end_of_one_direction_passes_and_the_other_goes_on() -> None:
    def after_the_end(connection: socket.socket) -> None:
        asked = exactly(connection, 1 << 30)
        connection.sendall(asked * 2)

    with Behind(after_the_end) as behind, relaying(behind.target) as turnstile, connected(turnstile) as connection:
        connection.sendall(b"over and out")
        connection.shutdown(socket.SHUT_WR)
        assert exactly(connection, 1000) == b"over and out" * 2
        assert soon(lambda: turnstile.open == 0)


def test_a_stranger_sends_its_allowance_and_not_a_byte_more_arrives() -> None:
    with Behind.counting() as behind, relaying(behind.target) as turnstile, connected(turnstile) as connection:
        connection.sendall(bytes(limits.STRANGER_BYTES))
        assert soon(lambda: behind.received == limits.STRANGER_BYTES)
        connection.sendall(bytes(1))
        assert ended(connection)
        assert behind.received == limits.STRANGER_BYTES


def test_a_huge_message_of_a_stranger_does_not_arrive() -> None:
    with Behind.counting() as behind, relaying(behind.target) as turnstile, connected(turnstile) as connection:
        with pytest.raises(ConnectionError):
            connection.sendall(bytes(64 << 20))
        assert soon(lambda: turnstile.open == 0)
        assert behind.received <= limits.STRANGER_BYTES


def test_who_has_proven_itself_may_send_its_allowance_and_a_share_of_what_it_was_sent() -> None:
    rules = Rules(stranger_bytes=10, caller_bytes=1000, caller_share=1 / 4)

    def answer(connection: socket.socket) -> None:
        connection.recv(1)
        connection.sendall(bytes(8000))
        behind._count(connection)

    with Behind(answer) as behind, relaying(behind.target, rules=rules) as turnstile:
        with connected(turnstile) as connection:
            turnstile.admit(place(turnstile))
            connection.sendall(b"?")
            assert len(exactly(connection, 8000)) == 8000
            connection.sendall(bytes(2999))
            assert soon(lambda: behind.received == 2999)
            connection.sendall(bytes(1))
            assert ended(connection)
        assert behind.received == 2999


def test_a_stranger_that_does_not_prove_itself_in_time_is_cut_and_others_are_not(clock: Clock) -> None:
    with Behind() as behind, relaying(behind.target, now=clock) as turnstile, connected(turnstile) as known:
        turnstile.admit(place(turnstile))
        with connected(turnstile) as stranger:
            stranger.sendall(b"a")
            assert exactly(stranger, 1) == b"a"
            clock.now += limits.STRANGER_S + 1
            assert ended(stranger)
        known.sendall(b"still here")
        assert exactly(known, 10) == b"still here"


def test_one_that_trickles_is_a_stranger_all_the_same(clock: Clock) -> None:
    with Behind() as behind, relaying(behind.target, now=clock) as turnstile, connected(turnstile) as slow:
        for _ in range(int(limits.STRANGER_S) - 1):
            slow.sendall(b".")
            assert exactly(slow, 1) == b"."
            clock.now += 1
        clock.now += 2
        assert ended(slow)


def test_one_address_gets_so_many_connections_and_another_is_still_served() -> None:
    rules = Rules(connections_per_address=3, strangers=100)
    with Behind() as behind, relaying(behind.target, rules=rules) as turnstile, ExitStack() as stack:
        crowd = [stack.enter_context(connected(turnstile, "127.0.0.2")) for _ in range(3)]
        assert soon(lambda: turnstile.open == 3)
        assert refused(turnstile, "127.0.0.2")
        for connection in [*crowd, stack.enter_context(connected(turnstile, "127.0.0.3"))]:
            connection.sendall(b"hello")
            assert exactly(connection, 5) == b"hello"


def test_over_the_limit_in_all_the_one_that_is_quiet_longest_makes_room() -> None:
    rules = Rules(connections=4, connections_per_address=3, strangers=100)
    with Behind() as behind, relaying(behind.target, rules=rules) as turnstile, ExitStack() as stack:
        first, quiet, *others = (stack.enter_context(connected(turnstile, f"127.0.0.{2 + n}")) for n in range(4))
        for connection in (quiet, *others, first):
            connection.sendall(b"hello")
            assert exactly(connection, 5) == b"hello"
        newcomer = stack.enter_context(connected(turnstile, "127.0.0.9"))
        assert ended(quiet)
        for connection in (first, *others, newcomer):
            connection.sendall(b"hello")
            assert exactly(connection, 5) == b"hello"


def test_a_new_stranger_pushes_the_oldest_out_and_nobody_who_is_known() -> None:
    rules = Rules(strangers=2)
    with Behind() as behind, relaying(behind.target, rules=rules) as turnstile, ExitStack() as stack:
        known = stack.enter_context(connected(turnstile))
        turnstile.admit(place(turnstile))
        oldest, second, third = (stack.enter_context(connected(turnstile)) for _ in range(3))
        assert ended(oldest)
        for connection in (known, second, third):
            connection.sendall(b"hello")
            assert exactly(connection, 5) == b"hello"


def test_a_reader_that_stalls_makes_its_sender_wait_and_is_cut_after_a_while(clock: Clock) -> None:
    sent = 0

    def endless(connection: socket.socket) -> None:
        nonlocal sent
        while True:
            sent += connection.send(bytes(1 << 16))

    with Behind(endless) as behind, relaying(behind.target, now=clock) as turnstile, connected(turnstile) as stalled:
        turnstile.admit(place(turnstile))
        before = -1
        while sent != before:
            before = sent
            time.sleep(0.3)
        assert sent < 32 << 20  # what the sockets hold, and one buffer
        clock.now += limits.STUCK_S + 1
        assert soon(lambda: turnstile.open == 0)
        assert ended(stalled)


def test_a_reader_that_is_slow_is_not_cut(clock: Clock) -> None:
    data = os.urandom(24 << 20)
    with (
        Behind(lambda connection: connection.sendall(data)) as behind,
        relaying(behind.target, now=clock) as turnstile,
        connected(turnstile) as slow,
    ):
        turnstile.admit(place(turnstile))
        received = bytearray()
        while len(received) < len(data):
            received += exactly(slow, min(8 << 20, len(data) - len(received)))
            time.sleep(0.05)
            clock.now += limits.STUCK_S / 2
        assert received == data


def test_a_connection_on_which_nothing_passes_is_cut(clock: Clock) -> None:
    with Behind() as behind, relaying(behind.target, now=clock) as turnstile, connected(turnstile) as idle:
        turnstile.admit(place(turnstile))
        clock.now += limits.IDLE_S - 1
        idle.sendall(b"!")
        assert exactly(idle, 1) == b"!"
        clock.now += limits.IDLE_S - 1
        idle.sendall(b"!")
        assert exactly(idle, 1) == b"!"
        clock.now += limits.IDLE_S + 1
        assert ended(idle)


def test_an_old_connection_is_closed_only_when_it_is_quiet(clock: Clock) -> None:
    rules = Rules(age_s=100.0)
    with (
        Behind() as behind,
        relaying(behind.target, rules=rules, now=clock) as turnstile,
        connected(turnstile) as connection,
    ):
        turnstile.admit(place(turnstile))
        clock.now += 99
        for _ in range(5):
            connection.sendall(b"busy")
            assert exactly(connection, 4) == b"busy"
            clock.now += 0.9
            time.sleep(0.3)
        assert turnstile.open == 1
        clock.now += 2
        assert ended(connection)


def test_callers_that_sent_too_much_together_lose_the_one_that_sent_the_most() -> None:
    rules = Rules(caller_bytes=1 << 20, callers_bytes=500_000, strangers=100)
    with Behind.counting() as behind, relaying(behind.target, rules=rules) as turnstile, ExitStack() as stack:
        sizes = (100_000, 300_000, 150_000)
        callers = []
        for count, _ in enumerate(sizes, 1):
            callers.append(stack.enter_context(connected(turnstile)))
            while turnstile.open < count:
                time.sleep(0.01)
            turnstile.admit(list(turnstile._connections)[-1])
        for caller, size in zip(callers, sizes, strict=True):
            caller.sendall(bytes(size))
        assert ended(callers[1])
        assert turnstile.open == 2


def test_what_a_handler_took_in_of_an_upload_counts_no_more() -> None:
    rules = Rules(caller_bytes=1000, caller_share=0, callers_bytes=5000, upload_window_bytes=2000)
    with Behind() as behind, relaying(behind.target, rules=rules) as turnstile, connected(turnstile) as connection:
        turnstile.admit(place(turnstile))
        connection.sendall(bytes(900))
        exactly(connection, 900)
        turnstile.took_in(place(turnstile), 0)
        for _ in range(10):
            connection.sendall(bytes(2000))
            exactly(connection, 2000)
            turnstile.took_in(place(turnstile), 2000)
        time.sleep(0.6)  # two rounds of enforcing what all may have sent together
        assert not ended(connection)
        connection.sendall(bytes(2000 + 100 + 20_000 // 64))
        exactly(connection, 2000 + 100 + 20_000 // 64)
        connection.sendall(b"x")
        assert ended(connection)


def test_an_answer_may_be_as_long_as_was_expected() -> None:
    budget = Budget()

    def answer(connection: socket.socket) -> None:
        while size := connection.recv(16):
            connection.sendall(bytes(int(size)))

    with (
        Behind(answer) as behind,
        relaying(behind.target, rules=CLIENT_RULES, budget=budget) as turnstile,
        connected(turnstile) as connection,
    ):
        for _ in range(5):
            with budget.expecting(4 << 20):
                connection.sendall(b"%16d" % (4 << 20))
                assert len(exactly(connection, 4 << 20)) == 4 << 20
        assert not budget.overrun
        with budget.expecting(4 << 20):
            connection.sendall(b"%16d" % (64 << 20))
            received = len(exactly(connection, 64 << 20))
        assert received <= (5 << 20) + 2 * limits.ANSWER_SLACK_BYTES
        assert budget.overrun


def test_a_server_that_sends_unasked_is_cut_after_the_slack() -> None:
    budget = Budget()
    with (
        Behind(lambda connection: connection.sendall(bytes(64 << 20))) as behind,
        relaying(behind.target, rules=CLIENT_RULES, budget=budget) as turnstile,
        connected(turnstile) as connection,
    ):
        assert len(exactly(connection, 64 << 20)) <= limits.ANSWER_SLACK_BYTES
        assert budget.overrun


def test_what_a_client_sends_is_not_bounded() -> None:
    with (
        Behind.counting() as behind,
        relaying(behind.target, rules=CLIENT_RULES, budget=Budget()) as turnstile,
        connected(turnstile) as connection,
    ):
        connection.sendall(bytes(8 << 20))
        assert soon(lambda: behind.received == 8 << 20)


def test_a_limit_to_the_bandwidth_holds_over_all_connections() -> None:
    with (
        Behind(lambda connection: connection.sendall(bytes(1_000_000))) as behind,
        relaying(behind.target, rules=Rules(bytes_per_s=4_000_000)) as turnstile,
        ExitStack() as stack,
    ):
        started = time.monotonic()
        for connection in [stack.enter_context(connected(turnstile)) for _ in range(2)]:
            assert len(exactly(connection, 1_000_000)) == 1_000_000
        assert 2 / 4 - limits.PACE_BURST_S - 0.05 < time.monotonic() - started < 3


def test_where_a_caller_really_is_and_that_it_can_be_cut() -> None:
    with Behind() as behind, relaying(behind.target) as turnstile, connected(turnstile, "127.0.0.5") as connection:
        where = place(turnstile)
        assert turnstile.address_of(where) == "127.0.0.5"
        assert turnstile.address_of(where + 1) is None
        turnstile.cut(where + 1, "nobody")
        turnstile.cut(where, "blocked")
        assert ended(connection)
        assert turnstile.address_of(where) is None


def test_the_place_of_a_call() -> None:
    assert place_of("ipv4:127.0.0.1:55888") == 55888
    assert place_of("unix:") == 0
    assert place_of("") == 0


def test_nobody_behind() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        target = listener.getsockname()
    with relaying(target) as turnstile:
        assert refused(turnstile)


def test_close_cuts_all_and_gives_the_port_back() -> None:
    with Behind() as behind, ExitStack() as stack:
        turnstile = Turnstile()
        turnstile.start(behind.target)
        callers = [stack.enter_context(connected(turnstile)) for _ in range(3)]
        assert soon(lambda: turnstile.open == 3)
        started = time.monotonic()
        turnstile.close()
        turnstile.close()
        assert time.monotonic() - started < 1
        assert all(map(ended, callers))
        with socket.create_server(("127.0.0.1", turnstile.port)):
            pass


def test_a_taken_port_is_an_error() -> None:
    with relaying(("127.0.0.1", 1)) as turnstile, pytest.raises(OSError, match="in use"):
        Turnstile(port=turnstile.port)


def test_ipv6_where_there_is_some() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    with (
        Behind(echo) as behind,
        relaying(behind.target, host="::1") as turnstile,
        socket.create_connection(("::1", turnstile.port), timeout=5) as connection,
    ):
        connection.sendall(b"six")
        assert exactly(connection, 3) == b"six"
