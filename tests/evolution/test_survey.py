"""The survey: what becomes a gap, what is covered here or at a peer, what waits; nothing is lost."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evolution.signals import Signal
from evolution.survey import COVERED, FETCHED, OPEN, Surveying, theme_of
from registry.card import LoRACard
from registry.errors import ArrowMoEError
from registry.store import Registry
from tests.evolution.nights import BASE, KNOWS, TOPIC, Make, prompts


def card(registry: Registry, trained: Path, **about: Any) -> str:

    made = LoRACard.from_peft(trained / str(KNOWS), name="velmora", base_name=BASE, **about)
    return registry.publish(made).digest


def test_what_fitted_nothing_is_a_gap_and_holds_its_signals(make: Make) -> None:
    home = make()
    home.traffic()
    [gap] = home.surveyor.survey(BASE)
    assert (gap.state, gap.size, gap.base, gap.name) == (OPEN, 30, BASE, "question-velmora")
    assert {*theme_of(gap).terms} == {"question", "velmora"}
    assert {one.prompt for one in home.signals.of_gap(gap.id)} == set(prompts(30))
    assert home.surveyor.survey(BASE) == [], "a signal is in one gap only"


def test_other_bases_have_gaps_of_their_own(make: Make) -> None:
    home = make()
    home.traffic()
    assert home.surveyor.survey("maker/other") == []


def test_too_few_prompts_stay_queued(make: Make) -> None:
    home = make()
    home.traffic(gap=8)
    assert home.surveyor.survey(BASE) == []
    assert home.signals.counts()[BASE].queued == 68


def test_praise_is_no_gap_and_complaint_is(make: Make) -> None:
    home = make()
    home.traffic(gap=0)
    for topic, verdict in (("velmora", "bad"), ("quandor", "good")):
        home.signals.record_all(
            [Signal(base=BASE, prompt=one, accepted=True, feedback=verdict) for one in prompts(30, topic=topic)]
        )
    [gap] = home.surveyor.survey(BASE)
    assert TOPIC in gap.name


def test_what_a_card_here_takes_by_now_is_covered(make: Make, trained: Path) -> None:
    home = make()
    home.traffic()
    card(home.registry, trained, domains=[TOPIC])
    [gap] = home.surveyor.survey(BASE)
    assert gap.state == COVERED
    assert "100% of its prompts are accepted by cards here, most by velmora" in gap.why
    assert home.signals.of_gap(gap.id) == []


@pytest.fixture
def peer(tmp_path: Path, empty_home: Path) -> Iterator[Registry]:
    shutil.copytree(empty_home, tmp_path / "peer")
    with Registry.open(tmp_path / "peer") as registry:
        yield registry


def test_what_a_peer_has_is_fetched_and_not_grown(make: Make, peer: Registry, trained: Path) -> None:
    digest, fetched = card(peer, trained, domains=[TOPIC]), list[str]()
    home = make(offers=peer.newest, fetch=fetched.append)
    home.traffic()
    assert home.surveyor.look(BASE)[0].state == FETCHED
    assert fetched == [], "looking fetches nothing"
    [gap] = home.surveyor.survey(BASE)
    assert (gap.state, fetched) == (FETCHED, [digest])
    assert "fetch velmora first" in gap.why


def test_a_peer_that_is_gone_leaves_a_gap_open(make: Make, peer: Registry, trained: Path) -> None:
    def fails(digest: str) -> None:
        raise ArrowMoEError("nobody answers")

    card(peer, trained, domains=[TOPIC])
    home = make(offers=peer.newest, fetch=fails)
    home.traffic()
    [gap] = home.surveyor.survey(BASE)
    assert gap.state == OPEN
    assert "nobody answers" in gap.why
    assert len(home.signals.of_gap(gap.id)) == 30


def test_without_a_way_to_fetch_it_stays_open(make: Make, peer: Registry, trained: Path) -> None:
    card(peer, trained, domains=[TOPIC])
    home = make(offers=peer.newest)
    home.traffic()
    assert [gap.state for gap in home.surveyor.survey(BASE)] == [OPEN]


def test_tier_one_asks_again_even_where_the_card_is_gone(make: Make) -> None:
    home = make(surveying=Surveying(samples=3))
    home.traffic()
    gone = [Signal(base=BASE, prompt=one, accepted=True, card="blake3:gone") for one in prompts(10, topic="gone")]
    home.signals.record_all(gone)
    home.surveyor.survey(BASE, home.students.students[BASE])
    agreements = [one.agreement for one in home.signals.recent(200)]
    assert agreements.count(1.0) == 20, "a fifth of them, always the same answer"
