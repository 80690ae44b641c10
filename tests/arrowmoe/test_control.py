from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from arrowmoe import control
from arrowmoe.control import ControlServer, NodeNotRunningError, Progress, RemoteError, call
from arrowmoe.home import HomeHeldError, NodeError, NodeRecord, home_lock, is_held, now, read_record, running_node
from registry.errors import UnknownCardError

pytestmark = pytest.mark.usefixtures("no_leaked_threads")


def echo(params: Mapping[str, Any], progress: Progress) -> Any:
    for step in range(params.get("steps", 0)):
        progress({"step": step})
    return dict(params)


def refuse(params: Mapping[str, Any], progress: Progress) -> Any:
    raise UnknownCardError("no card 'x'", hint="see `skills ls`")


def break_down(params: Mapping[str, Any], progress: Progress) -> Any:
    raise ZeroDivisionError("a bug")


@pytest.fixture
def server() -> Iterator[ControlServer]:
    with ControlServer({"echo": echo, "refuse": refuse, "break": break_down}) as running:
        yield running


def record_of(server: ControlServer, **changes: Any) -> NodeRecord:
    fields = {
        "pid": os.getpid(),
        "port": server.port,
        "token": server.token,
        "address": "127.0.0.1:1",
        "node_id": "0" * 32,
        "name": "test",
        "started": now(),
    }
    return NodeRecord(**fields | changes)


def raw(server: ControlServer, line: bytes) -> dict[str, Any]:
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        connection.sendall(line)
        answer: dict[str, Any] = json.loads(connection.makefile("rb").readline())
        return answer


def test_a_result_comes_after_the_progress(server: ControlServer) -> None:
    seen: list[Mapping[str, Any]] = []
    assert call(record_of(server), "echo", {"steps": 2, "text": "ä\n"}, on_progress=seen.append) == {
        "steps": 2,
        "text": "ä\n",
    }
    assert seen == [{"step": 0}, {"step": 1}]


def test_an_error_keeps_its_type_message_and_hint(server: ControlServer) -> None:
    with pytest.raises(RemoteError, match="no card 'x'") as caught:
        call(record_of(server), "refuse")
    assert (caught.value.kind, caught.value.hint) == ("UnknownCardError", "see `skills ls`")


def test_a_bug_is_told_and_the_server_lives_on(server: ControlServer) -> None:
    with pytest.raises(RemoteError, match="is a bug: ZeroDivisionError: a bug"):
        call(record_of(server), "break")
    assert call(record_of(server), "echo") == {}


@pytest.mark.parametrize("token", ["", "0" * 64, "ä"])
def test_a_wrong_token_is_refused(server: ControlServer, token: str) -> None:
    with pytest.raises(RemoteError, match="token is not this node's"):
        call(record_of(server, token=token), "echo")


@pytest.mark.parametrize("line", [b"\n", b"[]\n", b"{}\n", b"nonsense\n", b'"x"\n', b"\xff\n", b'{"token": 1}\n'])
def test_a_line_that_is_no_request_is_refused(server: ControlServer, line: bytes) -> None:
    assert raw(server, line)["error"]["type"] == "NodeError"


def test_an_unknown_method_and_unnamed_params_are_refused(server: ControlServer) -> None:
    with pytest.raises(RemoteError, match="method out of echo, refuse, break"):
        call(record_of(server), "shutdown")
    request = json.dumps({"token": server.token, "method": "echo", "params": [1]}).encode() + b"\n"
    assert "named params" in raw(server, request)["error"]["message"]


def test_a_request_over_the_limit_is_refused(server: ControlServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "MAX_REQUEST_BYTES", 1000)
    with pytest.raises(RemoteError, match="at most 1000 bytes"):
        call(record_of(server), "echo", {"text": "x" * 1000})


def test_more_requests_than_threads_are_told_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "MAX_THREADS", 1)
    entered, go = threading.Event(), threading.Event()

    def wait(params: Mapping[str, Any], progress: Progress) -> Any:
        entered.set()
        return go.wait(10)

    with ControlServer({"wait": wait}) as server:
        first = threading.Thread(target=call, args=(record_of(server), "wait"))
        first.start()
        assert entered.wait(10)
        with pytest.raises(RemoteError, match="answers 1 requests already"):
            call(record_of(server), "wait")
        go.set()
        first.join(10)


