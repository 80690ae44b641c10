"""Who teaches a node, by its settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from arrowmoe.inference import Inference
from arrowmoe.night_teachers import NightlyTeacher, NobodyTeaches, is_told_prompts, teacher_of
from arrowmoe.settings import Settings, TeacherSettings
from evolution.errors import TeacherError
from evolution.examples import write_examples
from evolution.protocols import Example, Teacher, Theme
from registry.store import Registry

THEME = Theme(name="words", description="Requests about words.")


def of(home: Path, model: str, bases: tuple[str, ...] = ()) -> Teacher:
    settings = Settings(home=home, bases=bases, teacher=TeacherSettings(model=model))
    with Registry.open(home) as registry:
        inference = Inference(registry, settings, bases=bases, route=False)
        inference.load()
        return teacher_of(registry.database, settings, inference)


def test_nobody_teaches_a_node_that_names_none(home: Path) -> None:
    teacher = of(home, "")
    assert isinstance(teacher, NobodyTeaches)
    with pytest.raises(TeacherError, match="nobody teaches"):
        teacher.answer(["w5"], theme=THEME)


def test_a_file_teaches_what_it_holds(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "known.jsonl"
    write_examples(path, [Example(prompt="w5 w6", answer="w7")])
    teacher = of(home, f"file:{path}")
    assert teacher.name == "known.jsonl"
    assert teacher.answer(["w5 w6", "w9"], theme=THEME) == ["w7", None]


def test_a_missing_file_is_said(home: Path, tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="expected examples in"):
        of(home, f"file:{tmp_path}/none.jsonl")


def test_a_base_of_the_node_s_own_teaches(home: Path, tiny_models: tuple[Path, Path]) -> None:
    base = str(tiny_models[0])
    teacher = of(home, f"local:{base}", (base,))
    assert teacher.name == tiny_models[0].name
    (answer,) = teacher.answer(["w5 w6"], theme=THEME)
    assert answer is None or isinstance(answer, str)


def test_any_other_name_is_a_model_at_the_endpoint(home: Path) -> None:
    assert isinstance(of(home, "some-model"), NightlyTeacher)


@pytest.mark.parametrize(
    ("model", "disclosure", "told"),
    [
        ("m", "description", False),
        ("m", "redacted", True),
        ("m", "full", True),
        ("local:b", "description", True),
        ("file:f", "never", True),
    ],
)
def test_prompts_are_told_to_whom_they_do_not_leave_for_or_where_the_owner_allows(
    model: str, disclosure: str, told: bool
) -> None:
    settings = TeacherSettings.model_validate({"model": model, "disclosure": disclosure})
    assert is_told_prompts(settings) == told
