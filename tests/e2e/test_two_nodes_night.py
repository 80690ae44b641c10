"""Two real nodes: what one has learned overnight, the other answers with within seconds, by itself."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from arrowmoe.demo import night
from arrowmoe.demo.nodes import NodeProcess, node_process
from arrowmoe.demo.shipped import BASES, family
from registry.store import Registry

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1500)]
WITHIN_S = 10.0


def asked(node: NodeProcess, texts: list[str]) -> list[dict[str, Any]]:
    answers: list[dict[str, Any]] = node.call(
        "generate", prompts=texts, base=BASES["causal"], adapter="auto", max_new_tokens=16
    )
    return answers


def abstained(node: NodeProcess, texts: list[str]) -> float:
    return sum(not one["adapters"] for one in asked(node, texts)) / len(texts)


def is_routed(node: NodeProcess, text: str) -> bool:
    return bool(node.call("route", text=text, base=BASES["causal"])["adapters"])


def test_a_peer_routes_to_a_new_expert_within_ten_seconds_and_is_dissonant_no_more(tmp_path: Path) -> None:
    known, unseen = family("asked")[: night.ASKED], [one.text for one in family("heldout")]
    with night.teacher(tmp_path) as url:
        variables = night.SETTINGS | {"ARROWMOE_TEACHER__BASE_URL": url}
        with node_process("a", tmp_path, bases=(BASES["causal"],), variables=variables) as a:
            peers = {"ARROWMOE_PEERS": a.record.address, "ARROWMOE_ROUTE_TO_OFFERS": "1"}
            with node_process("b", tmp_path, bases=(BASES["causal"],), variables=peers) as b:
                a.wait_for_models()
                b.wait_for_models()
                before = abstained(b, unseen)
                asked(a, [one.text for one in known])
                report = a.call("evolve_run")
                start_s = time.monotonic()
                while not is_routed(b, unseen[0]) and time.monotonic() - start_s < 3 * WITHIN_S:
                    time.sleep(0.2)
                waited_s = time.monotonic() - start_s
                after = abstained(b, unseen)
                answers = [one["text"].strip() for one in asked(b, unseen)]
    assert len(report["nights"][0]["published"]) == 1
    assert before >= 0.9
    assert waited_s <= WITHIN_S
    assert after <= 0.2
    wanted = [one.wanted for one in family("heldout")]
    assert sum(one == other for one, other in zip(answers, wanted, strict=True)) >= 0.8 * len(wanted)
    with Registry.open(tmp_path / "b") as registry:
        assert [entry.name for entry in registry.list()] == [
            name.partition("@")[0] for name in report["nights"][0]["published"]
        ]
