"""Checks of who answers and who is answered: certificate, proof, approval."""

from __future__ import annotations

from datetime import UTC, datetime

from pyarrow import flight

from federation import limits, wire
from federation.conformance.checks import check
from federation.conformance.subject import Failed, NotTested, Subject, brief
from federation.credentials import node_of
from federation.handshake import PROOF_HEADER, certificate_at, proof
from federation.peer import shown_id
from registry.identity import Identity

_SECTION = "Who is who"


@check(_SECTION, "over TLS 1.3 a node's certificate: key, CA:FALSE, name, extension, validity", secured=True)
def certificate(subject: Subject) -> str:
    """Also what the others need to connect."""
    shown = certificate_at(subject.host, subject.port, timeout_s=limits.CONFORMANCE_TIMEOUT_S)
    subject.node_id = node_of(shown, now=datetime.now(UTC))
    subject.certificate = shown
    return f"node {shown_id(subject.node_id)}"


@check(_SECTION, "a call without a proof is UNAUTHENTICATED", certificate, secured=True)
def no_proof(subject: Subject) -> str:
    """Not even `health` is answered."""
    return _unauthenticated(subject, [])


@check(_SECTION, "a call with a proof for another certificate is UNAUTHENTICATED", certificate, secured=True)
def false_proof(subject: Subject) -> str:
    """A proof that was heard elsewhere is worth nothing."""
    return _unauthenticated(subject, [(PROOF_HEADER, proof(Identity.generate(), b"another server's"))])


@check(_SECTION, "a call with a proof of another length is UNAUTHENTICATED", certificate, secured=True)
def cut_proof(subject: Subject) -> str:
    """A true one, less its last byte."""
    if subject.identity is None:
        raise NotTested("nobody asks")
    return _unauthenticated(subject, [(PROOF_HEADER, proof(subject.identity, subject.certificate)[:-1])])


@check(_SECTION, "Flight's own Handshake is refused", certificate, secured=True)
def handshake(subject: Subject) -> str:
    """Nobody logs in."""
    subject.refused(lambda: subject.channel.authenticate_basic_token("nobody", "nothing"), "Handshake")
    return "refused"


@check(
    _SECTION,
    "a caller that is not approved is PERMISSION_DENIED with not-approved, except health",
    certificate,
    secured=True,
)
def approval(subject: Subject) -> str:
    """Only a caller that waits can see it."""
    try:
        subject.action(wire.ACTION_CHANGES, b'{"index_id":null,"since":0}')
    except flight.FlightUnauthorizedError as error:
        subject.errors.append(str(error))
        if error.extra_info != wire.NOT_APPROVED:
            raise Failed(f"PERMISSION_DENIED with {error.extra_info!r:.40}: {brief(error)}") from error
        return "refused with not-approved"
    raise NotTested("this node is answered there: it is approved, or the server is open")


def _unauthenticated(subject: Subject, headers: list[tuple[bytes, bytes]]) -> str:
    error = subject.refused(lambda: subject.action(wire.ACTION_HEALTH, headers=headers), "health")
    if not isinstance(error, flight.FlightUnauthenticatedError):
        raise Failed(f"{type(error).__name__}: {brief(error)}")
    return "UNAUTHENTICATED"


CHECKS = (certificate, no_proof, false_proof, cut_proof, handshake, approval)

__all__ = ["CHECKS", "certificate"]
