"""Teachers that live on this node, and one that asks another several times."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import count as numbers
from typing import Final

from evolution.errors import BudgetSpentError, TeacherError
from evolution.examples import normalised
from evolution.protocols import Example, Student, Teacher, Theme
from registry.logs import get_logger

TRIES: Final = 3

log = get_logger(__name__)


class LocalTeacher:
    """A larger model on this node; nothing leaves it. Answers are drawn, so that asking twice can disagree."""

    def __init__(self, student: Student, *, max_new_tokens: int = 64, temperature: float = 0.7, seed: int = 0) -> None:
        if student.kind != "causal":
            raise TeacherError(f"expected a model that writes answers, got {student.base!r}, which encodes texts")
        self._student, self._max_new_tokens, self._temperature = student, max_new_tokens, temperature
        self._seeds = numbers(seed)

    @property
    def name(self) -> str:
        """The model's name."""
        return self._student.base

    def answer(self, prompts: Sequence[str], *, theme: Theme) -> list[str | None]:
        """What the model says; None for nothing, or for what is none of the theme's labels."""
        replies = self._say([_question(prompt, theme.labels) for prompt in prompts], self._temperature)
        if not theme.labels:
            return [reply or None for reply in replies]
        spelled = {normalised(label): label for label in theme.labels}
        return [spelled.get(normalised(reply)) for reply in replies]

    def write(self, theme: Theme, count: int, *, avoid: Sequence[str] = ()) -> list[Example]:
        """Prompts that the model makes up, and its answers; fewer than `count` if it repeats itself."""
        taken, prompts = set(map(normalised, avoid)), list[str]()
        for _ in range(TRIES):
            for reply in self._say([_invitation(theme)] * (count - len(prompts)), 1.0):
                prompt = reply.partition("\n")[0].strip()
                if prompt and normalised(prompt) not in taken:
                    taken.add(normalised(prompt))
                    prompts.append(prompt)
        return _paired(prompts, self.answer(prompts, theme=theme))

    def _say(self, prompts: Sequence[str], temperature: float) -> list[str]:
        if not prompts:
            return []
        replies = self._student.answer(
            prompts,
            [None] * len(prompts),
            max_new_tokens=self._max_new_tokens,
            temperature=temperature,
            seed=next(self._seeds),
        )
        return [reply.text.strip() for reply in replies]


class DatasetTeacher:
    """Examples that somebody has already written: answers those prompts, and writes by drawing what fits a theme."""

    def __init__(self, examples: Iterable[Example], *, name: str = "dataset", seed: int = 0) -> None:
        self._examples, self._name = list(examples), name
        self._answers = {normalised(example.prompt): example.answer for example in self._examples}
        self._words = [_words(f"{example.prompt} {example.answer}") for example in self._examples]
        self._rng = random.Random(seed)

    @property
    def name(self) -> str:
        """The name it was given."""
        return self._name

    def answer(self, prompts: Sequence[str], *, theme: Theme) -> list[str | None]:
        """The answer of each prompt that it holds, whatever the theme; None of another."""
        return [self._answers.get(normalised(prompt)) for prompt in prompts]

    def write(self, theme: Theme, count: int, *, avoid: Sequence[str] = ()) -> list[Example]:
        """Examples with one of the theme's labels, or else with some of its terms, drawn by how many they have.

        Weighted by the square of that number, without replacement (Efraimidis and Spirakis 2006).
        """
        taken, labels = set(map(normalised, avoid)), set(map(normalised, theme.labels))
        terms = _words(" ".join(theme.terms)) or _words(f"{theme.name} {theme.description}")
        drawn = []
        for example, words in zip(self._examples, self._words, strict=True):
            weight = float(normalised(example.answer) in labels) if labels else len(words & terms) ** 2
            if weight and normalised(example.prompt) not in taken:
                drawn.append((self._rng.random() ** (1 / weight), example))
        drawn.sort(key=lambda entry: -entry[0])
        return [example for _, example in drawn[:count]]


class Agreeing:
    """Self-consistency (arXiv:2203.11171): asks a teacher up to `votes` times and keeps what most of them say.

    Answers are compared normalised, so this is for short ones. `dropped` counts those without a majority.
    """

    def __init__(self, teacher: Teacher, *, votes: int = 3) -> None:
        if votes < 2:
            raise ValueError(f"expected at least 2 votes, got {votes}")
        self._teacher, self._votes = teacher, votes
        self.dropped = 0

    @property
    def name(self) -> str:
        """The teacher's name, and how often it is asked."""
        return f"{self._teacher.name}, of {self._votes} votes"

    def answer(self, prompts: Sequence[str], *, theme: Theme) -> list[str | None]:
        """The answer that most votes agree on; None without one."""
        return self._agreed(prompts, [[] for _ in prompts], theme)

    def write(self, theme: Theme, count: int, *, avoid: Sequence[str] = ()) -> list[Example]:
        """Examples whose answer the teacher gives again when it is asked for it alone."""
        written = self._teacher.write(theme, count, avoid=avoid)
        prompts = [example.prompt for example in written]
        return _paired(prompts, self._agreed(prompts, [[example.answer] for example in written], theme))

    def _agreed(self, prompts: Sequence[str], votes: list[list[str | None]], theme: Theme) -> list[str | None]:
        try:
            while open_rows := [row for row, given in enumerate(votes) if self._is_open(given)]:
                asked = self._teacher.answer([prompts[row] for row in open_rows], theme=theme)
                for row, answer in zip(open_rows, asked, strict=True):
                    votes[row].append(answer)
        except BudgetSpentError as error:
            if not any(self._winner(given) for given in votes):
                raise
            log.warning("votes_cut_short", teacher=self.name, undecided=len(open_rows), why=str(error))
        winners = [self._winner(given) for given in votes]
        dropped = winners.count(None)
        self.dropped += dropped
        log.info("votes_counted", teacher=self.name, prompts=len(prompts), dropped=dropped)
        return winners

    def _is_open(self, given: Sequence[str | None]) -> bool:
        """Whether a majority of all votes is neither reached nor out of reach."""
        most = _most(given)[1]
        return most < self._needed <= most + self._votes - len(given)

    def _winner(self, given: Sequence[str | None]) -> str | None:
        answer, most = _most(given)
        return answer if most >= self._needed else None

    @property
    def _needed(self) -> int:
        return self._votes // 2 + 1


def _most(given: Sequence[str | None]) -> tuple[str | None, int]:
    """The answer given most often, as it was first spelled, and how often."""
    answers = [answer for answer in given if answer is not None]
    if not answers:
        return None, 0
    [(key, most)] = Counter(map(normalised, answers)).most_common(1)
    return next(answer for answer in answers if normalised(answer) == key), most


def _paired(prompts: Sequence[str], answers: Sequence[str | None]) -> list[Example]:
    pairs = zip(prompts, answers, strict=True)
    return [Example(prompt=prompt, answer=answer) for prompt, answer in pairs if answer is not None]


def _question(prompt: str, labels: Sequence[str]) -> str:
    return f"{prompt}\nReply with one of these labels and nothing else: {', '.join(labels)}." if labels else prompt


def _invitation(theme: Theme) -> str:
    terms = f" It may be about: {', '.join(theme.terms)}." if theme.terms else ""
    return f"Write one short question that a user could ask. Topic: {theme.description}{terms}\nQuestion:"


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w{3,}", text.casefold()))


__all__ = ["Agreeing", "DatasetTeacher", "LocalTeacher"]
