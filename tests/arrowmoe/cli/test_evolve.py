"""`evolve` and `feedback` on tiny models: what is told of signals, gaps and nights, and who runs a night."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from arrowmoe.cli.evolving import evidence, sparkline
from arrowmoe.node import Node
from arrowmoe.settings import EvolutionSettings, Settings
from arrowmoe.signalling import signal_store
from arrowmoe.views import gate
from evolution.budget import Budget
from evolution.clock import utc_now
from evolution.journal import Journal
from evolution.loopback_teacher import LoopbackTeacher
from evolution.protocols import Theme
from evolution.signals import Signal, SignalStore
from evolution.slow_cards import Expert, Layer, SlowCards
from evolution.teacher_audit import TeacherAudit
from evolution.training_job import FineTuning, ModelSpec, TrainingJob
from registry.store import Registry
from tests.arrowmoe.cli.conftest import Cli
from tests.arrowmoe.nights import BASE, ask_in_vain, gold
from tests.arrowmoe.nodes import modules_after
from tests.registry.cards import small_card

HEAVY = ("torch", "transformers", "sklearn", "openai", "peft")
THEME = Theme(name="first-words", description="Answers by the first word.", terms=("first", "word"))
GOOD = {
    "accepted": True,
    "reasons": [],
    "accuracy": {"base": 0.1, "incumbent": 0.2, "candidate": 0.9},
    "against": {"base": {"items": 40, "lift_points": 80.0, "low_points": 70.0, "high_points": 90.0, "p_value": 1e-9}},
    "routed": 1.0,
    "scale": 0.5,
    "bars": {"alpha": 0.011},
    "anchors": {"served": {"items": 150, "low_points": -1.8}},
    "losses": {"served_rise_nats": {"mean": 0.001, "high": 0.002}},
}


@pytest.fixture(autouse=True)
def models(tiny_models: tuple[Path, Path], clean_environment: pytest.MonkeyPatch, cli: Cli, tmp_path: Path) -> None:
    clean_environment.setenv("ARROWMOE_BASES", str(tiny_models[0]))
    clean_environment.setenv("ARROWMOE_EMBEDDER", str(tiny_models[1]))
    clean_environment.setenv("ARROWMOE_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def registry(home: Path) -> Iterator[Registry]:
    with Registry.open(home) as opened:
        yield opened


@pytest.fixture
def signals(registry: Registry) -> SignalStore:
    return signal_store(registry.database, EvolutionSettings())


@pytest.fixture
def journal(registry: Registry) -> Journal:
    return Journal(registry.database)


@pytest.fixture
def node(home: Path, tiny_models: tuple[Path, Path]) -> Iterator[Node]:
    settings = Settings(home=home, discovery=False, bases=(str(tiny_models[0]),), embedder=str(tiny_models[1]))
    with Node(settings) as running:
        yield running


def enter_gap(journal: Journal, night: int | None, state: str = "growing") -> int:
    found = {"base": BASE, "name": THEME.name, "theme": asdict(THEME), "size": 40, "worth": 32.0, "why": "no card"}
    return journal.enter_gap(night, found | {"state": state})


class TestSignals:
    def test_what_was_asked_is_counted_and_listed(self, cli: Cli, signals: SignalStore) -> None:
        ask_in_vain(signals, gold(5))
        signals.record(Signal(base=BASE, prompt="w3", accepted=True, p_value=0.9, sequence_nats=1.0, tokens=1))
        found = cli("evolve", "signals", "--limit", "2", "--json").json
        (counted,) = found["bases"]
        assert (counted["base"], counted["total"], counted["abstained"], counted["queued"]) == (BASE, 6, 5, 6)
        assert [one["prompt"] for one in found["recent"]] == ["w3", gold(5)[4].prompt]
        assert found["recent"][0]["dissonance"] < found["recent"][1]["dissonance"]
        assert cli("evolve", "signals", "--base", "other", "--json").json["recent"] == []
        assert "w3" in cli("evolve", "signals").out

    def test_an_answer_can_be_judged_as_the_last_one_or_by_the_first_digits_of_its_id(
        self, cli: Cli, signals: SignalStore
    ) -> None:
        first = cli("ask", "w5 w6", "--max-new-tokens", "2", "--json").json["signal"]
        last = cli("ask", "w9 w6", "--max-new-tokens", "2", "--json").json["signal"]
        assert cli("feedback", "bad", "--correction", "w8", "-q").out.strip() == last
        assert cli("feedback", "good", first[:10], "--json").json["prompt"] == "w5 w6"
        said = {signal.id: (signal.feedback, signal.correction) for signal in signals.recent()}
        assert said == {first: ("good", None), last: ("bad", "w8")}

    def test_an_answer_names_its_request(self, cli: Cli, signals: SignalStore) -> None:
        shown = cli("ask", "w5 w6", "--max-new-tokens", "2").out
        assert f"request {signals.recent(1)[0].id[:8]}" in shown
        assert cli("ask", "w5 w6", "--adapter", "none", "--max-new-tokens", "2", "--json").json["signal"] is None

    def test_a_running_node_keeps_requests_too(self, cli: Cli, node: Node) -> None:
        asked = cli("ask", "w5 w6", "--max-new-tokens", "2", "--json").json["signal"]
        assert cli("feedback", "bad", "--json").json["id"] == asked

    def test_a_routed_encoding_is_kept_as_well(self, cli: Cli, signals: SignalStore) -> None:
        assert cli("encode", "w5 w6", "--adapter", "auto").code == 0
        assert [(one.base, one.prompt, one.answer) for one in signals.recent()] == [("tiny-encoder", "w5 w6", None)]

    def test_a_request_that_is_not_there_cannot_be_judged(self, cli: Cli, signals: SignalStore) -> None:
        assert "there is nothing to judge" in cli("feedback", "bad").err
        for one in gold(40):
            signals.record(Signal(base=BASE, prompt=one.prompt, accepted=False))
        twice = next(digit for digit in "0123456789abcdef" if sum(s.id[0] == digit for s in signals.recent(40)) > 1)
        for ref, said in (("nobody", "got 'nobody'"), ("", "got ''"), (twice, "begin with")):
            done = cli("feedback", "bad", ref)
            assert (done.code, said in done.err) == (1, True)
        assert cli("feedback", "so-so").code == 2

    def test_the_off_switch_keeps_nothing(self, cli: Cli, clean_environment: pytest.MonkeyPatch) -> None:
        clean_environment.setenv("ARROWMOE_EVOLUTION__SIGNALS", "0")
        assert cli("ask", "w5 w6", "--max-new-tokens", "2", "--json").json["signal"] is None
        assert "evolution.signals is off" in cli("evolve", "signals").out

    def test_forgetting_deletes_requests_and_what_finished_jobs_left(
        self, cli: Cli, signals: SignalStore, journal: Journal, home: Path
    ) -> None:
        ask_in_vain(signals, gold(3))
        journal.enqueue("night-1/grow/1", "grow", BASE, spec={"gap": enter_gap(journal, None)})
        job = journal.claim()
        assert job is not None
        left = home / "nights" / f"job-{job.id}" / "training.jsonl"
        left.parent.mkdir(parents=True)
        left.touch()
        assert cli("evolve", "forget", "--files", "--yes", "--json").json == {"signals": 3, "jobs": 0}
        journal.finish(job)
        assert cli("evolve", "forget", "--yes", "--json").json == {"signals": 0, "jobs": 0}
        assert left.exists()
        assert "files of 1 jobs" in cli("evolve", "forget", "--files", "--yes").out
        assert not left.exists()


class TestSlowCards:
    @pytest.fixture
    def labels(self, registry: Registry, journal: Journal) -> list[str]:
        """Two slow cards, one above the other."""
        enter_gap(journal, None, state="published")
        cards, made = SlowCards(registry, journal), []
        for number, name in enumerate(("first", "second"), 1):
            entry = registry.publish(small_card(name=cards.name(BASE), version=str(number), base_name=BASE))
            made.append(f"{entry.name}@{entry.version}")
            expert = Expert(card=f"blake3:{name}", name=name, job=number)
            cards.put_on(BASE, Layer(card=entry.digest, label=made[-1], expert=expert))
        return made

    def test_one_after_another_is_taken_back(self, cli: Cli, labels: list[str], registry: Registry) -> None:
        below, top = labels
        done = cli("evolve", "rollback", "--yes", "--json").json
        assert done == {"base": BASE, "removed": top, "expert": "second", "restored": below}
        assert [f"{one.name}@{one.version}" for one in registry.list()] == [below]
        shown = cli("evolve", "rollback", BASE, "--yes").out
        assert f"removed {below}" in shown
        assert registry.list() == []
        assert "expected one base with a slow card, got none" in cli("evolve", "rollback", "--yes").err

    def test_nobody_is_asked_where_nobody_is(self, cli: Cli, labels: list[str]) -> None:
        assert "expected --yes" in cli("evolve", "rollback").err

    def test_not_while_a_night_is_under_way(self, cli: Cli, labels: list[str], journal: Journal) -> None:
        journal.enqueue("night-1/consolidate/tiny", "consolidate", BASE, spec={})
        assert journal.claim() is not None
        assert "a night is under way" in cli("evolve", "rollback", "--yes").err


class TestWhatTheJournalTells:
    @pytest.fixture
    def night(self, journal: Journal, registry: Registry) -> int:
        """A night in which one gap's training is under way."""
        night = journal.begin_night(utc_now())
        assert night is not None
        gap = enter_gap(journal, night)
        journal.enqueue(f"night-{night}/grow/{gap}", "grow", BASE, stage="teach", spec={"gap": gap})
        job = journal.claim()
        assert job is not None
        job = journal.advance(job, "train", examples={"training": 81, "held_out": 30, "dropped": {"duplicate": 2}})
        for step in range(1, 6):
            journal.step(job, "train-1", step, 40, 3.0 / step)
        account = f"night-{night}"
        budget = Budget(registry.database, account, limit_microusd=1_000_000, limit_tokens=1000)
        budget.settle(budget.reserve(250_000, 100), 250_000, 100)
        audit = TeacherAudit(registry.database, account, now=utc_now)
        number = audit.begin(teacher="oracle", purpose="answer", disclosure="redacted", request="what left")
        costs = {"prompt_tokens": 60, "completion_tokens": 40, "microusd": 250_000, "seconds": 1.0}
        audit.end(number, response="what came", error=None, **costs)  # type: ignore[arg-type]
        return night

    def test_status_says_what_is_under_way_and_what_is_left(self, cli: Cli, night: int) -> None:
        found = cli("evolve", "status", "--json").json
        assert found["running"] is True
        assert found["training"] == [
            {
                "job": f"night-{night}/grow/1",
                "kind": "grow",
                "base": BASE,
                "gap": "first-words",
                "stage": "train",
                "phase": "train-1",
                "step": 5,
                "steps": 40,
                "loss_nats": 0.6,
            }
        ]
        assert found["budget"]["left"] == {"usd": 0.75, "tokens": 900}
        assert (found["teacher"], found["schedule"]["next"]) == (None, None)
        assert "first-words: train 5/40, loss 0.600" in cli("evolve", "status").out

    def test_a_gap_is_shown_with_its_evidence_losses_and_costs(
        self, cli: Cli, night: int, journal: Journal, home: Path
    ) -> None:
        job = journal.held()[0]
        directory = home / "nights" / f"job-{job.id}"
        directory.mkdir(parents=True)
        (directory / "verdict.json").write_text(json.dumps(GOOD | {"accepted": False, "reasons": ["drifts"]}))
        found = cli("evolve", "show", "gap-1", "--json").json
        assert found["losses"] == [{"phase": "train-1", "loss_nats": [3.0 / step for step in range(1, 6)]}]
        assert (found["gate"]["accepted"], found["gate"]["reasons"]) == (False, ["drifts"])
        assert (found["teacher"]["calls"], found["teacher"]["usd"]) == (1, 0.25)
        assert "exchanges" not in found["teacher"]
        shown = cli("evolve", "show", "first-words", "--calls").out
        for text in (
            "3.000 █",
            "refused",
            "drifts",
            "oracle: 1 calls, 100 tokens, $0.2500",
            "what left",
            "2 duplicate",
        ):
            assert text in shown

    def test_a_night_is_listed_and_shown(self, cli: Cli, night: int, journal: Journal) -> None:
        job = journal.held()[0]
        journal.settle_gap(1, "rejected", "too little")
        journal.finish(job, rejected="too little")
        report = {"published": [], "rejected": {job.key: "too little"}, "failed": {}, "unfinished": [], "seconds": 7.0}
        journal.end_night(night, "done", report)
        (listed,) = cli("evolve", "history", "--json").json
        assert (listed["night"], listed["state"], listed["rejected"]) == ("night-1", "done", {job.key: "too little"})
        assert "rejected: too little" in cli("evolve", "show", "night-1").out
        assert cli("evolve", "gaps", "--state", "rejected", "-q").out == "gap-1\n"
        assert cli("evolve", "gaps", "--state", "published", "--json").json == []
        assert cli("evolve", "status", "--json").json["unfinished"] == []

    @pytest.mark.parametrize("ref", ["night-9", "gap-9", "nothing", "9"])
    def test_what_is_not_there_is_said(self, cli: Cli, night: int, ref: str) -> None:
        done = cli("evolve", "show", ref)
        assert (done.code, done.out) == (1, "")
        assert "hint: `arrowmoe evolve" in done.err

    def test_an_empty_home_has_nothing_to_tell(self, cli: Cli) -> None:
        assert cli("evolve", "gaps", "--json").json == cli("evolve", "history", "--json").json == []
        assert cli("evolve", "status").out.startswith("night")
        assert "no gaps were found yet" in cli("evolve", "gaps").out


