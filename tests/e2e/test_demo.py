"""The demo shows the main job on real nodes and real models, and leaves nothing behind."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from arrowmoe import demo
from arrowmoe.demo import story
from arrowmoe.demo.shipped import PROMPTS, shipped_cards
from tests.e2e.conftest import DemoRun, demo_environment, processes_in, run_demo

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("demo")]


def test_it_ends_well_and_leaves_nothing(demo_run: DemoRun) -> None:
    assert demo_run.code == 0, demo_run.errors
    assert demo_run.errors == ""
    assert demo_run.processes_left() == []
    assert list(demo_run.directory.iterdir()) == []


def test_both_nodes_serve_and_only_one_has_cards(demo_run: DemoRun) -> None:
    nodes = dict(re.findall(r"(demo-[ab])  127\.0\.0\.1:\d+  id [0-9a-f]{12}  (\d+) cards", demo_run.output))
    assert nodes == {"demo-a": "4", "demo-b": "0"}


def test_every_shipped_card_is_copied_once_and_verified(demo_run: DemoRun) -> None:
    copied = re.findall(r"^   (\S+) +[0-9a-f]{12} +[\d.]+ [KM]iB  rank \d+  for", demo_run.output, flags=re.MULTILINE)
    assert sorted(copied) == sorted(card.name for card in shipped_cards())
    assert re.search(r"[1-9]\d* tensors match their digests, 4 cards signed by [0-9a-f]{12}\n", demo_run.output)
    assert "a second sync moves 0 cards" in demo_run.output


def test_prompts_go_to_the_cards_they_are_for(demo_run: DemoRun) -> None:
    chosen = re.findall(r"^ +card     (\S+)", demo_run.output, flags=re.MULTILINE)
    assert chosen == [prompt.card or "none" for prompt in PROMPTS]
    assert demo_run.output.count("the bare base model answers") == 1


def test_the_card_changes_every_answer(demo_run: DemoRun) -> None:
    pairs = re.findall(r"without  (.*)\n +with     (.*)\n", demo_run.output)
    assert len(pairs) == sum(prompt.card is not None for prompt in PROMPTS)
    assert all(without != answer for without, answer in pairs)
    assert "with     2019-10-09\n" in demo_run.output


def test_every_card_helps_on_its_held_out_examples(demo_run: DemoRun) -> None:
    rows = re.findall(r"^   (\S+) .* (\d+) +([\d.]+)% +([\d.]+)%$", demo_run.output, flags=re.MULTILINE)
    assert [row[0] for row in rows] == [card.name for card in shipped_cards()]
    assert all(float(with_card) > float(bare) for _, _, bare, with_card in rows)


def test_it_fits_a_terminal(demo_run: DemoRun) -> None:
    assert max(map(len, demo_run.output.splitlines())) <= 100
    assert demo_run.output.isascii() or set(re.findall(r"[^\x00-\x7f]", demo_run.output)) <= {"…", "’", "→"}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_night_grows_an_expert_that_the_other_node_answers_with(tmp_path: Path) -> None:
    run = run_demo(tmp_path, timeout_s=1400)
    assert run.code == 0, run.errors
    assert "40 of 40 fit no card, 0 are answered right" in run.output
    losses = [float(loss) for loss in re.findall(r"step +\d+ of \d+ +([\d.]+)", run.output)]
    assert losses[-1] < losses[0] / 4
    shares = re.search(
        r"24 questions that nobody taught: (\d+) go to it,\n +(\d+)% are right without, (\d+)% with", run.output
    )
    assert shares is not None
    routed, bare, with_card = map(int, shares.groups())
    assert routed >= 20
    assert bare == 0
    assert with_card >= 80
    assert run.processes_left() == []
    assert list(run.directory.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_both_nodes_and_removes_their_homes(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "arrowmoe", "demo"]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a child of a job in the background would ignore it
    with subprocess.Popen(
        command, env=demo_environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("1  Two nodes")
        assert len(processes_in(tmp_path)) == 2
        process.send_signal(number)
        assert process.wait(30) != 0
    assert processes_in(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_a_failure_says_what_the_nodes_said_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(story, "BASES", {"causal": "builtin:nothing"})
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(demo.DemoError, match="builtin:nothing") as caught:
        list(demo.run())
    said_by_a, said_by_b = str(caught.value.hint).split("demo-b said last:")
    assert "node_started" in said_by_a
    assert "base_model_loaded" in said_by_b
    assert processes_in(tmp_path) == []
    assert list(tmp_path.iterdir()) == []
