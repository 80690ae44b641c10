"""Experts that have stood go into the slow card, if it holds; what does not hold is taken back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from evolution import seasoning
from evolution.errors import JobError
from evolution.evaluation import Results
from evolution.examples import write_examples
from evolution.gate import Bars
from evolution.journal import Job
from evolution.protocols import Example
from evolution.recipe import Recipe
from evolution.seasoning import Seasoning, judge_kept
from evolution.signals import Signal
from evolution.slow_cards import SlowCards
from evolution.survey import PUBLISHED
from evolution.workspace import Workspace
from registry.card import LoRACard
from registry.tensor import Role
from tests.evolution.nights import BASE, TWO_O_CLOCK, Home, Make, answers, gold
from tests.peft_models import make_peft, tiny_llama

WEEK = Seasoning(days=7)


@pytest.fixture(scope="module")
def peft(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    directory = tmp_path_factory.mktemp("peft")
    for seed in (1, 2, 3):
        make_peft(tiny_llama(), directory / str(seed), seed=seed, r=4)
    return {seed: directory / str(seed) for seed in (1, 2, 3)}


@pytest.fixture
def stand(peft: dict[int, Path]) -> Callable[..., LoRACard]:
    """An expert that a night has grown just now, as it would leave it."""

    def stood(home: Home, topic: str, seed: int, *, exam: int = 40) -> LoRACard:
        name = f"question-{topic}"
        version = home.registry.next_version(name)
        card = LoRACard.from_peft(peft[seed], name=name, version=version, base_name=BASE, domains=[topic])
        entry = home.registry.publish(card)
        theme = {"name": name, "description": "", "terms": [], "labels": []}
        row = {"base": BASE, "name": name, "theme": theme, "size": 30, "worth": 1.0, "state": "growing", "why": ""}
        gap = home.journal.enter_gap(None, row)
        home.journal.settle_gap(gap, PUBLISHED, "published", card=entry.digest)
        home.journal.enqueue(f"grown-{gap}", "grow", BASE, spec={"gap": gap})
        job = home.journal.claim(keys=f"grown-{gap}")
        assert job is not None
        work = Workspace.of(home.registry.home, job.id).make()
        write_examples(work.held_out, gold(exam, topic=topic))
        write_examples(work.training, gold(60, topic=topic, first=5000))
        home.journal.finish(job, card=entry.digest)
        return home.registry.get(entry.digest)

    return stood


Stand = Callable[..., LoRACard]


def season(home: Home) -> dict[str, Any]:
    """What a night's job would do now."""
    assert home.seasoner.has_work(BASE)
    job = job_of(home)
    told = home.seasoner.season(job)
    home.journal.finish(job, **told)
    return told


def job_of(home: Home) -> Job:
    home.journal.enqueue(f"season-{len(home.journal.jobs())}", "consolidate", BASE, spec={})
    job = home.journal.claim(keys="season-")
    assert job is not None
    return job


def slow_name(home: Home) -> str:
    return f"slow-tiny-{home.registry.identity.id[:8]}"


def changes(card: LoRACard) -> dict[str, npt.NDArray[np.float64]]:
    """ΔW = s B A of each module."""
    spec = card.manifest.adapter
    return {
        module: spec.scaling_of(module) * (tensors[Role.B].float32().astype(float) @ tensors[Role.A].float32())
        for module, tensors in card.modules.items()
        if Role.A in tensors
    }


def judged(home: Home, card: str, good: int, bad: int) -> None:
    verdicts = ["good"] * good + ["bad"] * bad
    home.signals.record_all(
        [Signal(base=BASE, prompt=f"p{n}", accepted=True, card=card, feedback=one) for n, one in enumerate(verdicts)]
    )


def test_nothing_is_consolidated_unless_the_owner_wants_it(make: Make, stand: Stand) -> None:
    home = make()
    stand(home, "velmora", 1)
    home.clock.pass_(days=100)
    assert not home.seasoner.has_work(BASE)


