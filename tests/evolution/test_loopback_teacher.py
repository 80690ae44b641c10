"""The loopback teacher speaks the protocol, to any client, and runs as a program."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from evolution.examples import write_examples
from evolution.loopback_teacher import Faults, LoopbackTeacher
from evolution.protocols import Example

GOLD = [Example(prompt=f"Who founded town {row}?", answer=f"founder {row}") for row in range(20)]


@pytest.fixture(autouse=True)
def _no_leaked_threads(no_leaked_threads: None) -> None:
    """Every test here starts a server."""


@pytest.fixture
def teacher() -> Iterator[LoopbackTeacher]:
    with LoopbackTeacher(GOLD, api_key="sesame") as running:
        yield running


def chat(url: str, text: str, **fields: object) -> dict[str, object]:
    body = json.dumps({"model": "any", "messages": [{"role": "user", "content": text}], **fields}).encode()
    request = Request(url + "/chat/completions", body, {"authorization": "Bearer sesame"})
    with urlopen(request, timeout=10) as response:
        return dict(json.load(response))


def test_a_plain_chat_is_answered_from_the_examples(teacher: LoopbackTeacher) -> None:
    reply = chat(teacher.url, "who founded  town 7")
    assert reply["choices"] == [
        {"index": 0, "message": {"role": "assistant", "content": "founder 7"}, "finish_reason": "stop"}
    ]
    read = -(-len(teacher.requests[0]) // 4)
    assert reply["usage"] == {"prompt_tokens": read, "completion_tokens": 3, "total_tokens": read + 3}
    assert "who founded  town 7" in teacher.requests[0]


def test_a_limit_cuts_the_answer(teacher: LoopbackTeacher) -> None:
    reply = chat(teacher.url, "Who founded town 7?", max_tokens=1)
    assert '"foun"' in json.dumps(reply)
    assert '"length"' in json.dumps(reply)


def test_models_are_listed(teacher: LoopbackTeacher) -> None:
    with urlopen(teacher.url + "/models", timeout=10) as response:
        assert [model["id"] for model in json.load(response)["data"]] == ["loopback"]


@pytest.mark.parametrize(
    ("path", "body", "key", "status"),
    [
        ("/chat/completions", b"{}", "wrong", 401),
        ("/chat/completions", b"no json", "sesame", 400),
        ("/chat/completions", b'{"messages": []}', "sesame", 400),
        ("/embeddings", b"{}", "sesame", 404),
    ],
)
def test_errors_have_the_protocols_form(
    teacher: LoopbackTeacher, path: str, body: bytes, key: str, status: int
) -> None:
    with pytest.raises(HTTPError) as caught:
        urlopen(Request(teacher.url + path, body, {"authorization": f"Bearer {key}"}), timeout=10)
    assert caught.value.code == status
    assert json.load(caught.value)["error"].keys() == {"message", "type", "param", "code"}


def test_the_share_of_wrong_answers_is_drawn_anew_for_each_asking() -> None:
    with LoopbackTeacher(GOLD, faults=Faults(wrong=0.3, seed=1)) as teacher:
        said = [is_right(teacher, example) for _ in range(50) for example in GOLD]
    assert 0.65 < sum(said) / len(said) < 0.75
    assert len({tuple(said[at : at + 20]) for at in range(0, len(said), 20)}) > 10


def is_right(teacher: LoopbackTeacher, example: Example) -> bool:
    response = teacher.chat(json.dumps({"messages": [{"role": "user", "content": example.prompt}]}), None)
    return bool(json.loads(response.body)["choices"][0]["message"]["content"] == example.answer)


def test_as_a_program_it_says_where_it_is_and_logs_what_it_is_sent(tmp_path: Path) -> None:
    write_examples(tmp_path / "gold.jsonl", GOLD)
    command = [sys.executable, "-m", "evolution.loopback_teacher", tmp_path / "gold.jsonl", "--log", tmp_path / "log"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            url = json.loads(process.stdout.readline())["url"]
            assert '"founder 3"' in json.dumps(chat(url, "Who founded town 3?"))
        finally:
            process.terminate()
    [line] = (tmp_path / "log").read_text().splitlines()
    assert json.loads(json.loads(line))["messages"][0]["content"] == "Who founded town 3?"
