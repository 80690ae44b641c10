"""The exam: who is asked what with which card, how answers are marked, and that nothing is asked twice or dropped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from evolution.evaluation import Exam, Examiner, matches, mentions, nearest_is_right
from evolution.gate import Bars, judge, judge_drift
from evolution.protocols import Cover, Example, Floats, Kind, Reply, Use, Uses, Vectors
from registry.card import LoRACard
from tests.registry.cards import small_card

CARD = small_card("candidate")
OLD = "blake3:" + "0" * 64


def skill(use: Use | None) -> str:
    """Who answers: "base", "old", or "new" with its scale."""
    if use is None:
        return "base"
    return "old" if isinstance(use.card, str) else f"new {use.scale:g}"


@dataclass
class Puppet:
    """A student that says what it was told to, by prompt and skill."""

    script: Mapping[tuple[str, str], str]
    kind: Kind = "causal"
    base: str = "puppet"
    asked: list[tuple[str, str]] = field(default_factory=list)
    calls: int = 0

    def answer(
        self,
        prompts: Sequence[str],
        uses: Uses,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> list[Reply]:
        assert temperature == 0
        self.calls += 1
        asked = [(prompt, skill(use)) for prompt, use in zip(prompts, uses, strict=True)]
        self.asked += asked
        return [Reply(text=self.script.get(key, "?"), tokens=1, sequence_nats=1.0) for key in asked]

    def losses(self, examples: Sequence[Example], uses: Uses) -> Floats:
        nats = {"base": 2.0, "old": 1.5, "new 1": 3.0, "new 0.5": 2.5}
        assert len(examples) == len(uses)
        return np.array([nats[skill(use)] for use in uses])

    def divergences(self, examples: Sequence[Example], uses: Uses) -> Floats:
        return np.array([0.0 if use is None else use.scale for use in uses])

    def encode(self, texts: Sequence[str], uses: Uses) -> Vectors:
        angles = [float(self.script.get((text, skill(use)), "0")) for text, use in zip(texts, uses, strict=True)]
        return np.array([[np.cos(angle), np.sin(angle)] for angle in angles], dtype=np.float32)


@dataclass
class Signposts:
    """Routes by the first letter: o to the old card, n to the candidate, v to a card at a peer; else to none."""

    embedder: str = "letters"
    calls: int = 0

    def features(self, texts: Sequence[str]) -> Vectors:
        raise AssertionError("an exam asks for decisions only")

    def covers(self, texts: Sequence[str], *, base: str, candidate: LoRACard | None = None) -> list[Cover]:
        assert base == "puppet"
        assert len(texts) == len(set(texts))
        self.calls += 1
        digests = {"o": OLD, "v": "blake3:" + "f" * 64, "x": OLD} | ({"n": candidate.digest} if candidate else {})
        return [
            Cover(accepted=text[0] != "x", digest=digests.get(text[0]), virtual=text[0] == "v")
            if text[0] in digests
            else Cover(accepted=False)
            for text in texts
        ]

    def describe(self, card: LoRACard, prompts: Sequence[str], held_out: Sequence[str]) -> LoRACard:
        raise AssertionError("an exam changes no card")


def examples(*rows: tuple[str, str]) -> tuple[Example, ...]:
    return tuple(Example(prompt=prompt, answer=answer) for prompt, answer in rows)


ITEMS = examples(("n1", "yes"), ("n2", "yes"), ("o1", "yes"), ("x1", "yes"), ("v1", "yes"))
FACTS = examples(("o2", "Rome"), ("n3", "Bern"), ("z1", "Oslo"))
TEXTS = examples(("o3", "some words"), ("n4", "some words"), ("z2", "some words"))
SCRIPT = {
    ("n1", "new 1"): "YES.",
    ("n2", "new 1"): "yes, it is",
    ("o1", "old"): "yes",
    ("o1", "new 1"): " Yes ",
    ("x1", "base"): "yes",
    ("v1", "base"): "yes",
    ("o2", "old"): "It is Rome. Or Paris.",
    ("n3", "base"): "bern!",
    ("z1", "base"): "The answer is Oslo",
    ("z1", "new 1"): "Oslo",
}


def test_each_arm_answers_with_its_own_card() -> None:
    exam = Exam(items=ITEMS, anchors={"facts": FACTS}, texts=TEXTS)
    found = Examiner(Puppet(SCRIPT), Signposts(), exam).measure(CARD)
    assert found.base.tolist() == [False, False, False, True, True]
    assert found.incumbent.tolist() == [False, False, True, True, True]
    assert found.candidate.tolist() == [True, False, True, False, False]
    assert found.routed.tolist() == [True, True, False, False, False]
    facts = found.anchors["facts"]
    assert facts.base.tolist() == [False, True, True]
    assert facts.today.tolist() == [True, True, True]
    assert facts.served.tolist() == [True, False, True]
    assert facts.applied.tolist() == [False, False, True]
    assert found.losses is not None
    assert found.losses.base.tolist() == [2.0, 2.0, 2.0]
    assert found.losses.today.tolist() == [1.5, 2.0, 2.0]
    assert found.losses.served.tolist() == [1.5, 3.0, 2.0]
    assert found.losses.applied.tolist() == [3.0, 3.0, 3.0]
    assert found.losses.kl.tolist() == [1.0, 1.0, 1.0]
    assert found.scale == 1.0


def test_another_scale_asks_only_the_candidate_again() -> None:
    student, routes = Puppet(SCRIPT), Signposts()
    examiner = Examiner(student, routes, Exam(items=ITEMS, anchors={"facts": FACTS}, texts=TEXTS))
    examiner.measure(CARD)
    assert len(student.asked) == len(set(student.asked))
    student.asked.clear()
    found = examiner.measure(CARD, 0.5)
    assert {who for _, who in student.asked} == {"new 0.5"}
    assert sorted(prompt for prompt, _ in student.asked) == sorted(item.prompt for item in ITEMS + FACTS)
    assert routes.calls == 2
    assert found.scale == 0.5
    assert found.base.tolist() == [False, False, False, True, True]


def test_items_that_stand_twice_are_counted_twice() -> None:
    found = Examiner(Puppet(SCRIPT), Signposts(), Exam(items=(*ITEMS, *ITEMS))).measure(CARD)
    assert len(found.candidate) == 10
    assert found.losses is not None
    assert len(found.losses.base) == 0


@pytest.mark.parametrize("kind", ["causal", "encoder"])
def test_a_peer_examines_for_drift_alone(kind: Kind) -> None:
    facts = examples(*((f"z{index}", "yes") for index in range(60)))
    script = {(fact.prompt, "base"): "0.1" if kind == "encoder" else "Yes." for fact in facts}
    script |= {(fact.prompt, "new 1"): "3" for fact in facts[:20]} if kind == "causal" else {}
    found = Examiner(Puppet(script, kind=kind), Signposts(), Exam(items=(), anchors={"facts": facts})).measure(CARD)
    assert len(found.candidate) == 0
    bars = Bars(alpha=0.05)
    assert [reason for reason in judge(found, bars).too_few if "held-out items, got 0" in reason]
    alone = judge_drift(replace(found, losses=None), bars)
    assert alone.accepted is (kind == "encoder")
    assert alone.tested


def test_an_encoder_is_marked_by_nearest_labels_and_others_are_routed_around_it_exactly() -> None:
    items = examples(("n1", "a"), ("n2", "a"), ("n3", "b"), ("n4", "b"))
    others = examples(("z1", "c"), ("z2", "c"), ("z3", "d"), ("z4", "d"))
    angles = {"n1": "0", "n2": "1", "n3": "0.1", "n4": "1.1"}
    learned = {"n1": "0", "n2": "0.1", "n3": "1", "n4": "1.1"}
    around = {"z1": "0", "z2": "0.1", "z3": "1", "z4": "0.15"}
    script = {(text, "base"): angle for text, angle in (angles | around).items()}
    script |= {(text, "new 1"): angle for text, angle in learned.items()}
    student = Puppet(script, kind="encoder")
    found = Examiner(student, Signposts(), Exam(items=items, anchors={"others": others})).measure(CARD)
    assert found.base.tolist() == [False] * 4
    assert found.candidate.tolist() == [True] * 4
    assert found.losses is None
    kept = found.anchors["others"]
    assert kept.served.tolist() == kept.today.tolist() == [True, False, True, False]


def test_nearest_labels_are_those_of_a_loop_that_leaves_each_text_out() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(30, 5)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    items = examples(*((f"text {index}", "abc"[index % 3]) for index in range(30)))
    expected = []
    for index, item in enumerate(items):
        nearest = max((other for other in range(30) if other != index), key=lambda other: rows[index] @ rows[other])
        expected.append(items[nearest].answer == item.answer)
    assert nearest_is_right(items, rows, items, rows).tolist() == expected
    assert nearest_is_right(items[:1], rows[:1], items[:1], rows[:1]).tolist() == [False]


@pytest.mark.parametrize(
    ("wanted", "got", "same"),
    [
        ("Paris", "  paris.\n", True),
        ("two  words", "Two words", True),
        ("ﬁne", "fine", True),
        ("2021-03-04", "2021-03-04.", True),
        ("2021-03-04", "The date is 2021-03-04", False),
        ("3.5", "35", False),
        ("Paris", "", False),
    ],
)
def test_a_match_forgives_case_space_and_a_full_stop(wanted: str, got: str, same: bool) -> None:
    assert matches(wanted, got) is same


@pytest.mark.parametrize(
    ("wanted", "got", "held"),
    [
        ("Paris", "The capital of France is Paris.", True),
        ("Addis Ababa", "It's Addis Ababa!", True),
        ("42", "27 + 15 = 42", True),
        ("4", "27 + 15 = 42", False),
        ("Yes", "Yes, it does. No doubt.", True),
        ("No", "Yes, it does. No doubt.", False),
        ("No", "Nobody knows", False),
        ("Oslo", "Hm?\nOslo", False),
        ("Oslo", "", False),
    ],
)
def test_an_anchor_is_known_if_the_first_sentence_holds_it(wanted: str, got: str, held: bool) -> None:
    assert mentions(wanted, got) is held
