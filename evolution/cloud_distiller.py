"""A teacher behind an OpenAI-compatible endpoint: what is asked, in batches, and what is kept of the replies.

Nothing leaves that `disclosure` did not allow. Bulk work gives what it got: a batch whose reply cannot be used has None
rows, and when money or the line ends, what came before is kept; only if nothing came at all is that an error.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import ceil
from typing import Final, TypeVar

from evolution.budget import Budget
from evolution.clock import Now, utc_now
from evolution.disclosure import Disclosed, Policy, disclosed
from evolution.errors import BudgetSpentError, TeacherAnswerError, TeacherError
from evolution.examples import normalised
from evolution.protocols import Example, Theme
from evolution.redaction import Redaction, Redactor
from evolution.teacher_line import Endpoint, TeacherLine
from evolution.teacher_messages import (
    Answers,
    Examples,
    Form,
    Name,
    Question,
    Request,
    Subject,
    answers_of,
    examples_of,
    subject,
)
from registry.logs import get_logger

ROUNDS: Final = 6
"""Most rounds of requests for examples that are still missing."""

SHOWN: Final = 40
"""How many of its own prompts a teacher is shown, so that it writes others."""

log = get_logger(__name__)


class CloudDistiller:
    """A `Teacher` at an `Endpoint`, paid by a `Budget`. Safe among threads; close it, or use it as a context."""

    def __init__(
        self,
        endpoint: Endpoint,
        budget: Budget,
        *,
        policy: Policy = "description",
        redactor: Redactor | None = None,
        now: Now = utc_now,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._line = TeacherLine(endpoint, budget, disclosure=policy, now=now, sleep=sleep)
        self._concurrency, self._batch_size = endpoint.concurrency, endpoint.batch_size
        self._policy, self._redactor = policy, redactor
        self._written: set[str] = set()

    @property
    def name(self) -> str:
        """Model and host."""
        return self._line.name

    def __enter__(self) -> CloudDistiller:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._line.close()

    def answer(self, prompts: Sequence[str], *, theme: Theme) -> list[str | None]:
        """An answer to each prompt; under `description` only to prompts that this teacher wrote.

        Raises `DisclosureError`, or what ended it if there is no answer at all.
        """
        leaving = self._disclosed(prompts, theme)
        about, batches = subject(leaving.theme), _parts(leaving.prompts, self._batch_size)
        requests = [Request(task="answer", theme=about, prompts=_questions(batch)) for batch in batches]
        answers: list[str | None] = []
        for batch, reply in zip(batches, self._each(Answers, requests), strict=True):
            texts = [None] * len(batch) if reply is None else answers_of(reply, len(batch), about.labels)
            answers += [text and prompt.restored(text) for prompt, text in zip(batch, texts, strict=True)]
        return answers

    def write(self, theme: Theme, count: int, *, avoid: Sequence[str] = ()) -> list[Example]:
        """Up to `count` new examples. `avoid` never leaves the node: what is in it is sorted out here."""
        about = subject(self._disclosed((), theme).theme)
        taken, found = set(map(normalised, avoid)), list[Example]()
        try:
            for counts in self._rounds(count, found):
                for example in self._round(about, counts, found):
                    if normalised(example.prompt) not in taken:
                        taken.add(normalised(example.prompt))
                        found.append(example)
        except (BudgetSpentError, TeacherError) as error:
            if not found:
                raise
            log.warning("writing_cut_short", teacher=self.name, wanted=count, got=len(found), why=str(error))
        self._written.update(example.prompt for example in found)
        return found[:count]

    def name_theme(self, terms: Sequence[str], count: int) -> Theme:
        """A name and a description for what `terms`, the words that mark `count` requests, are about.

        Both are the teacher's words, as it spelled them: no card name yet.
        """
        theme = self._disclosed((), Theme(name="unnamed", description="", terms=tuple(terms))).theme
        [reply] = self._each(Name, [Request(task="name", theme=subject(theme), count=count)])
        assert reply is not None  # else _each has raised why
        return Theme(name=reply.name.strip(), description=reply.description.strip(), terms=theme.terms)

    def _disclosed(self, prompts: Sequence[str], theme: Theme) -> Disclosed:
        return disclosed(prompts, theme, self._policy, redactor=self._redactor, written=self._written)

    def _rounds(self, count: int, found: Sequence[Example]) -> Iterator[list[int]]:
        """How many examples each request of a round asks for, until there are enough or a round brings none.

        After the first round in whole batches: a teacher that repeats itself brings fewer than it is asked for.
        """
        size, before = self._batch_size, -1
        yield [len(part) for part in _parts(range(count), size)]
        for _ in range(ROUNDS - 1):
            if len(found) >= count or len(found) == before:
                return
            before = len(found)
            yield [size] * ceil((count - before) / size)

    def _round(self, about: Subject, counts: Sequence[int], found: Sequence[Example]) -> list[Example]:
        shown = tuple(example.prompt for example in found[-SHOWN:])
        requests = [Request(task="write", theme=about, count=count, already_written=shown) for count in counts]
        replies = self._each(Examples, requests)
        return [example for reply in replies if reply for example in examples_of(reply, about.labels)]

    def _each(self, form: type[Form], requests: Sequence[Request]) -> list[Form | None]:
        """A reply to each request, or None; raises the first error if there is no reply at all."""
        ended, errors = threading.Event(), list[Exception]()

        def one(request: Request) -> Form | None:
            if ended.is_set():
                return None
            try:
                return self._line.ask(form, request)
            except (BudgetSpentError, TeacherError) as error:
                if not isinstance(error, TeacherAnswerError):
                    ended.set()
                errors.append(error)
                log.warning("teacher_batch_failed", teacher=self.name, purpose=request.task, why=str(error))
                return None

        with ThreadPoolExecutor(self._concurrency, thread_name_prefix="teacher") as pool:
            replies = list(pool.map(one, requests))
        if errors and not any(replies):
            raise errors[0]
        if errors:
            log.warning("teacher_batches_lost", teacher=self.name, lost=replies.count(None), of=len(requests))
        return replies


Part = TypeVar("Part")


def _parts(rows: Sequence[Part], size: int) -> list[Sequence[Part]]:
    return [rows[at : at + size] for at in range(0, len(rows), size)]


def _questions(prompts: Sequence[Redaction]) -> tuple[Question, ...]:
    return tuple(Question(id=row, text=prompt.text) for row, prompt in enumerate(prompts))


__all__ = ["CloudDistiller"]
