"""A teacher to try things with: an OpenAI-compatible server on loopback that knows a file of examples and no more.

It answers what a `CloudDistiller` asks, and any other chat from the same examples, and it can misbehave on purpose:
wrong answers, 429 with retry-after, stalls, status 500, replies that are no JSON. It logs every body it is sent.

python -m evolution.loopback_teacher GOLD.jsonl --wrong 0.1 --rate-limit 0.05: prints {"url": …}, serves until killed
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from evolution.examples import normalised, read_examples
from evolution.protocols import Example, Theme
from evolution.teacher_messages import Answer, Answers, Examples, Name, Request, Written
from evolution.teachers import DatasetTeacher

MAX_BODY_BYTES: Final = 16 << 20
BYTES_PER_TOKEN: Final = 4
MODEL: Final = "loopback"
_INSTEAD: Final = {"max_tokens": " Use 'max_completion_tokens' instead."}


@dataclass(frozen=True, kw_only=True)
class Faults:
    """Shares of answers that are `wrong`, and of requests that go amiss in the other ways; all drawn from `seed`."""

    wrong: float = 0.0
    rate_limit: float = 0.0
    stall: float = 0.0
    error: float = 0.0
    malformed: float = 0.0
    retry_after_s: float = 1.0
    stall_s: float = 30.0
    refuses: tuple[str, ...] = ()
    """Fields of a request that are answered by status 400, as `response_format` is by older servers."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class _Response:
    status: int
    body: str
    headers: dict[str, str] = field(default_factory=dict)


class LoopbackTeacher:
    """Serves from its making until it is closed; `requests` are the bodies it was sent, in their order."""

    def __init__(
        self,
        examples: Iterable[Example],
        *,
        faults: Faults | None = None,
        api_key: str | None = None,
        port: int = 0,
        log: Path | None = None,
    ) -> None:
        self.requests: list[str] = []
        gold = list(examples)
        self._dataset = DatasetTeacher(gold)
        self._answers = sorted({example.answer for example in gold})
        self._faults, self._api_key, self._log = faults or Faults(), api_key, log
        self._asked: Counter[str] = Counter()
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", port), partial(_Handler, self))
        self._server.daemon_threads = False  # so that closing waits for those under way
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="loopback-teacher")
        self._thread.start()

    @property
    def url(self) -> str:
        """The base URL for clients."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> LoopbackTeacher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop serving; stalled requests end."""
        self._closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def models(self) -> _Response:
        """What `/v1/models` says."""
        return _json(200, {"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "you"}]})

    def chat(self, body: str, authorization: str | None) -> _Response:
        """What `/v1/chat/completions` says."""
        number = self._noted(body)
        if self._api_key is not None and authorization != f"Bearer {self._api_key}":
            return _error(401, "Incorrect API key provided.", "invalid_request_error", "invalid_api_key")
        return self._amiss(number) or self._completion(body, number)

    def _noted(self, body: str) -> int:
        with self._lock:
            self.requests.append(body)
            if self._log is not None:
                with self._log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(body, ensure_ascii=False) + "\n")
            return len(self.requests)

    def _amiss(self, number: int) -> _Response | None:
        faults, draw = self._faults, random.Random(f"{self._faults.seed}:{number}").random()
        for kind in ("rate_limit", "stall", "error", "malformed"):
            draw -= getattr(faults, kind)
            if draw < 0:
                return self._fault(kind)
        return None

    def _fault(self, kind: str) -> _Response | None:
        match kind:
            case "rate_limit":
                headers = {"retry-after": f"{self._faults.retry_after_s:g}"}
                return _error(429, "Rate limit reached.", "requests", "rate_limit_exceeded", headers)
            case "error":
                return _error(500, "The server had an error.", "server_error", None)
            case "malformed":
                return _Response(status=200, body='{"choices": [{"message": {"content": "half a')
            case _:
                self._closing.wait(self._faults.stall_s)
                return None

    def _completion(self, body: str, number: int) -> _Response:
        try:
            chat = json.loads(body)
            text = str(chat["messages"][-1]["content"])
        except (ValueError, TypeError, KeyError, IndexError):
            return _error(400, "The body is no chat.", "invalid_request_error", None)
        for name in set(self._faults.refuses) & set(chat):
            message = f"Unsupported parameter: '{name}'.{_INSTEAD.get(name, '')}"
            return _error(400, message, "invalid_request_error", "unsupported_parameter")
        limit = chat.get("max_tokens") or chat.get("max_completion_tokens") or MAX_BODY_BYTES
        return _json(200, _spoken(self._reply(text), number, int(limit), len(body.encode())))

    def _reply(self, text: str) -> str:
        try:
            request = Request.model_validate_json(text)
        except ValidationError:
            return self._answer(text) or "I do not know."
        match request.task:
            case "answer":
                entries = [Answer(id=each.id, answer=self._answer(each.text)) for each in request.prompts]
                return Answers(answers=tuple(entries)).model_dump_json()
            case "write":
                return Examples(examples=tuple(self._written(request))).model_dump_json()
            case "name":
                terms = request.theme.terms
                return Name(name="-".join(terms[:3]) or "unnamed", description=", ".join(terms)).model_dump_json()

    def _written(self, request: Request) -> list[Written]:
        theme = Theme(**request.theme.model_dump())
        drawn = self._dataset.write(theme, request.count, avoid=request.already_written)
        return [Written(prompt=each.prompt, answer=self._perhaps_wrong(each.prompt, each.answer)) for each in drawn]

    def _answer(self, prompt: str) -> str | None:
        [answer] = self._dataset.answer([prompt], theme=Theme(name="any", description=""))
        return None if answer is None else self._perhaps_wrong(prompt, answer)

    def _perhaps_wrong(self, prompt: str, answer: str) -> str:
        """Drawn anew each time a prompt is asked, in whatever order requests arrive."""
        with self._lock:
            self._asked[normalised(prompt)] += 1
            draw = random.Random(f"{self._faults.seed}:{self._asked[normalised(prompt)]}:{normalised(prompt)}")
        if draw.random() >= self._faults.wrong:
            return answer
        others = [other for other in self._answers if other != answer]
        return draw.choice(others) if others else "wrong"


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, teacher: LoopbackTeacher, *args: Any) -> None:
        self._teacher = teacher
        super().__init__(*args)

    def do_GET(self) -> None:
        self._say(self._teacher.models() if self.path == "/v1/models" else _not_found(self.path))

    def do_POST(self) -> None:
        size = self.headers.get("content-length", "")
        if not size.isdecimal() or int(size) > MAX_BODY_BYTES:
            return self._say(_error(413, f"At most {MAX_BODY_BYTES} bytes.", "invalid_request_error", None))
        body = self.rfile.read(int(size)).decode(errors="replace")
        if self.path != "/v1/chat/completions":
            return self._say(_not_found(self.path))
        return self._say(self._teacher.chat(body, self.headers.get("authorization")))

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _say(self, response: _Response) -> None:
        data = response.body.encode()
        with suppress(BrokenPipeError, ConnectionResetError):  # a client that did not wait for a stall
            self.send_response(response.status)
            for name, value in {"content-type": "application/json", **response.headers}.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)