def test_what_was_asked_for_is_finished_though_the_asker_is_gone() -> None:
    gone, done = threading.Event(), threading.Event()

    def work(params: Mapping[str, Any], progress: Progress) -> Any:
        assert gone.wait(10)
        for step in range(50):
            progress({"step": step, "padding": "x" * 100_000})
        done.set()

    with ControlServer({"work": work}) as server:
        request = {"token": server.token, "method": "work", "params": {}}
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
            connection.sendall(json.dumps(request).encode() + b"\n")
        gone.set()
        assert done.wait(10)


def test_closing_cuts_an_answer_that_takes_too_long() -> None:
    entered, go = threading.Event(), threading.Event()

    def wait(params: Mapping[str, Any], progress: Progress) -> Any:
        entered.set()
        return go.wait(10)

    server = ControlServer({"wait": wait})
    server.start()
    errors: list[Exception] = []

    def ask() -> None:
        try:
            call(record_of(server), "wait")
        except NodeError as error:
            errors.append(error)

    asker = threading.Thread(target=ask)
    asker.start()
    assert entered.wait(10)
    server.close(timeout_s=0.1)
    asker.join(10)
    go.set()
    for thread in threading.enumerate():
        if thread.name.startswith("arrowmoe-control"):
            thread.join(10)
    assert isinstance(errors[0], NodeNotRunningError)


def test_a_node_that_does_not_answer_in_time_is_an_error() -> None:
    go = threading.Event()
    with ControlServer({"wait": lambda params, progress: go.wait(10)}) as server:
        with pytest.raises(NodeError, match=r"did not answer 'wait' within 0\.1 s"):
            call(record_of(server), "wait", timeout_s=0.1)
        go.set()


def test_a_port_where_nobody_listens_is_an_error(server: ControlServer) -> None:
    server.close()
    with pytest.raises(NodeNotRunningError, match="cannot be reached"):
        call(record_of(server), "echo")


def test_only_the_owner_reads_the_record(server: ControlServer, tmp_path: Path) -> None:
    record = record_of(server)
    record.write(tmp_path)
    assert read_record(tmp_path) == record
    assert stat.S_IMODE((tmp_path / "node.json").stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["node.json"]


@pytest.mark.parametrize("text", ["", "[1]", '{"pid": 1}', "null"])
def test_a_record_that_is_none_is_no_record(tmp_path: Path, text: str) -> None:
    (tmp_path / "node.json").write_text(text)
    assert read_record(tmp_path) is None


def test_a_home_is_held_once_and_says_by_whom(server: ControlServer, tmp_path: Path) -> None:
    assert not is_held(tmp_path)
    with home_lock(tmp_path):
        record_of(server, address="127.0.0.1:4711").write(tmp_path)
        assert is_held(tmp_path)
        holder = rf"held by process {os.getpid()} since .*127\.0\.0\.1:4711"
        with pytest.raises(HomeHeldError, match=holder) as caught, home_lock(tmp_path):
            pass
        assert "node stop" in str(caught.value.hint)
        assert running_node(tmp_path) is not None
    assert not is_held(tmp_path)
    assert read_record(tmp_path) is None


def test_what_a_killed_holder_left_is_known_to_be_stale(server: ControlServer, tmp_path: Path) -> None:
    holder = "import sys, time\nfrom pathlib import Path\nfrom arrowmoe.home import home_lock\n"
    holder += "with home_lock(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", holder, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        record_of(server).write(tmp_path)
        assert running_node(tmp_path) is not None
        with pytest.raises(HomeHeldError, match=f"process {process.pid} "), home_lock(tmp_path):
            pass
        process.kill()
    assert read_record(tmp_path) is not None
    assert running_node(tmp_path) is None
    with home_lock(tmp_path):
        assert running_node(tmp_path) is None
