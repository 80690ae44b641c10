"""What a job of the night leaves on disk, and the exam that can be made of it again."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from evolution.anchors import general_texts
from evolution.evaluation import Exam
from evolution.examples import read_examples
from evolution.protocols import Kind
from evolution.recipe import Recipe


class Workspace:
    """The files of one job; a second training has a second round's."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.taught = directory / "taught.jsonl"
        self.training = directory / "training.jsonl"
        self.validation = directory / "validation.jsonl"
        self.held_out = directory / "held-out.jsonl"
        self.replay = directory / "replay.jsonl"
        self.verdict = directory / "verdict.json"
        self.candidate = directory / "candidate.lora.arrow"

    @classmethod
    def of(cls, home: Path, job: int) -> Self:
        """That of a job by number, which may not be there (yet, or any more)."""
        return cls(home / "nights" / f"job-{job}")

    def make(self) -> Self:
        """Make the directory if there is none; mode 0700, for it holds prompts."""
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        return self

    def job(self, round_: int) -> Path:
        """The training's job file."""
        return self.directory / f"job-{round_}.json"

    def ruling(self, round_: int) -> Path:
        """What the exam of that training led to."""
        return self.directory / f"ruling-{round_}.json"

    def output(self, round_: int) -> Path:
        """The training's output directory."""
        return self.directory / f"trained-{round_}"


def exam_of(work: Workspace, kind: Kind, recipe: Recipe) -> Exam:
    """The exam of the expert that was grown in `work`."""
    items, anchors = tuple(read_examples(work.held_out)), recipe.anchors_of(kind)
    if kind == "encoder":
        return Exam(items=items, anchors=anchors, support=tuple(read_examples(work.training)))
    return Exam(items=items, anchors=anchors, texts=general_texts(), max_new_tokens=recipe.max_new_tokens)


__all__ = ["Workspace", "exam_of"]