def test_an_expert_that_has_stood_goes_into_the_slow_card(make: Make, stand: Stand) -> None:
    home = make(seasoning=WEEK)
    expert = stand(home, "velmora", 1)
    home.clock.pass_(days=6.9)
    assert not home.seasoner.has_work(BASE)
    home.clock.pass_(days=0.2)
    label = f"{slow_name(home)}@1"
    assert season(home) == {"taken_back": [], "consolidated": {"question-velmora": label}}
    slow = home.registry.get(label, verify=True)
    assert slow.signature is not None
    assert slow.manifest.parents == (expert.digest,)
    assert slow.base_name == BASE
    assert slow.manifest.domains == ("velmora",), "the router may choose it"
    kept = slow.manifest.evaluation["consolidation"]["experts"]["question-velmora"]
    assert (kept["items"], kept["expert"], kept["slow"]) == (40, 1.0, 1.0)
    for module, change in changes(expert).items():
        np.testing.assert_allclose(changes(slow)[module], change, atol=1e-6)
    assert sorted(home.published()) == ["question-velmora@1", label]
    assert not home.seasoner.has_work(BASE)


def test_one_after_another_they_add_up(make: Make, stand: Stand) -> None:
    home = make(seasoning=WEEK)
    first = stand(home, "velmora", 1)
    home.clock.pass_(days=1)
    second = stand(home, "quandle", 2)
    home.clock.pass_(days=20)
    season(home)
    home.clock.pass_(days=1)
    season(home)
    below, slow = (home.registry.get(f"{slow_name(home)}@{version}") for version in (1, 2))
    assert slow.manifest.parents == (below.digest, second.digest)
    for module, change in changes(slow).items():
        np.testing.assert_allclose(change, changes(first)[module] + changes(second)[module], atol=1e-6)
    assert set(slow.manifest.evaluation["consolidation"]["experts"]) == {"question-velmora", "question-quandle"}


def test_its_rank_is_bounded_and_the_error_is_stated(make: Make, stand: Stand) -> None:
    home = make(seasoning=Seasoning(days=7, rank=5))
    parts = [stand(home, topic, seed) for topic, seed in (("velmora", 1), ("quandle", 2))]
    home.clock.pass_(days=20)
    season(home)
    home.clock.pass_(days=1)
    season(home)
    slow = home.registry.get(slow_name(home))
    wanted = {module: sum(changes(part)[module] for part in parts) for module in changes(slow)}
    missed = sum(float(np.sum((wanted[module] - change) ** 2)) for module, change in changes(slow).items())
    total = sum(float(np.sum(change**2)) for change in wanted.values())
    assert slow.manifest.adapter.rank == 5
    assert slow.manifest.training["merge"]["error"] == pytest.approx(np.sqrt(missed / total), rel=1e-4)


def test_a_later_expert_of_a_name_replaces_the_one_before(make: Make, stand: Stand) -> None:
    home = make(seasoning=WEEK)
    stand(home, "velmora", 1)
    home.clock.pass_(days=8)
    season(home)
    newer = stand(home, "velmora", 2)
    home.clock.pass_(days=8)
    season(home)
    slow = home.registry.get(f"{slow_name(home)}@2")
    for module, change in changes(newer).items():
        np.testing.assert_allclose(changes(slow)[module], change, atol=1e-5)


def test_taking_it_back_serves_the_one_before_bit_for_bit(make: Make, stand: Stand) -> None:
    home = make(seasoning=WEEK)
    for topic, seed in (("velmora", 1), ("quandle", 2)):
        stand(home, topic, seed)
    home.clock.pass_(days=20)
    season(home)
    before = home.registry.get(slow_name(home))
    path = home.registry.path_of(before.digest)
    bits = path.read_bytes()
    home.clock.pass_(days=1)
    season(home)
    cards = SlowCards(home.registry, home.journal, now=home.clock.now)
    assert cards.take_back(BASE, "no reason").label == f"{slow_name(home)}@2"
    now = home.registry.get(slow_name(home))
    assert (now.digest, path.read_bytes()) == (before.digest, bits)
    assert set(cards.of(BASE).held) == {"question-velmora"}
    assert "question-quandle@1" in home.published()
    home.clock.pass_(days=100)
    assert not home.seasoner.has_work(BASE), "what its owner took back is not put in again"
    cards.take_back(BASE, "no reason")
    with pytest.raises(JobError, match="nothing to take back"):
        cards.take_back(BASE, "no reason")