class TestSchedule:
    def test_it_is_set_shown_and_taken_away(self, cli: Cli, clean_environment: pytest.MonkeyPatch) -> None:
        clean_environment.setenv("ARROWMOE_EVOLUTION__SCHEDULE", "30 3 * * *")
        assert cli("evolve", "schedule", "--json").json["set_by"] == "settings"
        found = cli("evolve", "schedule", "0 2 * * *", "--json").json
        assert (found["expression"], found["set_by"]) == ("0 2 * * *", "command")
        assert "T02:00:00" in found["next"]
        assert cli("evolve", "schedule", "off", "--json").json["next"] is None
        assert cli("evolve", "status", "--json").json["schedule"]["expression"] is None

    def test_what_is_no_schedule_is_refused(self, cli: Cli) -> None:
        done = cli("evolve", "schedule", "at two")
        assert (done.code, "five fields" in done.err) == (1, True)
        assert cli("evolve", "schedule", "--json").json["expression"] is None

    def test_a_running_node_watches_from_then_on(self, cli: Cli, node: Node, journal: Journal) -> None:
        node.inference.engine()
        assert journal.note("evolution-since") is None
        done = cli("evolve", "schedule", "0 2 * * *")
        assert (done.code, done.err) == (0, "")
        assert journal.note("evolution-since") is not None

    def test_without_a_node_that_is_said(self, cli: Cli) -> None:
        assert "only while a node" in cli("evolve", "schedule", "0 2 * * *").err