def _spoken(text: str, number: int, limit: int, read_bytes: int) -> dict[str, Any]:
    """A chat completion; a token is four bytes here."""
    whole = text.encode()
    said = whole[: limit * BYTES_PER_TOKEN]
    prompt_tokens, completion_tokens = -(-read_bytes // BYTES_PER_TOKEN), -(-len(said) // BYTES_PER_TOKEN)
    return {
        "id": f"chatcmpl-{number}",
        "object": "chat.completion",
        "created": 0,
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": said.decode(errors="ignore")},
                "finish_reason": "stop" if said == whole else "length",
            }
        ],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }


def _json(status: int, value: object, headers: dict[str, str] | None = None) -> _Response:
    return _Response(status=status, body=json.dumps(value, ensure_ascii=False), headers=headers or {})


def _error(status: int, message: str, kind: str, code: str | None, headers: dict[str, str] | None = None) -> _Response:
    return _json(status, {"error": {"message": message, "type": kind, "param": None, "code": code}}, headers)


def _not_found(path: str) -> _Response:
    return _error(404, f"Nothing at {path}.", "invalid_request_error", "not_found")


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until the process is ended."""
    parser = argparse.ArgumentParser(prog="python -m evolution.loopback_teacher", description="a teacher on loopback")
    parser.add_argument("gold", type=Path, help="JSON lines of prompt and answer")
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument("--log", type=Path, help="file that every request's body is appended to, as JSON lines")
    for option in (each for each in fields(Faults) if each.name != "refuses"):
        kind = type(option.default)
        parser.add_argument("--" + option.name.replace("_", "-"), type=kind, default=option.default)
    options = vars(parser.parse_args(arguments))
    gold, port, log = read_examples(options.pop("gold")), options.pop("port"), options.pop("log")
    with LoopbackTeacher(gold, faults=Faults(**options), port=port, log=log) as teacher:
        sys.stdout.write(json.dumps({"url": teacher.url}) + "\n")
        sys.stdout.flush()
        with suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()


__all__ = ["Faults", "LoopbackTeacher"]
