from __future__ import annotations

import pytest

from arrowmoe.settings import TrustSettings, load
from arrowmoe.trust import policy_of
from federation.admission import Policy


@pytest.mark.parametrize(("open", "expected"), [(True, "accept"), (False, "quarantine")])
def test_strangers_are_heard_where_everybody_is_answered(open: bool, expected: str) -> None:
    assert policy_of(TrustSettings(), open=open).unknown_publishers == expected
    assert policy_of(TrustSettings(unknown_publishers="refuse"), open=open).unknown_publishers == "refuse"


def test_the_defaults_are_the_policys_own() -> None:
    assert policy_of(TrustSettings(), open=False) == Policy()


def test_units_and_lists_come_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARROWMOE_TRUST__LICENCES", "MIT, Apache-2.0")
    monkeypatch.setenv("ARROWMOE_TRUST__QUOTA_GIB", "0.5")
    policy = policy_of(load().settings.trust, open=False)
    assert (policy.licences, policy.quota_bytes) == (("MIT", "Apache-2.0"), 1 << 29)
