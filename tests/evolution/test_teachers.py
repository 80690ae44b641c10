"""Teachers on this node, and voting."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from evolution.errors import BudgetSpentError, TeacherError
from evolution.protocols import Example, Floats, Kind, Reply, Theme, Uses, Vectors
from evolution.teachers import Agreeing, DatasetTeacher, LocalTeacher

THEME = Theme(name="towns", description="Who founded which town", terms=("town", "founded"))
TOWNS = [Example(prompt=f"Who founded the town of T{row}?", answer=f"F{row}") for row in range(30)]
OTHERS = [Example(prompt=f"Turn on lamp {row}", answer="lights") for row in range(30)]


class Parrot:
    """A student that says the same, or what it is told to."""

    def __init__(self, *said: str, kind: Kind = "causal") -> None:
        self.said, self.kind, self.base = list(said), kind, "parrot"
        self.heard: list[str] = []
        self.seeds: list[int | None] = []

    def answer(
        self,
        prompts: Sequence[str],
        uses: Uses,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> list[Reply]:
        assert list(uses) == [None] * len(prompts)
        self.heard += prompts
        self.seeds.append(seed)
        return [Reply(text=self.said.pop(0), tokens=1, sequence_nats=0.0) for _ in prompts]

    def losses(self, examples: Sequence[Example], uses: Uses) -> Floats:
        raise NotImplementedError

    def divergences(self, examples: Sequence[Example], uses: Uses) -> Floats:
        raise NotImplementedError

    def encode(self, texts: Sequence[str], uses: Uses) -> Vectors:
        raise NotImplementedError


def test_a_local_teacher_answers_with_a_label_or_not_at_all() -> None:
    student = Parrot(" Lights. ", "the lights please", "")
    theme = Theme(name="home", description="A home", labels=("lights", "music"))
    assert LocalTeacher(student).answer(["a", "b", "c"], theme=theme) == ["lights", None, None]
    assert "lights, music" in student.heard[0]


def test_a_local_teacher_writes_prompts_and_answers_them_each_time_with_another_seed() -> None:
    student = Parrot("Who was it?\nmore", "who was it", "Where?", "Ada", "Rome")
    written = LocalTeacher(student, seed=5).write(THEME, 2, avoid=[])
    assert written == [Example(prompt="Who was it?", answer="Ada"), Example(prompt="Where?", answer="Rome")]
    assert student.seeds == [5, 6, 7]


def test_an_encoder_is_no_teacher() -> None:
    with pytest.raises(TeacherError, match="encodes"):
        LocalTeacher(Parrot(kind="encoder"))


def test_a_dataset_answers_what_it_holds() -> None:
    teacher = DatasetTeacher(TOWNS)
    assert teacher.answer(["who founded the town of t3", "Who?"], theme=THEME) == ["F3", None]


def test_a_dataset_writes_by_terms_or_labels_and_never_what_is_to_be_avoided() -> None:
    teacher = DatasetTeacher(TOWNS + OTHERS)
    avoid = [example.prompt.upper() for example in TOWNS[:10]]
    assert set(teacher.write(THEME, 100, avoid=avoid)) == set(TOWNS[10:])
    lights = Theme(name="home", description="A home", terms=("town",), labels=("Lights",))
    assert set(teacher.write(lights, 100)) == set(OTHERS)
    assert len(teacher.write(lights, 7)) == 7
    assert teacher.write(Theme(name="x", description="Nothing like that"), 7) == []


class Careless:
    """A teacher of which a share of answers is wrong, at random; it can run out of money."""

    name = "careless"

    def __init__(self, wrong: float, calls: int = 99) -> None:
        self._rng, self._wrong, self._calls = random.Random(0), wrong, calls
        self.asked: list[int] = []

    def answer(self, prompts: Sequence[str], *, theme: Theme) -> list[str | None]:
        if len(self.asked) == self._calls:
            raise BudgetSpentError("expected money, got none")
        self.asked.append(len(prompts))
        return [self._say(prompt) for prompt in prompts]

    def write(self, theme: Theme, count: int, *, avoid: Sequence[str] = ()) -> list[Example]:
        prompts = [f"q{row}" for row in range(count)]
        return [Example(prompt=prompt, answer=self._say(prompt)) for prompt in prompts]

    def _say(self, prompt: str) -> str:
        return f"{self._rng.random()}" if self._rng.random() < self._wrong else f"Right {prompt}."


def test_voting_removes_wrong_answers_and_asks_again_only_where_it_must() -> None:
    teacher = Careless(0.1)
    voting = Agreeing(teacher, votes=3)
    prompts = [f"q{row}" for row in range(1000)]
    answers = voting.answer(prompts, theme=THEME)
    assert {answer for answer, prompt in zip(answers, prompts, strict=True) if answer != f"Right {prompt}."} == {None}
    # Two of three agree with probability 0.9² (3 − 2 · 0.9) = 0.972; a third vote is needed for 1 − 0.81.
    assert 10 < answers.count(None) == voting.dropped < 50
    assert teacher.asked[:2] == [1000, 1000]
    assert 140 < teacher.asked[2] < 240


def test_what_is_written_counts_as_the_first_vote() -> None:
    teacher = Careless(0.2)
    voting = Agreeing(teacher, votes=2)
    written = voting.write(THEME, 200)
    assert teacher.asked == [200]
    assert {example.answer == f"Right {example.prompt}." for example in written} == {True}
    assert len(written) + voting.dropped == 200
    assert 50 < voting.dropped < 100  # 1 − 0.8²


def test_voting_keeps_what_agreed_before_the_money_ended() -> None:
    answers = Agreeing(Careless(0.1, calls=2), votes=3).answer([f"q{row}" for row in range(100)], theme=THEME)
    assert 60 < len(answers) - answers.count(None) < 95
    with pytest.raises(BudgetSpentError):
        Agreeing(Careless(0.1, calls=1), votes=3).answer(["q"], theme=THEME)


def test_nobody_knows_is_no_majority() -> None:
    voting = Agreeing(DatasetTeacher(TOWNS))
    assert voting.answer(["what?"], theme=THEME) == [None]
    assert voting.dropped == 1
