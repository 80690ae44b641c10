"""What a check is, and what becomes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from federation.conformance.subject import Subject


class Outcome(StrEnum):
    """What became of a check."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_TESTED = "not tested"


@dataclass(frozen=True, kw_only=True, eq=False)
class Check:
    """One statement of `docs/protocol.md` under the heading `section`, and how it is tested.

    `run` says what came, or raises: `Failed`, `NotTested`, or what the call raised, which is a failure as well. Checks
    in `needs` find out what this one builds upon; it is not tested unless they passed. `secured`: it is about TLS.
    """

    name: str
    section: str
    expected: str
    run: Callable[[Subject], str]
    needs: tuple[Check, ...] = ()
    secured: bool = False


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What became of one check. `got`: what came, or why it was not tested."""

    name: str
    section: str
    expected: str
    outcome: Outcome
    got: str


def check(
    section: str, expected: str, *needs: Check, secured: bool = False
) -> Callable[[Callable[[Subject], str]], Check]:
    """Make a check of a function, named as the function is."""

    def made(run: Callable[[Subject], str]) -> Check:
        name = run.__name__.replace("_", "-")
        return Check(name=name, section=section, expected=expected, run=run, needs=needs, secured=secured)

    return made


__all__ = ["Check", "Finding", "Outcome", "check"]