def test_no_version_is_given_twice(make: Make, stand: Stand) -> None:
    home = make(seasoning=WEEK)
    stand(home, "velmora", 1)
    home.clock.pass_(days=8)
    season(home)
    SlowCards(home.registry, home.journal).take_back(BASE, "no reason", may_return=True)
    season(home)
    assert f"{slow_name(home)}@2" in home.published()


def test_one_whose_expert_is_gone_is_taken_back_and_those_above_return(make: Make, stand: Stand) -> None:
    home = make(seasoning=WEEK)
    first = stand(home, "velmora", 1)
    second = stand(home, "quandle", 2)
    home.clock.pass_(days=20)
    season(home)
    home.clock.pass_(days=1)
    season(home)
    home.registry.remove(first.digest)
    home.clock.pass_(days=1)
    told = season(home)
    assert told["taken_back"] == [f"{slow_name(home)}@2", f"{slow_name(home)}@1"]
    assert told["consolidated"] == {"question-quandle": f"{slow_name(home)}@3"}
    assert home.registry.get(slow_name(home)).manifest.parents == (second.digest,)


def test_one_that_people_find_bad_is_taken_back(make: Make, stand: Stand) -> None:
    home = make(seasoning=WEEK)
    stand(home, "velmora", 1)
    home.clock.pass_(days=8)
    season(home)
    judged(home, home.registry.get(slow_name(home)).digest, good=6, bad=4)
    assert not home.seasoner.has_work(BASE)
    judged(home, home.registry.get(slow_name(home)).digest, good=0, bad=12)
    assert season(home)["taken_back"] == [f"{slow_name(home)}@1"]
    assert home.published() == ["question-velmora@1"]


def test_one_that_somebody_removed_is_no_more_on_the_stack(make: Make, stand: Stand) -> None:
    home = make(seasoning=WEEK)
    stand(home, "velmora", 1)
    home.clock.pass_(days=8)
    season(home)
    home.registry.remove(slow_name(home))
    home.clock.pass_(days=100)
    assert SlowCards(home.registry, home.journal).of(BASE).layers == ()
    assert not home.seasoner.has_work(BASE)


@pytest.mark.parametrize(("good", "bad", "due"), [(0, 0, True), (5, 4, True), (3, 6, False)])
def test_one_whose_verdicts_leave_a_doubt_waits(make: Make, stand: Stand, good: int, bad: int, due: bool) -> None:
    home = make(seasoning=WEEK)
    judged(home, stand(home, "velmora", 1).digest, good, bad)
    home.clock.pass_(days=8)
    assert home.seasoner.has_work(BASE) == due


@pytest.mark.parametrize("reason", ["withdrawn", "removed", "an older version"])
def test_only_what_is_served_is_consolidated(make: Make, stand: Stand, reason: str) -> None:
    home = make(seasoning=WEEK)
    card = stand(home, "velmora", 1)
    home.clock.pass_(days=8)
    if reason == "withdrawn":
        [gap] = home.journal.gaps()
        home.journal.settle_gap(gap.id, "withdrawn", "bad", card=card.digest)
    elif reason == "removed":
        home.registry.remove(card.digest)
    else:
        stand(home, "velmora", 2)
    assert not home.seasoner.has_work(BASE)


def forgetful(card: LoRACard | None, prompt: str) -> str:
    """As if adding them up had cost what they knew."""
    return answers(card if card is None or not card.name.startswith("slow-") else None, prompt)


def unlearning(card: LoRACard | None, prompt: str) -> str:
    """Everybody knows the anchors, but a slow card."""
    if not prompt.startswith("anchor"):
        return answers(card, prompt)
    return "no" if card is not None and card.name.startswith("slow-") else "yes"


def stale(card: LoRACard | None, prompt: str) -> str:
    return "no"


ANCHORED = Recipe(anchors={"own": tuple(Example(prompt=f"anchor {n}", answer="yes") for n in range(80))})


