"""The line to an OpenAI-compatible endpoint: attempts, waits, money and the record. The only user of the openai SDK.

Rules: nothing is sent that was not reserved in the budget before; every attempt is a row in the audit, written before
it leaves. An attempt whose price nobody knows (no answer, no usage) is charged what was reserved for it. Knows no
policy: what may be said was decided before.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from email.utils import parsedate_to_datetime
from itertools import count
from typing import Annotated, Any, Final, Generic, TypedDict
from urllib.parse import urlsplit

import openai
from pydantic import BaseModel, Field, ValidationError

from evolution.budget import Budget, Price, Reservation
from evolution.errors import BudgetSpentError, TeacherAnswerError, TeacherError, TeacherUnavailableError
from evolution.teacher_audit import TeacherAudit
from evolution.teacher_messages import Form, Request, messages, parsed, response_format

BACKOFF_S: Final = 0.5
PASSING: Final = frozenset({408, 409, 425, 429})
UNSENT: Final = frozenset({"ConnectError", "ConnectTimeout"})
FORM_TOKENS: Final = 128
"""Room for the JSON around a reply, and for the chat template around a request."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where a teacher is, what it costs, and how patient we are with it."""

    model: str
    api_key: str = field(repr=False)
    base_url: str = "https://api.openai.com/v1"
    price: Price
    timeout_s: float = 60.0
    concurrency: int = 4
    attempts: int = 4
    longest_wait_s: float = 60.0
    batch_size: int = 8
    max_answer_tokens: int = 128

    def __post_init__(self) -> None:
        counts = {name: getattr(self, name) for name in ("concurrency", "attempts", "batch_size", "max_answer_tokens")}
        if min(counts.values()) < 1:
            raise TeacherError(f"expected counts of at least 1, got {counts}")


_Tokens = Annotated[int, Field(ge=0)]


class _Usage(BaseModel):
    prompt_tokens: _Tokens
    completion_tokens: _Tokens


class _Message(BaseModel):
    content: str


class _Choice(BaseModel):
    message: _Message


class _Completion(BaseModel):
    choices: Annotated[tuple[_Choice, ...], Field(min_length=1)]
    usage: _Usage | None = None


class _Billed(BaseModel):
    usage: _Usage | None = None


@dataclass(frozen=True, kw_only=True)
class _Heard:
    """What came back; `usage` is None where nobody knows what it cost."""

    body: str | None
    usage: _Usage | None
    error: TeacherError | None = None
    passing: bool = False
    retry_after_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class _Outcome(Generic[Form]):
    reply: Form | None
    heard: _Heard
    error: TeacherError | None


class _Charge(TypedDict):
    prompt_tokens: int
    completion_tokens: int


