"""Who teaches a node at night, as its settings say: an endpoint, a model of this node's, a file of examples, nobody."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from arrowmoe.inference import Inference
from arrowmoe.settings import EvolutionSettings, Settings, TeacherSettings
from arrowmoe.students import EngineStudent
from evolution.budget import Budget, Price
from evolution.clock import Now, utc_now
from evolution.cloud_distiller import CloudDistiller
from evolution.errors import TeacherError
from evolution.examples import read_examples
from evolution.protocols import Example, Teacher, Theme
from evolution.teacher_line import Endpoint
from evolution.teachers import Agreeing, DatasetTeacher, LocalTeacher
from registry.database import Database

LOCAL, FILE = "local:", "file:"
"""What a teacher's model begins with that is one of the node's bases, or a file of examples; nothing leaves then."""


def teacher_of(database: Database, settings: Settings, inference: Inference) -> Teacher:
    """The settings' teacher. Raises what loading a local model or reading a file raises."""
    model = settings.teacher.model
    if not model:
        return NobodyTeaches()
    if model.startswith(LOCAL):
        return LocalTeacher(EngineStudent(inference.engine(model.removeprefix(LOCAL))))
    if model.startswith(FILE):
        path = Path(model.removeprefix(FILE)).expanduser()
        try:
            return DatasetTeacher(read_examples(path), name=path.name)
        except OSError as error:
            raise TeacherError(
                f"expected examples in {path}, so nobody teaches: {error}", hint="JSON lines of prompt and answer"
            ) from error
    return NightlyTeacher(database, settings.teacher, settings.evolution, utc_now)


def is_told_prompts(teacher: TeacherSettings) -> bool:
    """Whether the teacher is given the gap's own prompts, redacted or not, rather than what they are about."""
    return teacher.model.startswith((LOCAL, FILE)) or teacher.disclosure in ("redacted", "full")


class NightlyTeacher:
    """A `Teacher` at the settings' endpoint, with a budget for each night, asked several times where that is wanted."""

    def __init__(self, database: Database, teacher: TeacherSettings, evolution: EvolutionSettings, now: Now) -> None:
        self._database, self._settings, self._evolution, self._now = database, teacher, evolution, now
        self._account: str | None = None
        self._distiller: CloudDistiller | None = None
        self._asked: Teacher | None = None

    @property
    def name(self) -> str:
        """The model's name."""
        return self._settings.model

    def begin(self, account: str) -> None:
        """Spend from `account` from now on."""
        self.close()
        self._account = account

    def _open(self) -> Teacher:
        """A line to the endpoint, made when it is first needed: a missing key fails an expert, not the survey."""
        chosen = self._settings
        budget = Budget(
            self._database,
            self._account or f"day-{self._now():%Y-%m-%d}",
            limit_microusd=round(self._evolution.budget_usd * 1e6),
            limit_tokens=self._evolution.budget_tokens,
            now=self._now,
        )
        self._distiller = CloudDistiller(_endpoint(chosen), budget, policy=chosen.disclosure, now=self._now)
        return Agreeing(self._distiller, votes=chosen.votes) if chosen.votes > 1 else self._distiller

    def close(self) -> None:
        """Let go of the line."""
        if self._distiller is not None:
            self._distiller.close()
        self._distiller = self._asked = None

    def answer(self, prompts: Sequence[str], *, theme: Theme) -> list[str | None]:
        """An answer to each prompt; None where the votes do not agree."""
        return self._now_asked().answer(prompts, theme=theme)

    def write(self, theme: Theme, count: int, *, avoid: Sequence[str] = ()) -> list[Example]:
        """About `count` new examples of `theme`."""
        return self._now_asked().write(theme, count, avoid=avoid)

    def _now_asked(self) -> Teacher:
        self._asked = self._asked or self._open()
        return self._asked


class NobodyTeaches:
    """The teacher of a node that names none: gaps are found, and stay open."""

    name = "nobody"

    def answer(self, prompts: Sequence[str], *, theme: Theme) -> list[str | None]:
        """Nothing. Raises `TeacherError`."""
        raise _no_teacher()

    def write(self, theme: Theme, count: int, *, avoid: Sequence[str] = ()) -> list[Example]:
        """Nothing. Raises `TeacherError`."""
        raise _no_teacher()


def _endpoint(settings: TeacherSettings) -> Endpoint:
    """Where the settings' teacher is. Raises `TeacherError` where its key is missing."""
    key = os.environ.get(settings.key_variable, "")
    if not key:
        raise TeacherError(
            f"expected the teacher's key in the variable {settings.key_variable}, which is not set",
            hint="set it, or name another with teacher.key_variable; a local server takes any word",
        )
    return Endpoint(
        model=settings.model,
        api_key=key,
        price=Price(prompt_usd_per_million=settings.prompt_usd, completion_usd_per_million=settings.completion_usd),
        timeout_s=settings.timeout_s,
        concurrency=settings.concurrency,
        base_url=settings.base_url,
    )


def _no_teacher() -> TeacherError:
    return TeacherError(
        "nobody teaches this node, so gaps are found and stay open",
        hint="name a teacher: teacher.model and teacher.base_url in the settings, its key in the environment",
    )


__all__ = ["NightlyTeacher", "NobodyTeaches", "is_told_prompts", "teacher_of"]