class TestRun:
    def test_a_dry_run_tells_which_gaps_would_be_grown(self, cli: Cli, signals: SignalStore, journal: Journal) -> None:
        ask_in_vain(signals, gold())
        (gap,) = cli("evolve", "run", "--dry-run", "--json").json["gaps"]
        assert (gap["base"], gap["grows"], gap["prompts"], len(gap["samples"])) == (BASE, True, 120, 3)
        assert "grown" in cli("evolve", "run", "--dry-run").out
        assert journal.nights() == []

    def test_a_night_without_a_gap_publishes_nothing(self, cli: Cli, registry: Registry) -> None:
        told = cli("evolve", "run", "--json").json
        assert (told["ok"], told["nights"][0]["published"], told["nights"][0]["gaps"]) == (True, [], [])
        assert "no gap was worth an expert" in cli("evolve", "run").out
        assert [one["night"] for one in cli("evolve", "history", "--json").json] == ["night-2", "night-1"]
        assert list(registry.list()) == []

    def test_without_a_teacher_gaps_are_found_and_that_is_said(self, cli: Cli, signals: SignalStore) -> None:
        ask_in_vain(signals, gold())
        done = cli("evolve", "run", "--json")
        (night,) = json.loads(done.out)["nights"]
        assert (done.code, night["found"], night["published"]) == (1, {"open": 1}, [])
        assert "nobody teaches this node" in next(job["error"] for job in night["jobs"] if job["kind"] == "grow")

    def test_the_running_node_does_it(self, cli: Cli, node: Node, signals: SignalStore) -> None:
        ask_in_vain(signals, gold())
        assert [gap["grows"] for gap in cli("evolve", "run", "--dry-run", "--json").json["gaps"]] == [True]
        signals.forget()
        assert cli("evolve", "run", "--json").json["ok"] is True
        assert len(node.evolution.journal.nights()) == 1

    def test_a_night_under_way_is_not_doubled(self, cli: Cli, journal: Journal) -> None:
        journal.begin_night(utc_now() - timedelta(hours=1))
        journal.enqueue("night-1/survey/tiny", "survey", BASE, spec={})
        assert journal.claim() is not None
        done = cli("evolve", "run")
        assert (done.code, "a night is under way" in done.err) == (1, True)

    @pytest.mark.slow
    def test_a_whole_night_with_a_cloud_teacher_and_a_training_process(
        self, cli: Cli, signals: SignalStore, clean_environment: pytest.MonkeyPatch
    ) -> None:
        ask_in_vain(signals, gold())
        with LoopbackTeacher(gold()) as server:
            teacher = {"MODEL": "loopback", "BASE_URL": server.url, "KEY_VARIABLE": "TEACHER", "VOTES": "1"}
            for name, value in (teacher | {"DISCLOSURE": "full"}).items():
                clean_environment.setenv(f"ARROWMOE_TEACHER__{name}", value)
            clean_environment.setenv("ARROWMOE_EVOLUTION__STEPS", "12")
            clean_environment.setenv("TEACHER", "any")
            (night,) = cli("evolve", "run", "--json").json["nights"]
        assert [gap["state"] for gap in night["gaps"]] in (["rejected"], ["published"])
        found = cli("evolve", "show", night["gaps"][0]["gap"], "--json").json
        assert found["evidence"]["against"]["base"]["items"] == found["examples"]["held_out"]
        assert len(found["losses"][0]["loss_nats"]) == 12
        assert found["teacher"]["calls"] == len(server.requests)