@pytest.mark.parametrize(
    ("says", "why"),
    [
        (forgetful, "exam of question-velmora, applied: fell by 100.0 points"),
        (unlearning, "anchor own, applied: fell by 100.0 points"),
        (stale, "its exam, taken again: against base: 0 gained"),
    ],
)
def test_what_would_not_hold_is_said_and_tried_again_later(
    make: Make, stand: Stand, says: Callable[..., str], why: str
) -> None:
    home = make(seasoning=WEEK, says=says, recipe=ANCHORED)
    stand(home, "velmora", 1)
    home.clock.pass_(days=8)
    assert why in season(home)["not_consolidated"]["question-velmora"]
    assert home.published() == ["question-velmora@1"]
    home.clock.pass_(days=6)
    assert not home.seasoner.has_work(BASE)
    home.clock.pass_(days=2)
    assert home.seasoner.has_work(BASE)


def test_without_its_exam_nothing_can_be_told(make: Make, stand: Stand) -> None:
    home = make(seasoning=WEEK)
    stand(home, "velmora", 1)
    for file in (home.registry.home / "nights").rglob("held-out.jsonl"):
        file.unlink()
    home.clock.pass_(days=8)
    assert "expected the exam of question-velmora" in season(home)["not_consolidated"]["question-velmora"]


def test_too_few_items_tell_nothing(make: Make, stand: Stand) -> None:
    home = make(seasoning=WEEK)
    stand(home, "velmora", 1, exam=10)
    home.clock.pass_(days=8)
    assert "too few to tell" in season(home)["not_consolidated"]["question-velmora"]


@pytest.mark.parametrize("where", ["before", "after"])
def test_one_that_was_killed_as_it_published_publishes_once(
    make: Make, stand: Stand, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    home = make(seasoning=WEEK)
    stand(home, "velmora", 1)
    home.clock.pass_(days=8)
    job, put_on = job_of(home), SlowCards.put_on

    def killed(*given: Any) -> None:
        if where == "after":
            put_on(*given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SlowCards, "put_on", killed)
        with pytest.raises(KeyboardInterrupt):
            home.seasoner.season(job)
    monkeypatch.setattr(seasoning, "merge", lambda *_, **__: pytest.fail("it was made already"))
    home.seasoner.season(job)
    assert sorted(home.published()) == ["question-velmora@1", f"{slow_name(home)}@1"]
    assert len(SlowCards(home.registry, home.journal).of(BASE).layers) == 1


def results(base: list[int], today: list[int], slow: list[int], routed: list[int]) -> Results:
    rows = [np.array(row, dtype=np.bool_) for row in (base, today, slow, routed)]
    return Results(base=rows[0], incumbent=rows[1], candidate=rows[2], routed=rows[3], anchors={}, losses=None)


@pytest.mark.parametrize(
    ("base", "today", "slow", "routed", "reasons"),
    [
        ([0] * 40, [1] * 40, [1] * 40, [1] * 40, []),
        ([0] * 40, [1] * 40, [1] * 38 + [0] * 2, [1] * 40, []),
        ([0] * 40, [1] * 40, [1] * 37 + [0] * 3, [0] * 40, ["applied: fell by 7.5 points"]),
        ([0] * 40, [1] * 40, [1] * 37 + [0] * 3, [1] * 40, ["applied: fell by 7.5", "served: fell by 7.5"]),
        ([1] * 39 + [0], [1] * 40, [1] * 40, [1] * 40, ["may be as low as 0.0"]),
    ],
)
def test_an_exam_is_kept_within_the_margin_and_above_the_base(
    base: list[int], today: list[int], slow: list[int], routed: list[int], reasons: list[str]
) -> None:
    own = np.ones(40, dtype=np.bool_)
    _, found = judge_kept("x", own, results(base, today, slow, routed), Bars(alpha=0.05))
    assert len(found) == len(reasons)
    for reason, wanted in zip(found, reasons, strict=True):
        assert wanted in reason


def test_nights_do_it_after_what_they_grow(make: Make) -> None:
    home = make(seasoning=WEEK)
    home.traffic()
    home.factory.night(TWO_O_CLOCK)
    home.clock.pass_(days=8)
    home.traffic(gap=0, ordinary=3)
    report = home.factory.night(home.clock.at)
    assert report is not None
    assert [job.kind for job in reversed(report.jobs)] == ["survey", "consolidate"]
    said = report.to_json()
    assert said["consolidated"] == {"question-velmora": f"{slow_name(home)}@1"}
    assert (said["published"], said["not_consolidated"], said["taken_back"]) == ([], {}, [])
    assert sorted(home.published()) == ["question-velmora@1", f"{slow_name(home)}@1"]
