"""Our own server keeps to the protocol; one that breaks one statement of it fails that check and no other."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from federation import server, wire
from federation.conformance.checks import Outcome
from federation.conformance.run import CHECKS, Report, examine
from federation.credentials import Credentials
from federation.server import LoRAFlightServer
from registry.identity import Identity
from registry.store import Registry
from tests.federation.certificates import made
from tests.federation.defects import PLAIN, SECURED, any_card, offer_with, replaced, unexplained
from tests.registry.cards import module_shapes, small_card


@pytest.fixture(scope="module")
def stocked(tmp_path_factory: pytest.TempPathFactory, empty_home: Path) -> Iterator[Registry]:
    """A registry for servers that give an opportunity to test everything."""
    home = tmp_path_factory.mktemp("conformance") / "home"
    shutil.copytree(empty_home, home)
    with Registry.open(home) as registry:
        for card in (small_card("poet"), small_card("gone"), small_card("poet", version="2", seed=3)):
            registry.publish(card)
        registry.publish(small_card("large", modules=module_shapes(3, d_in=1 << 17, d_out=8)))
        registry.publish(small_card("other"))
        registry.remove("gone")
        yield registry


def served(registry: Registry, *, secured: bool = False, **options: Any) -> LoRAFlightServer:
    credentials = Credentials.of(registry.identity) if secured else None
    return LoRAFlightServer(
        registry, **({"node_id": registry.identity.id, "name": "theirs", "credentials": credentials} | options)
    )


def examined(running: LoRAFlightServer, *, secured: bool = False) -> Report:
    return examine(f"127.0.0.1:{running.port}", Identity.generate() if secured else None)


def named(report: Report, outcome: Outcome) -> set[str]:
    return {found.name for found in report.findings if found.outcome is outcome}


def test_our_own_server_passes_every_check(stocked: Registry) -> None:
    with served(stocked, secured=True) as running:
        open_to_all = examined(running, secured=True)
    with served(stocked, secured=True, host="0.0.0.0") as running:
        strict = examined(running, secured=True)
    assert open_to_all.ok
    assert named(open_to_all, Outcome.NOT_TESTED) == {"approval"}
    assert not strict.failed
    assert "approval" in named(strict, Outcome.PASSED)
    assert open_to_all.node_id == strict.node_id == stocked.identity.id


def test_a_node_that_waits_for_approval_is_told_so_and_is_not_content(stocked: Registry) -> None:
    with served(stocked, secured=True, host="0.0.0.0") as running:
        report = examined(running, secured=True)
    assert not report.ok
    assert "is pending" in (report.refusal or "")
    assert "it does not answer this node" in {found.got for found in report.findings}


def test_plaintext_is_tested_but_for_tls(stocked: Registry) -> None:
    with served(stocked) as running:
        report = examined(running)
    assert report.ok
    assert named(report, Outcome.NOT_TESTED) == {check.name for check in CHECKS if check.secured}


def test_nothing_is_changed_by_it(stocked: Registry) -> None:
    before = stocked.changes(), sorted(stocked.digests())
    with served(stocked) as running:
        examined(running)
    assert (stocked.changes(), sorted(stocked.digests())) == before


def test_an_empty_server_is_tested_as_far_as_it_goes(theirs: Registry) -> None:
    with served(theirs) as running:
        report = examined(running)
    assert report.ok
    assert "publish" in next(found.got for found in report.findings if found.name == "manifest")


def test_nobody_there() -> None:
    report = examine("127.0.0.1:1", None)
    assert {found.name for found in report.failed} == {"health"}
    assert not report.ok


def test_another_program_that_speaks_tls_or_none(stocked: Registry) -> None:
    with served(stocked) as running:
        report = examined(running, secured=True)
    assert {found.name for found in report.failed} == {"certificate"}


def test_names_are_unique() -> None:
    names = [check.name for check in CHECKS]
    assert len(set(names)) == len(names) > 40


@pytest.mark.parametrize("defect", PLAIN)
def test_a_defect_fails_its_check_and_no_other(stocked: Registry, monkeypatch: pytest.MonkeyPatch, defect: str) -> None:
    expected, patch = PLAIN[defect]
    patch(monkeypatch, stocked)
    with served(stocked) as running:
        report = examined(running)
    assert {found.name: found.got for found in report.failed}.keys() == {expected}


def test_malformed_requests_for_cards_that_are_answered(stocked: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    any_card(monkeypatch, stocked)
    with served(stocked) as running:
        report = examined(running)
    assert {found.name for found in report.failed} == {"manifest-malformed", "tensors-malformed"}


def test_an_entry_that_is_too_large(stocked: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    offer_with(examples=("x" * 70_000,))(monkeypatch, stocked)
    replaced(wire, "_fitted", lambda old, entry: json.dumps(dataclasses.asdict(entry)).encode())(monkeypatch, stocked)
    with served(stocked) as running:
        report = examined(running)
    assert {found.name for found in report.failed} == {"entry-sizes"}


@pytest.mark.parametrize("defect", SECURED)
def test_a_defect_of_identity_fails_its_check_and_no_other(
    stocked: Registry, monkeypatch: pytest.MonkeyPatch, defect: str
) -> None:
    expected, patch = SECURED[defect]
    patch(monkeypatch, stocked)
    with served(stocked, secured=True) as running:
        report = examined(running, secured=True)
    assert {found.name: found.got for found in report.failed}.keys() == {expected}


def test_a_refusal_that_does_not_say_why(stocked: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    replaced(server.Doorman, "check", unexplained)(monkeypatch, stocked)
    with served(stocked, secured=True, host="0.0.0.0") as running:
        report = examined(running, secured=True)
    assert {found.name for found in report.failed} == {"approval"}


@pytest.mark.parametrize(
    "wrong", [{"authority": True}, {"names": ("node.example",)}, {"bound": b"x" * 96}], ids=["authority", "name", "key"]
)
def test_a_certificate_that_is_no_node_s(stocked: Registry, wrong: dict[str, Any]) -> None:
    shown = made(**wrong)
    credentials = Credentials(identity=stocked.identity, certificate=shown.certificate, private_key=shown.private_key)
    with served(stocked, credentials=credentials) as running:
        report = examined(running, secured=True)
    assert {found.name for found in report.failed} == {"certificate"}


def test_every_check_has_a_defect() -> None:
    tested = {expected for expected, _ in [*PLAIN.values(), *SECURED.values()]}
    alone = {"certificate", "approval", "entry-sizes", "manifest-malformed", "tensors-malformed"}
    assert tested | alone == {check.name for check in CHECKS}
