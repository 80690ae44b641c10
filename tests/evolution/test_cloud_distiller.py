"""The cloud teacher against a real server on loopback: what leaves, what is paid, and what survives of failures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from evolution.budget import Budget, Price
from evolution.cloud_distiller import CloudDistiller
from evolution.disclosure import Policy
from evolution.errors import BudgetSpentError, DisclosureError, TeacherAnswerError, TeacherUnavailableError
from evolution.loopback_teacher import Faults, LoopbackTeacher
from evolution.protocols import Example, Theme
from evolution.teacher_audit import TeacherAudit, TeacherCall
from evolution.teacher_line import Endpoint
from registry.database import Database, sqlite_url

THEME = Theme(name="towns", description="Who founded which town", terms=("town", "founded"))
GOLD = [Example(prompt=f"Who founded the town of T{row}?", answer=f"F{row}") for row in range(60)]
PROMPTS = [example.prompt for example in GOLD]
ANSWERS: list[str | None] = [example.answer for example in GOLD]
PRICE = Price(prompt_usd_per_million=2.0, completion_usd_per_million=8.0)
NOW = datetime(2026, 11, 21, 2, 0, tzinfo=UTC)


@pytest.fixture(autouse=True)
def _no_leaked_threads(no_leaked_threads: None) -> None:
    """Every test here starts threads."""


class Lab:
    """Servers and distillers of one test, with one budget; `slept` are the waits that were asked for."""

    def __init__(self, stack: ExitStack, database: Database) -> None:
        self._stack, self._database = stack, database
        self.slept: list[float] = []
        self.budget = self.account(10**9, 10**9)

    def account(self, limit_microusd: int, limit_tokens: int) -> Budget:
        self.budget = Budget(self._database, "night", limit_microusd=limit_microusd, limit_tokens=limit_tokens)
        return self.budget

    def server(self, gold: Sequence[Example] = GOLD, **faults: Any) -> LoopbackTeacher:
        faults = {"retry_after_s": 3.0, "stall_s": 5.0} | faults
        return self._stack.enter_context(LoopbackTeacher(gold, faults=Faults(**faults), api_key="sesame"))

    def distiller(self, server: LoopbackTeacher | str, policy: Policy = "full", **options: Any) -> CloudDistiller:
        url = server if isinstance(server, str) else server.url
        given = {"model": "m", "base_url": url, "api_key": "sesame", "price": PRICE, "timeout_s": 10.0} | options
        distiller = CloudDistiller(
            Endpoint(**given), self.budget, policy=policy, now=lambda: NOW, sleep=self.slept.append
        )
        return self._stack.enter_context(distiller)

    def calls(self) -> list[TeacherCall]:
        return TeacherAudit(self._database, "night", now=lambda: NOW).calls()


@pytest.fixture
def lab(tmp_path: Path, empty_home: Path) -> Iterator[Lab]:
    path = tmp_path / "catalog.sqlite"
    path.write_bytes((empty_home / "catalog.sqlite").read_bytes())
    with ExitStack() as stack:
        database = Database(sqlite_url(path))
        stack.callback(database.close)
        yield Lab(stack, database)


def test_prompts_are_answered_in_their_order_in_batches(lab: Lab) -> None:
    server = lab.server()
    prompts = [*PROMPTS[::-1], "Who is nobody's founder?"]
    assert lab.distiller(server, batch_size=8).answer(prompts, theme=THEME) == [*ANSWERS[::-1], None]
    assert len(server.requests) == 8


def test_every_exchange_is_recorded_word_for_word_and_paid(lab: Lab) -> None:
    server = lab.server(rate_limit=0.3, error=0.2, seed=4)
    distiller = lab.distiller(server, attempts=12)
    assert distiller.answer(['Wer gründete "T1"?\n', *PROMPTS], theme=THEME) == [None, *ANSWERS]
    calls = lab.calls()
    assert sorted(call.request for call in calls) == sorted(server.requests)
    failed = [call for call in calls if call.error]
    assert {call.microusd for call in failed} == {0}
    assert {call.error for call in failed} == {
        f"expected an answer of {distiller.name}, got status {status}" for status in (429, 500)
    }
    for call in calls:
        assert (call.teacher, call.purpose, call.disclosure, call.created) == (distiller.name, "answer", "full", NOW)
        assert json.loads(call.response or "")
        assert call.microusd == 2 * call.prompt_tokens + 8 * call.completion_tokens
        assert (call.prompt_tokens == -(-len(call.request.encode()) // 4)) != bool(call.error)
    standing = lab.budget.standing()
    assert standing.spent.microusd == sum(call.microusd for call in calls)
    assert standing.spent.tokens == sum(call.prompt_tokens + call.completion_tokens for call in calls)
    assert standing.reserved.tokens == 0


def test_a_retry_waits_as_long_as_it_is_asked_to(lab: Lab) -> None:
    server = lab.server(rate_limit=1.0, retry_after_s=7.5)
    with pytest.raises(TeacherUnavailableError, match="429"):
        lab.distiller(server, attempts=3).answer(PROMPTS[:1], theme=THEME)
    assert lab.slept == [7.5, 7.5]
    assert len(server.requests) == 3


def test_a_wait_beyond_the_cap_is_not_waited(lab: Lab) -> None:
    server = lab.server(rate_limit=1.0, retry_after_s=3600)
    with pytest.raises(TeacherUnavailableError, match=r"at most 60 s .* asked for 3600 s"):
        lab.distiller(server, concurrency=1).answer(PROMPTS, theme=THEME)
    assert lab.slept == []
    assert len(server.requests) == 1  # nor are the other batches asked


def test_without_being_told_it_waits_longer_each_time(lab: Lab) -> None:
    with pytest.raises(TeacherUnavailableError, match="500"):
        lab.distiller(lab.server(error=1.0), attempts=5).answer(PROMPTS[:1], theme=THEME)
    assert len(lab.slept) == 4
    assert all(0.25 * 2**at <= waited <= 0.5 * 2**at for at, waited in enumerate(lab.slept))


def test_a_stall_ends_by_the_timeout_and_is_charged_as_reserved(lab: Lab) -> None:
    server = lab.server(stall=1.0)
    with pytest.raises(TeacherUnavailableError, match="timed out"):
        lab.distiller(server, attempts=2, timeout_s=0.2).answer(PROMPTS[:1], theme=THEME)
    calls = lab.calls()
    assert [call.response for call in calls] == [None, None]
    assert all(call.prompt_tokens > len(call.request) and call.microusd > 0 for call in calls)
    assert lab.budget.standing().spent.microusd == sum(call.microusd for call in calls)


def test_a_line_that_was_never_open_costs_nothing(lab: Lab) -> None:
    with lab.server() as server:
        url = server.url
    with pytest.raises(TeacherUnavailableError, match="Connection error"):
        lab.distiller(url, attempts=2).answer(PROMPTS[:1], theme=THEME)
    assert lab.budget.standing().spent.tokens == 0
    assert len(lab.calls()) == 2


def test_a_refused_key_is_tried_once_and_never_recorded(lab: Lab) -> None:
    server = lab.server()
    with pytest.raises(TeacherUnavailableError, match="401") as caught:
        lab.distiller(server, api_key="sk-wrong-key", concurrency=1).answer(PROMPTS, theme=THEME)
    assert caught.value.hint == "check the API key"
    assert len(server.requests) == 1
    assert "sk-wrong-key" not in str(lab.calls())


def test_replies_that_are_no_json_are_asked_for_again_and_lose_only_their_batch(lab: Lab) -> None:
    answers = lab.distiller(lab.server(malformed=0.5, seed=3), attempts=2, concurrency=1).answer(PROMPTS, theme=THEME)
    lost = answers.count(None)
    assert 0 < lost < len(answers)
    assert [got for got in answers if got] == [wanted for wanted, got in zip(ANSWERS, answers, strict=True) if got]
    assert all(answers[at : at + 8].count(None) in (0, len(answers[at : at + 8])) for at in range(0, 60, 8))
    with pytest.raises(TeacherAnswerError, match="expected a chat completion"):
        lab.distiller(lab.server(malformed=1.0), attempts=2).answer(PROMPTS[:1], theme=THEME)


@pytest.mark.parametrize("field", ["response_format", "max_tokens"])
def test_a_server_that_refuses_a_field_is_asked_without_it(lab: Lab, field: str) -> None:
    server = lab.server(refuses=(field,))
    assert lab.distiller(server).answer(PROMPTS, theme=THEME) == ANSWERS
    asked = [json.loads(request) for request in server.requests]
    assert field in asked[0]
    assert field not in asked[-1]
    assert "max_tokens" in asked[-1] or "max_completion_tokens" in asked[-1]


def test_all_faults_at_once_are_survived(lab: Lab) -> None:
    server = lab.server(rate_limit=0.15, stall=0.05, error=0.1, malformed=0.1, seed=2)
    distiller = lab.distiller(server, attempts=10, timeout_s=0.3, batch_size=4)
    assert distiller.answer(PROMPTS, theme=THEME) == ANSWERS


def test_when_the_money_ends_what_was_got_is_kept(lab: Lab) -> None:
    server = lab.server()
    lab.distiller(server, batch_size=4).answer(PROMPTS[:4], theme=THEME)
    [first] = lab.calls()
    lab.account(10**9, 12 * (first.prompt_tokens + first.completion_tokens))
    answers = lab.distiller(server, batch_size=4).answer(PROMPTS, theme=THEME)
    assert 4 <= len([answer for answer in answers if answer]) < 60
    standing = lab.budget.standing()
    assert standing.spent.within(standing.limit)
    lab.account(10**9, 1)
    with pytest.raises(BudgetSpentError):
        lab.distiller(server).answer(PROMPTS, theme=THEME)


@pytest.mark.parametrize("concurrency", [1, 16])
def test_calls_wait_for_what_others_leave_over_and_never_spend_more_than_the_budget(lab: Lab, concurrency: int) -> None:
    server = lab.server(stall=0.05, malformed=0.2)
    lab.account(40_000, 10**9)
    options = {"batch_size": 1, "concurrency": concurrency, "attempts": 4, "timeout_s": 0.3}
    answers = lab.distiller(server, **options).answer(PROMPTS, theme=THEME)
    standing = lab.budget.standing()
    most_of_one_call = max(call.microusd for call in lab.calls())
    assert 40_000 - most_of_one_call <= standing.spent.microusd <= 40_000
    assert standing.reserved.microusd == 0
    assert [got for got in answers if got] == [want for want, got in zip(ANSWERS, answers, strict=True) if got]


def test_examples_are_written_from_a_theme_and_none_of_them_is_avoided(lab: Lab) -> None:
    server = lab.server()
    written = lab.distiller(server, "description").write(THEME, 20, avoid=PROMPTS[:30])
    assert len(written) == len({example.prompt for example in written}) == 20
    assert set(written) <= set(GOLD[30:])
    first = json.loads(json.loads(server.requests[0])["messages"][1]["content"])
    assert first == {
        "task": "write",
        "theme": {"name": "towns", "description": THEME.description, "terms": ["town", "founded"]},
        "count": 8,
    }


def test_labels_bind_answers(lab: Lab) -> None:
    gold = [Example(prompt=f"lamp {row}", answer="lights" if row % 2 else "fridge") for row in range(10)]
    theme = Theme(name="home", description="lamp", labels=("Lights", "music"))
    distiller = lab.distiller(lab.server(gold))
    prompts = [example.prompt for example in gold]
    assert distiller.answer(prompts, theme=theme) == [None, "Lights"] * 5


def test_a_theme_is_named(lab: Lab) -> None:
    named = lab.distiller(lab.server(), "description").name_theme(("town", "founded", "jane@corp.example"), 12)
    assert (named.name, named.terms) == ("town-founded-<EMAIL_1>", ("town", "founded", "<EMAIL_1>"))


CANARIES = {
    "mail": "jane.canary@corp.example",
    "call": "+49 170 5550123",
    "pay to": "DE89 3704 0044 0532 0130 00",
    "charge": "4111 1111 1111 1111",
    "log in at": "https://jane:pw@host.example/x",
    "use the key": "sk-canary-0123456789abcdef",
    "my number is": "078-05-1120",
    "ping": "10.20.30.40",
    "my name is": "Jane Canary",
}
PRIVATE = [Example(prompt=f"Who founded the town of V? {cue} {value}", answer="Ada") for cue, value in CANARIES.items()]


def leaked(server: LoopbackTeacher) -> set[str]:
    said = "\n".join(server.requests)
    assert said
    return {value for value in CANARIES.values() if value in said or json.dumps(value)[1:-1] in said}


def test_canaries_never_reach_a_teacher_that_may_see_redacted_prompts(lab: Lab) -> None:
    blind = [
        Example(prompt=f"Who founded the town of V? {cue} <{kind}_1>", answer=f"Ask <{kind}_1>")
        for cue, kind in zip(
            CANARIES, ("EMAIL", "PHONE", "IBAN", "CARD", "URL", "SECRET", "SSN", "IP", "NAME"), strict=True
        )
    ]
    server = lab.server(blind)
    prompts = [example.prompt for example in PRIVATE]
    answers = lab.distiller(server, "redacted").answer(prompts, theme=with_canaries())
    assert answers == [f"Ask {value}" for value in CANARIES.values()]  # put back here
    assert leaked(server) == set()
    assert not {value for value in CANARIES.values() if value in str(lab.calls())}


def test_canaries_never_reach_a_teacher_that_sees_descriptions(lab: Lab) -> None:
    server = lab.server()
    distiller = lab.distiller(server, "description")
    with pytest.raises(DisclosureError):
        distiller.answer([example.prompt for example in PRIVATE], theme=with_canaries())
    assert server.requests == []
    written = distiller.write(with_canaries(), 12, avoid=[example.prompt for example in PRIVATE])
    assert distiller.answer([example.prompt for example in written], theme=THEME) == [each.answer for each in written]
    assert leaked(server) == set()


def test_the_canary_test_can_fail(lab: Lab) -> None:
    server = lab.server()
    lab.distiller(server, "full").answer([example.prompt for example in PRIVATE], theme=THEME)
    assert leaked(server) == set(CANARIES.values())


def test_never_is_never(lab: Lab) -> None:
    server = lab.server()
    distiller = lab.distiller(server, "never")
    asks: list[Callable[[], object]] = [
        lambda: distiller.answer(PROMPTS, theme=THEME),
        lambda: distiller.write(THEME, 3),
        lambda: distiller.name_theme(("town",), 3),
    ]
    for ask in asks:
        with pytest.raises(DisclosureError):
            ask()
    assert server.requests == []


def with_canaries() -> Theme:
    cues = ". ".join(f"{cue} {value}" for cue, value in CANARIES.items())
    return Theme(name="towns", description=f"Towns. {cues}.", terms=("town", "founded", CANARIES["mail"]))