class TeacherLine:
    """Asks one endpoint, paid by one budget. Safe among threads."""

    def __init__(
        self,
        endpoint: Endpoint,
        budget: Budget,
        *,
        disclosure: str,
        now: Callable[[], datetime],
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._endpoint, self._budget, self._disclosure = endpoint, budget, disclosure
        self._now, self._sleep = now, sleep
        self._audit = TeacherAudit(budget.database, budget.account, now=now)
        self._client = openai.OpenAI(
            api_key=endpoint.api_key, base_url=endpoint.base_url, timeout=endpoint.timeout_s, max_retries=0
        )
        self._structured, self._limit = True, "max_tokens"
        self._turn, self._under_way = threading.Condition(), 0

    @property
    def name(self) -> str:
        """Model and host."""
        return f"{self._endpoint.model} at {urlsplit(self._endpoint.base_url).hostname}"

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def ask(self, form: type[Form], request: Request) -> Form:
        """A reply of that form.

        Raises `BudgetSpentError`; `TeacherAnswerError` if all attempts brought something else; and
        `TeacherUnavailableError` if the line failed, the teacher refuses, or asks to wait longer than we may.
        """
        for attempt in count(1):
            outcome = self._attempt(form, request)
            if outcome.reply is not None:
                return outcome.reply
            assert outcome.error is not None
            if attempt == self._endpoint.attempts or not outcome.heard.passing:
                raise outcome.error
            self._wait(attempt, outcome)
        raise AssertionError("unreachable")

    def _attempt(self, form: type[Form], request: Request) -> _Outcome[Form]:
        fields = self._fields(form, request)
        body = json.dumps(fields, ensure_ascii=False, separators=(",", ":"))
        most = _Charge(prompt_tokens=_most_read(body), completion_tokens=self._most_written(request))
        with self._reserved(most) as reservation:
            number = self._audit.begin(
                teacher=self.name, purpose=request.task, disclosure=self._disclosure, request=body
            )
            began = time.monotonic()
            heard = self._send(form, request, fields)
            outcome = _read(form, heard)
            charge = most if heard.usage is None else _charge(heard.usage)
            cost = self._endpoint.price.cost(**charge)
            self._budget.settle(reservation, cost.microusd, cost.tokens)
            self._audit.end(
                number,
                response=heard.body,
                error=None if outcome.error is None else str(outcome.error),
                microusd=cost.microusd,
                seconds=time.monotonic() - began,
                **charge,
            )
        return outcome

    @contextmanager
    def _reserved(self, most: _Charge) -> Iterator[Reservation]:
        """Reserve what a call may cost; while others of ours are under way, wait for what they leave over."""
        cost = self._endpoint.price.cost(**most)
        with self._turn:
            while True:
                try:
                    reservation = self._budget.reserve(cost.microusd, cost.tokens)
                    break
                except BudgetSpentError:
                    if not self._under_way:
                        raise
                self._turn.wait()
            self._under_way += 1
        try:
            yield reservation
        finally:
            with self._turn:
                self._under_way -= 1
                self._turn.notify_all()

    def _send(self, form: type[Form], request: Request, fields: dict[str, Any]) -> _Heard:
        try:
            raw = self._client.chat.completions.with_raw_response.create(**fields)
            return _Heard(body=raw.text, usage=_usage(raw.text), passing=True)
        except openai.APIStatusError as error:
            self._learn(error.response.text)
            learnt = self._fields(form, request) != fields
            return _Heard(
                body=error.response.text,
                usage=_NOTHING,
                error=_refusal(self.name, error),
                passing=learnt or error.status_code in PASSING or error.status_code >= 500,
                retry_after_s=_seconds(error.response.headers.get("retry-after"), self._now()),
            )
        except openai.APIError as error:
            unsent = type(error.__cause__).__name__ in UNSENT
            broken = TeacherUnavailableError(
                f"expected an answer of {self.name}, got {error}", hint="check its URL and the network"
            )
            return _Heard(body=None, usage=_NOTHING if unsent else None, error=broken, passing=True)

    def _fields(self, form: type[Form], request: Request) -> dict[str, Any]:
        fields: dict[str, Any] = {"model": self._endpoint.model, "messages": messages(request)}
        fields[self._limit] = self._most_written(request)
        if self._structured:
            fields["response_format"] = response_format(form)
        return fields

    def _learn(self, refusal: str) -> None:
        """Older servers know no structured output, and newer models another name of the limit."""
        if "response_format" in refusal or "json_schema" in refusal:
            self._structured = False
        if "max_completion_tokens" in refusal:
            self._limit = "max_completion_tokens"

    def _most_written(self, request: Request) -> int:
        return FORM_TOKENS + self._endpoint.max_answer_tokens * request.rows

    def _wait(self, attempt: int, outcome: _Outcome[Form]) -> None:
        asked_s, most_s = outcome.heard.retry_after_s, self._endpoint.longest_wait_s
        if asked_s is not None and asked_s > most_s:
            raise TeacherUnavailableError(
                f"expected to wait at most {most_s:g} s for {self.name}, got asked for {asked_s:g} s",
                hint="try again later, or allow a longer wait",
            ) from outcome.error
        backoff_s = min(most_s, BACKOFF_S * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)
        self._sleep(backoff_s if asked_s is None else asked_s)


_NOTHING: Final = _Usage(prompt_tokens=0, completion_tokens=0)


def _read(form: type[Form], heard: _Heard) -> _Outcome[Form]:
    if heard.error is not None or heard.body is None:
        return _Outcome(reply=None, heard=heard, error=heard.error)
    try:
        completion = _Completion.model_validate_json(heard.body)
        return _Outcome(reply=parsed(form, completion.choices[0].message.content), heard=heard, error=None)
    except ValidationError:
        error = TeacherAnswerError(f"expected a chat completion, got {len(heard.body)} characters of something else")
    except TeacherAnswerError as unusable:
        error = unusable
    return _Outcome(reply=None, heard=heard, error=error)


def _most_read(body: str) -> int:
    """No token is shorter than a byte."""
    return len(body.encode()) + FORM_TOKENS


def _usage(body: str) -> _Usage | None:
    try:
        return _Billed.model_validate_json(body).usage
    except ValidationError:
        return None


def _charge(usage: _Usage) -> _Charge:
    return _Charge(prompt_tokens=usage.prompt_tokens, completion_tokens=usage.completion_tokens)


def _refusal(name: str, error: openai.APIStatusError) -> TeacherUnavailableError:
    hint = "check the API key" if error.status_code in (401, 403) else "check the model's name, or try again later"
    return TeacherUnavailableError(f"expected an answer of {name}, got status {error.status_code}", hint=hint)


def _seconds(retry_after: str | None, now: datetime) -> float | None:
    """What the header asks for (RFC 9110, 10.2.3): seconds or a date; None without, or for something else."""
    if retry_after is None:
        return None
    try:
        return max(0.0, float(retry_after)) if retry_after.strip().lower() != "nan" else None
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(retry_after) - now).total_seconds())
    except (TypeError, ValueError):  # no date, or one without a zone
        return None


__all__ = ["Endpoint", "TeacherLine"]
