"""Runs the checks against one server, each over a connection of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pyarrow import flight

from federation.conformance import cards, catalog, tables, who
from federation.conformance.checks import Check, Finding, Outcome
from federation.conformance.subject import CALL_ERRORS, NotTested, Subject, brief
from federation.errors import NotApprovedError
from registry.errors import ArrowMoEError
from registry.identity import Identity

CHECKS: tuple[Check, ...] = (*who.CHECKS, *catalog.CHECKS, *cards.CHECKS, *tables.CHECKS)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What became of every check. `refusal`: what the server said if it does not answer this node."""

    address: str
    node_id: str
    findings: tuple[Finding, ...]
    refusal: str | None

    @property
    def failed(self) -> tuple[Finding, ...]:
        """The checks that failed."""
        return tuple(finding for finding in self.findings if finding.outcome is Outcome.FAILED)

    @property
    def ok(self) -> bool:
        """Whether the server answered, and no check failed."""
        return not self.failed and self.refusal is None


def examine(address: str, identity: Identity | None) -> Report:
    """Check the server at ``HOST:PORT``, which changes nothing there, except that an unknown caller waits for approval.

    Without `identity` the line is plaintext, and what is said of TLS is not tested. The server is not thought hostile:
    cards are also read as tables. Raises `FederationError` for what is no address.
    """
    subject = Subject(address, identity)
    run = _Run(subject)
    findings = tuple(run.findings())
    return Report(address=subject.address, node_id=subject.node_id, findings=findings, refusal=run.refusal)


class _Run:
    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._passed: set[Check] = set()
        self.refusal: str | None = None

    def findings(self) -> Iterator[Finding]:
        for check in CHECKS:
            outcome, got = self._outcome(check)
            if outcome is Outcome.PASSED:
                self._passed.add(check)
            yield Finding(name=check.name, section=check.section, expected=check.expected, outcome=outcome, got=got)

    def _outcome(self, check: Check) -> tuple[Outcome, str]:
        plain = self._subject.identity is None
        if check.secured and plain:
            return Outcome.NOT_TESTED, "the line is plaintext"
        lacking = [need.name for need in check.needs if need not in self._passed and not (need.secured and plain)]
        if lacking:
            return Outcome.NOT_TESTED, f"it needs {', '.join(lacking)}"
        try:
            with self._subject.connected():
                return Outcome.PASSED, check.run(self._subject)
        except NotTested as reason:
            return Outcome.NOT_TESTED, str(reason)
        except (flight.FlightUnauthorizedError, NotApprovedError) as error:
            self.refusal = brief(error)
            return Outcome.NOT_TESTED, "it does not answer this node"
        except CALL_ERRORS as error:
            self._subject.errors.append(str(error))
            return Outcome.FAILED, f"{type(error).__name__}: {brief(error)}"
        except ArrowMoEError as error:
            return Outcome.FAILED, brief(error)


__all__ = ["CHECKS", "Report", "examine"]
