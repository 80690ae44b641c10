from __future__ import annotations

import pytest

from federation.condition import Condition
from federation.errors import FederationError, IdentityError, NotApprovedError, PeerUnreachableError, TransferError


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (NotApprovedError("x"), "pending"),
        (PeerUnreachableError("x"), "unreachable"),
        (TransferError("x"), "unreachable"),
        (IdentityError("x"), "refused"),
    ],
)
def test_what_a_failure_is_called(error: FederationError, word: str) -> None:
    assert str(Condition.after(error)) == word
