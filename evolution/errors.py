"""Errors of the night.

EvolutionError
├── SignalError           feedback for a request that is not known, or a verdict that is none
├── TeacherError
│   ├── TeacherUnavailableError   the line failed, or the teacher asks to wait longer than we may
│   ├── TeacherAnswerError        what the teacher wrote cannot be used
│   └── DisclosureError           the policy forbids what would leave the node
├── BudgetSpentError      no money, tokens or time left for what was to be done
├── TrainingError         a training cannot start, or its process died
├── ExtractionError       no card can be taken out of two models
└── JobError              a job is unknown, held by another process, or cannot go on
"""

from __future__ import annotations

from registry.errors import ArrowMoEError


class EvolutionError(ArrowMoEError):
    """Something of the night failed."""


class SignalError(EvolutionError):
    """Feedback names no known request, or says neither good nor bad."""


class TeacherError(EvolutionError):
    """A teacher could not help."""


class TeacherUnavailableError(TeacherError):
    """The line failed, or the teacher asks to wait longer than we may."""


class TeacherAnswerError(TeacherError):
    """What the teacher wrote cannot be used."""


class DisclosureError(TeacherError):
    """The owner's policy forbids what would leave the node."""


class BudgetSpentError(EvolutionError):
    """No money, tokens or time are left for what was to be done."""


class TrainingError(EvolutionError):
    """A training cannot start, or its process died."""


class ExtractionError(EvolutionError):
    """No card can be taken out of two models."""


class JobError(EvolutionError):
    """A job is unknown, held by another process, or cannot go on."""


__all__ = [
    "BudgetSpentError",
    "DisclosureError",
    "EvolutionError",
    "ExtractionError",
    "JobError",
    "SignalError",
    "TeacherAnswerError",
    "TeacherError",
    "TeacherUnavailableError",
    "TrainingError",
]
