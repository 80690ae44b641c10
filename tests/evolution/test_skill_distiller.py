"""From a gap to a card: what leaves on the way, what is held out, a second training, a label that somebody took."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evolution.budget import Budget, Price
from evolution.cloud_distiller import CloudDistiller
from evolution.disclosure import Policy
from evolution.examples import read_examples
from evolution.fakes import ScriptedTeacher
from evolution.loopback_teacher import LoopbackTeacher
from evolution.protocols import Example
from evolution.signals import Signal
from evolution.skill_distiller import Recipe
from evolution.survey import PUBLISHED, REJECTED
from evolution.teacher_audit import TeacherAudit
from evolution.teacher_line import Endpoint
from evolution.training_job import TrainingJob
from registry.card import LoRACard
from registry.entries import CardEntry
from tests.evolution.nights import BASE, LEARNT_NOTHING, TWO_O_CLOCK, Home, Make, gold, prompts, rule
from tests.evolution.test_cloud_distiller import CANARIES


def files(home: Home, name: str) -> list[Example]:
    [path] = (home.registry.home / "nights").rglob(name)
    return read_examples(path)


@pytest.mark.usefixtures("no_leaked_threads")
@pytest.mark.parametrize("policy", ["description", "redacted"])
def test_canaries_never_leave_whatever_the_night_does(make: Make, policy: Policy) -> None:
    private = [f"velmora question {cue} {value} {turn}" for cue, value in CANARIES.items() for turn in range(4)]
    home = make()
    home.traffic(gap=60)
    home.signals.record_all(
        [
            Signal(base=BASE, prompt=one, accepted=False, feedback="bad", correction=f"ask {value}")
            for one, value in zip(private, [value for value in CANARIES.values() for _ in range(4)], strict=True)
            if one.endswith("0")
        ]
        + [Signal(base=BASE, prompt=one, accepted=False) for one in private if not one.endswith("0")]
    )
    budget = Budget(home.registry.database, "night", limit_microusd=10**9, limit_tokens=10**9)
    known = [*gold(200), *gold(60, first=0)]
    with LoopbackTeacher(known, api_key="sesame") as server:
        price = Price(prompt_usd_per_million=1, completion_usd_per_million=1)
        endpoint = Endpoint(model="m", base_url=server.url, api_key="sesame", price=price, timeout_s=10.0)
        with CloudDistiller(endpoint, budget, policy=policy) as teacher:
            home = make(teacher=teacher, recipe=Recipe(asks_prompts=policy == "redacted"))
            report = home.factory.night(TWO_O_CLOCK)
        said = "\n".join(server.requests)
    assert report is not None
    assert len(report.to_json()["published"]) == 1
    assert "velmora" in said
    [gap] = home.journal.gaps()
    assert {one.prompt for one in home.signals.of_gap(gap.id)} >= set(private), "they were there to leave"
    assert ("<EMAIL_1>" in said) == (policy == "redacted")
    calls = str(TeacherAudit(home.registry.database, "night", now=lambda: TWO_O_CLOCK).calls())
    manifest = home.registry.get(report.to_json()["published"][0]).manifest_bytes.decode()
    for value in CANARIES.values():
        for text in (said, calls, manifest):
            assert value not in text
            assert json.dumps(value)[1:-1] not in text


def test_what_is_held_out_is_in_nothing_that_is_trained_on(make: Make) -> None:
    home = make()
    home.traffic()
    home.factory.night(TWO_O_CLOCK)
    held_out, training, validation = (files(home, f"{name}.jsonl") for name in ("held-out", "training", "validation"))
    assert (len(held_out), len(training), len(validation)) == (25, 67, 8)
    assert not {one.prompt for one in held_out} & {one.prompt for one in [*training, *validation]}


def test_the_owners_corrections_are_taught_and_not_asked(make: Make) -> None:
    teacher = ScriptedTeacher(knows=lambda prompt: rule(prompt))
    home = make(teacher=teacher, recipe=Recipe(asks_prompts=True))
    home.traffic(gap=70)
    corrected = prompts(5, first=300)
    home.signals.record_all(
        [Signal(base=BASE, prompt=one, accepted=True, feedback="bad", correction=rule(one)) for one in corrected]
    )
    home.factory.night(TWO_O_CLOCK)
    assert set(corrected) <= {one.prompt for one in files(home, "taught.jsonl")}
    assert not set(corrected) & set(teacher.asked)


def test_what_lifts_but_drifts_is_trained_again_with_replay_and_then_rejected(make: Make) -> None:
    home = make(drift_nats=0.5)
    home.traffic()
    home.factory.night(TWO_O_CLOCK)
    shares = [job.replay.share for job in map(TrainingJob.load, home.training.runs) if job.replay is not None]
    assert shares == [0.25, 1.0]
    [gap] = home.journal.gaps()
    assert gap.state == REJECTED
    assert "KL" in gap.why
    assert home.published() == []
    spent = home.journal.note(f"alpha:{BASE}")
    assert spent is not None
    assert (spent["tests"], spent["passed"]) == (2, [])
    job = home.journal.jobs()[0]
    assert {step.phase for step in home.journal.steps(job.id)} == {"train-1", "train-2"}


def test_a_label_that_somebody_took_meanwhile_is_left_to_them(
    make: Make, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = make()
    home.traffic()
    publish, calls = home.registry.publish, list[str]()

    def rivalled(card: LoRACard) -> CardEntry:
        calls.append(f"{card.name}@{card.version}")
        if len(calls) == 1:
            publish(LoRACard.from_peft(trained / str(LEARNT_NOTHING), name=card.name, base_name=BASE, version="1"))
        return publish(card)

    monkeypatch.setattr(home.registry, "publish", rivalled)
    report = home.factory.night(TWO_O_CLOCK)
    assert report is not None
    assert calls == ["question-velmora@1", "question-velmora@2"]
    assert report.to_json()["published"] == ["question-velmora@2"]
    [gap] = home.journal.gaps()
    assert (gap.state, gap.card) == (PUBLISHED, home.registry.get("question-velmora@2").digest)
