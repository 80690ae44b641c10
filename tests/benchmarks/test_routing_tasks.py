"""The end-task benchmark: how choices are judged, what its batches teach, and that its stages leave the base alone."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from arrowmoe.routing.dataset import RoutingExample
from arrowmoe.routing.training import IGNORED, Stage1, Stage2
from benchmarks import routing_stages
from benchmarks.routing_adapters import Expert
from benchmarks.routing_stages import Settings, batch_of, staged
from benchmarks.routing_tasks import Asked, drawn, gates_of, judged, largest_share, targets
from tests.arrowmoe import tiny

NAMES = ("east", "west")
WORDS = {"east": range(3, 30), "west": range(30, 60)}
SHORT = Settings(
    layer=1,
    shots=8,
    validation=2,
    batch_size=4,
    stage1=Stage1(steps=20),
    stage2=Stage2(steps=2, kl_weight=0.1),
    planted=15.0,
    rescue=Stage2(steps=2, balance_weight=3.0),
)


@pytest.fixture
def experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Expert]:
    """Two random adapters of the tiny model, each for a half of the words."""
    monkeypatch.setattr("benchmarks.routing_adapters.FORM", "{text}")
    engine = tiny.llama_engine()

    def rows(name: str) -> tuple[RoutingExample, ...]:
        return tuple(RoutingExample(text=f"w{word} w{word}", card=name, answer="w3 w4") for word in WORDS[name])

    return [
        Expert(
            card=tiny.card_for(engine, tmp_path, name, seed),
            domain=name,
            train=rows(name),
            val=rows(name),
            test=rows(name),
        )
        for seed, name in enumerate(NAMES)
    ]


def test_every_expert_gives_as_many_different_rows(experts: list[Expert]) -> None:
    asked = drawn(experts, 5)
    assert asked.expected.tolist() == [0] * 5 + [1] * 5
    assert len({row.text for row in asked.rows}) == 10
    assert asked.rows == drawn(experts, 5).rows


def test_the_expert_with_the_greatest_score_answers(experts: list[Expert]) -> None:
    asked = drawn(experts, 2)  # east, east, west, west
    right = np.array([[True, False], [False, True], [False, True], [False, False]])
    scores = np.array([[2.0, 1.0], [0.1, 0.2], [-3.0, -2.0], [5.0, 4.0]])
    assert judged(asked, right, scores) == {"routed": 50.0, "exact_match": 75.0}
    assert largest_share(np.array([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [1.0, 0.0]])) == 0.75


def test_gates_carry_the_experts_own_digests(experts: list[Expert]) -> None:
    gates = gates_of(drawn(experts, 1), np.array([[0.25, 0.75], [1.0, 0.0]]))
    assert gates.attribution(0) == {"east": 0.25, "west": 0.75}
    assert gates.adapters == tuple(expert.card.digest for expert in experts)


def test_targets_are_missed_where_they_should_be() -> None:
    figures = {
        "tasks": {"closed form": {"of_oracle": 96.0}},
        "ablation": {"Stage 1": {"exact_match": 80.0}, "Stage 2": {"exact_match": 79.0}},
        "collapse": {"planted": {"largest_share": 100.0}, "balanced": {"largest_share": 90.0}},
    }
    assert [target.met for target in targets(figures)] == [False, False, True, False]


def test_a_batch_teaches_the_answer_and_its_end_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.routing_adapters.FORM", "{text}")
    rows = [RoutingExample(text="w5 w6 w7", card=None, answer="w8"), RoutingExample(text="w5", card=None, answer="w9")]
    batch = batch_of(tiny.llama_engine().base, rows)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 1], [5, 9, 1, 0, 0]]
    assert batch.labels.tolist() == [[IGNORED] * 3 + [8, 1], [IGNORED, 9, 1, IGNORED, IGNORED]]
    assert batch.prompt_mask.tolist() == [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]


def test_stages_leave_the_base_as_it_was_and_say_what_they_did(experts: list[Expert]) -> None:
    base = tiny.llama_engine().base
    before = copy.deepcopy(base.model.state_dict())
    prompts = Asked(experts=experts, rows=experts[0].test).prompts
    found = staged(base, experts, prompts, SHORT)
    after = base.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {logits.shape for logits in found.logits.values()} == {(len(prompts), 2)}
    assert largest_share(found.collapse["planted"]) == 1.0
    assert not np.array_equal(found.logits["Stage 1"], found.logits["Stage 2"])
    assert not np.array_equal(found.collapse["balanced"], found.collapse["unbalanced"])


def test_without_steps_worth_keeping_stage_2_is_stage_1(experts: list[Expert], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing_stages._Lab, "collapse", lambda _: {})
    still = replace(SHORT, stage2=Stage2(steps=2, learning_rate=0.0))
    found = staged(tiny.llama_engine().base, experts, ["w5 w5"], still)
    assert np.array_equal(found.logits["Stage 1"], found.logits["Stage 2"])
