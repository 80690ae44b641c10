"""What ships: facts that are right, enough of them to tell, and no text that is both trained on and judged by."""

from __future__ import annotations

import re
from collections import Counter

from evolution.anchors import anchors, general_texts, replay
from evolution.evaluation import mentions
from evolution.gate import Bars
from evolution.paired import telling_items


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def eights(text: str) -> set[tuple[str, ...]]:
    parts = words(text)
    return {tuple(parts[at : at + 8]) for at in range(len(parts) - 7)}


def test_the_sums_are_right() -> None:
    for example in anchors()["additions"]:
        first, second = map(int, re.findall(r"\d+", example.prompt))
        assert int(example.answer) == first + second


def test_yes_and_no_are_as_frequent() -> None:
    assert Counter(example.answer for example in anchors()["common-sense"]) == {"Yes": 25, "No": 25}


def test_no_answer_stands_in_its_question() -> None:
    for name in ("capitals", "additions"):
        assert not [example for example in anchors()[name] if mentions(example.answer, example.prompt)]


def test_there_is_enough_to_tell_and_nothing_twice() -> None:
    prompts = [example.prompt for examples in anchors().values() for example in examples]
    assert list(anchors()) == ["capitals", "additions", "common-sense"]
    assert len(prompts) >= 2 * telling_items(Bars(alpha=0.05).margin_points / 100)
    assert len(general_texts()) >= 2 * Bars(alpha=0.05).least_items
    assert len(replay()) >= 190
    every = prompts + [example.prompt for example in (*general_texts(), *replay())]
    assert len({" ".join(words(prompt)) for prompt in every}) == len(every)


def test_replay_is_disjoint_from_what_is_judged() -> None:
    judged = [*general_texts(), *(example for examples in anchors().values() for example in examples)]
    seen = set().union(*(eights(f"{example.prompt} {example.answer}") for example in replay()))
    assert not [one for one in judged if eights(f"{one.prompt} {one.answer}") & seen]
    assert not {one.answer for one in judged} & {one.answer for one in replay()}


def test_every_text_is_whole() -> None:
    for example in (*general_texts(), *replay()):
        assert example.prompt == example.prompt.strip() != ""
        assert example.answer == example.answer.strip() != ""