def training_job(directory: Path, model: Path) -> TrainingJob:
    data = directory / "data.jsonl"
    data.write_text("".join(json.dumps(asdict(one)) + "\n" for one in gold(16)))
    return TrainingJob(
        base=ModelSpec(model=str(model), name=BASE, device="cpu"),
        objective="sft",
        tuning=FineTuning(rank=2, targets=("up_proj",), steps=3),
        data_url=data.as_uri(),
        output_url=(directory / "out").as_uri(),
    )


def test_a_training_job_is_done(cli: Cli, tmp_path: Path, tiny_models: tuple[Path, Path]) -> None:
    training_job(tmp_path, tiny_models[0]).save(tmp_path / "job.json")
    found = cli("evolve", "train", tmp_path / "job.json", "--json").json
    assert (found["steps"], found["stopped_why"]) == (3, "steps")
    assert (Path(found["adapter"]) / "adapter_model.safetensors").is_file()
    (tmp_path / "job.json").write_text("{}")
    assert "expected a training job" in cli("evolve", "train", tmp_path / "job.json").err


def test_a_card_shows_the_evidence_of_its_gate(cli: Cli, registry: Registry) -> None:
    registry.publish(small_card("grown").describe(evaluation={"gate": GOOD}))
    registry.publish(small_card("made"))
    shown = cli("skills", "show", "grown").out
    for text in ("passed", "base 10.0 %, so far 20.0 %, with it 90.0 %, of 40 held-out items", "1e-09, asked 0.011"):
        assert text in shown
    assert cli("skills", "show", "made", "--json").json["gate"] is None


