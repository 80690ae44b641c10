"""What leaves the node for a teacher. Decided here and nowhere else, without I/O.

`never`: nothing. `description`: the gap's theme, and prompts that the teacher itself wrote. `redacted`: prompts too,
with placeholders for personal data. `full`: prompts as they are. Themes are redacted wherever prompts would be.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, assert_never

from evolution.errors import DisclosureError
from evolution.protocols import Theme
from evolution.redaction import PatternRedactor, Redaction, Redactor

Policy = Literal["never", "description", "redacted", "full"]


@dataclass(frozen=True, kw_only=True)
class Disclosed:
    """What may leave: `theme`, and the text of each of `prompts`, whose originals stay."""

    theme: Theme
    prompts: tuple[Redaction, ...]


def disclosed(
    prompts: Sequence[str],
    theme: Theme,
    policy: Policy,
    *,
    redactor: Redactor | None = None,
    written: Collection[str] = (),
) -> Disclosed:
    """What of `prompts` and `theme` may leave; prompts in `written` are the teacher's own and always may.

    Raises `DisclosureError` if the policy is `never`, or `description` and a prompt is a user's.
    """
    redactor = redactor or PatternRedactor()
    match policy:
        case "never":
            raise DisclosureError(
                "expected a policy that lets something leave this node, got 'never', so no cloud teacher can be asked",
                hint="use a local teacher, or allow 'description'",
            )
        case "full":
            return Disclosed(theme=theme, prompts=tuple(_as_is(prompt) for prompt in prompts))
        case "redacted":
            shown = tuple(_as_is(prompt) if prompt in written else redactor.redact(prompt) for prompt in prompts)
            return Disclosed(theme=_redacted(theme, redactor), prompts=shown)
        case "description":
            _check_written(prompts, written)
            return Disclosed(theme=_redacted(theme, redactor), prompts=tuple(map(_as_is, prompts)))
        case _:
            assert_never(policy)


def _check_written(prompts: Sequence[str], written: Collection[str]) -> None:
    private = sum(prompt not in written for prompt in prompts)
    if private:
        raise DisclosureError(
            f"expected only prompts that the teacher wrote, got {private} others, and the policy is 'description'",
            hint="let the teacher write examples, or allow 'redacted'",
        )


def _as_is(prompt: str) -> Redaction:
    return Redaction(text=prompt, originals={})


def _redacted(theme: Theme, redactor: Redactor) -> Theme:
    def clean(text: str) -> str:
        return redactor.redact(text).text

    return Theme(
        name=clean(theme.name),
        description=clean(theme.description),
        terms=tuple(map(clean, theme.terms)),
        labels=tuple(map(clean, theme.labels)),
    )


__all__ = ["Disclosed", "Policy", "disclosed"]