@pytest.mark.parametrize(
    "forged", [{"against": 3}, {"against": {"base": [1]}, "accuracy": "all", "reasons": {}}, [], 7]
)
def test_evidence_that_a_peer_made_up_is_shown_as_far_as_it_goes(forged: Any) -> None:
    short = gate(forged)
    assert short is None or [value for name, value in evidence(short) if value] == ["refused"]


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ([], ""),
        ([None], ""),
        ([2.0], "2.000 ▁ 2.000"),
        ([4.0, None, 0.5], "4.000 █▁ 0.500"),
        ([8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0], "8.000 █▇▆▅▄▃▂▁ 1.000"),
    ],
)
def test_a_sparkline_falls_as_its_values_do(values: list[float | None], line: str) -> None:
    assert sparkline(values) == line


def test_a_long_sparkline_is_as_wide_as_a_line() -> None:
    first, bars, last = sparkline([float(value) for value in range(1000, 0, -1)]).split()
    assert (first, len(bars), bars[0], bars[-1], last) == ("1000.000", 40, "█", "▁", "1.000")


@pytest.mark.parametrize("args", [["--help"], ["signals"], ["gaps"], ["status"], ["history"], ["schedule"]])
def test_looking_imports_nothing_heavy(tmp_path: Path, args: list[str]) -> None:
    assert modules_after(tmp_path / "home", "evolve", *args).isdisjoint(HEAVY)
