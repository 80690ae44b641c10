"""Continuous batching: whoever shares a batch, and whenever rows come and go, an answer stays what it is alone."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from arrowmoe.engine import ArrowEngine
from arrowmoe.errors import DeadlineError
from arrowmoe.generation import Chunk
from tests.arrowmoe.benches import LONG, bench, finished
from tests.arrowmoe.causal_models import tiny_bloom, tiny_lfm, tiny_mistral
from tests.arrowmoe.tiny import base, card_for
from tests.peft_models import tiny_gpt2, tiny_llama

Call = tuple[list[tuple[str, int | None]], int]
"""Prompts with their adapters' numbers, and how many new tokens."""


SAID = [{"role": "user", "content": "w5 w9"}, {"role": "user", "content": "w12 w40 w41"}]


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_mistral, tiny_bloom, tiny_lfm])
@pytest.mark.parametrize("seed", range(3))
def test_tokens_do_not_depend_on_who_comes_and_goes(make, seed: int, tmp_path: Path) -> None:
    """Up to five calls at once, of one to three rows; after every token another may come, or one be given up."""
    adapters = (None, 0, 1, 2) if make in (tiny_llama, tiny_gpt2) else (None,)
    found = bench(make, tmp_path if len(adapters) > 1 else None, prompt_tokens=3 + 9 * seed)
    dice = random.Random(seed)
    calls = [_some_call(dice, adapters) for _ in range(12)]
    expected = {
        (call, row): found.alone(prompt, adapter, new)
        for call, (rows, new) in enumerate(calls)
        for row, (prompt, adapter) in enumerate(rows)
    }
    found.passes.clear()
    given_up, waiting = dice.sample(range(12), 2), list(range(12))
    opened: dict[int, Iterator[Chunk]] = {}
    answers: dict[tuple[int, int], list[int]] = {}
    while waiting or opened:
        if waiting and len(opened) < 5 and (not opened or dice.random() < 0.4):
            call = waiting.pop(0)
            opened[call] = found.call(*calls[call])
        call = dice.choice(list(opened))
        chunk = next(opened[call], None)
        if chunk is None or (call in given_up and dice.random() < 0.3):
            opened.pop(call).close()
        elif chunk.generation is not None:
            answers[call, chunk.row] = list(chunk.generation.tokens)
    assert answers == {row: expected[row] for row in answers}
    assert {call for call, _ in answers} >= set(range(12)) - set(given_up)
    assert max(rows for rows, _ in found.passes) > 2


def _some_call(dice: random.Random, adapters: Sequence[int | None]) -> Call:
    words = [f"w{index}" for index in range(3, 64)]
    rows = [
        (" ".join(dice.choices(words, k=dice.randint(1, 20))), dice.choice(adapters)) for _ in range(dice.randint(1, 3))
    ]
    return rows, dice.randint(1, 14)


def test_a_row_of_many_is_what_it_is_alone_in_every_way_of_sampling(tmp_path: Path) -> None:
    ways = [
        {"temperature": 1.0, "seed": 3},
        {"temperature": 0.7, "top_p": 0.8, "seed": 4},
        {"stop": ("w20", "w31")},
        {},
    ]
    expected = [finished(bench(path=tmp_path / f"{n}").stream(SAID, 1, **way)) for n, way in enumerate(ways)]
    together = bench(path=tmp_path, prompt_tokens=16)
    streams = [together.stream(SAID, 1, **way) for way in ways]
    for stream in streams:
        next(stream)
    assert [finished(stream).tokens for stream in streams] == [one.tokens for one in expected]
    assert max(rows for rows, _ in together.passes) > 2


def test_requests_of_many_threads_are_computed_together(tmp_path: Path, no_leaked_threads: None) -> None:
    found = bench(path=tmp_path)
    asked = [("w5 w9", 0), (LONG, 1), ("w30", None), ("w8 w8 w40", 2), (LONG, None), ("w7", 1)] * 3
    expected = [found.alone(prompt, adapter, 20) for prompt, adapter in asked]
    found.passes.clear()
    answers: dict[int, list[int]] = {}
    start = threading.Barrier(len(asked))

    def ask(index: int) -> None:
        start.wait()
        answers[index] = list(finished(found.stream(*asked[index], max_new_tokens=20)).tokens)

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[index] for index in range(len(asked))] == expected
    assert len(found.passes) < 20 * len(asked) / 2


def test_a_newcomers_prompt_is_computed_in_pieces_between_the_steps_of_others() -> None:
    found = bench(prompt_tokens=4)
    first = found.stream(max_new_tokens=20)
    next(first)
    found.passes.clear()
    finished(found.stream(LONG, max_new_tokens=2))
    assert found.passes == [(1, 1), (1, 4), (1, 1), (1, 4), (1, 1), (1, 4), (2, 1)]


def test_a_row_that_is_done_makes_room_and_is_soon_computed_no_more() -> None:
    found = bench(rows=4)
    done = [found.stream(max_new_tokens=12) for _ in range(3)]
    last = found.stream("w30", max_new_tokens=30)
    for stream in [last, *done]:
        next(stream)
    for stream in done:
        finished(stream)
    finished(last)
    assert (4, 1) in found.passes
    assert found.passes[-1] == (1, 1)


def test_a_row_that_has_its_first_token_only_never_joins() -> None:
    found = bench()
    first = found.stream(max_new_tokens=5)
    next(first)
    assert len(finished(found.stream("w30", max_new_tokens=1)).tokens) == 1
    finished(first)
    assert all(rows == 1 for rows, _ in found.passes)


def test_an_answer_says_how_long_it_waited_and_was_computed() -> None:
    found = bench(rows=1)  # a forward pass takes a second
    first = found.stream(max_new_tokens=4)
    second = found.stream("w30", max_new_tokens=3)
    next(first)
    next(second)
    one, two = finished(first).timing, finished(second).timing
    assert one is not None
    assert two is not None
    assert (one.queue_s, one.prefill_s, one.decode_s) == (0, 1, 3)
    assert (two.queue_s, two.prefill_s, two.decode_s) == (3, 1, 2)


def test_the_engine_answers_threads_together_and_says_which_cards_made_each(tmp_path: Path) -> None:
    engine = ArrowEngine(base(tiny_llama()))
    for seed, name in enumerate(("one", "two")):
        engine.load_lora(card_for(engine, tmp_path, name, seed))
    expected = {name: engine.generate([LONG], adapter=name, max_new_tokens=10)[0] for name in ("one", "two")}
    streams = {name: engine.generate([LONG], adapter=name, max_new_tokens=10, stream=True) for name in expected}
    for stream in streams.values():
        next(stream)
    for name, stream in streams.items():
        made = finished(stream)
        assert (made.tokens, dict(made.adapters)) == (expected[name].tokens, {name: 1.0})
    with pytest.raises(DeadlineError):
        engine.generate([LONG], max_new_tokens=10, timeout_s=0)
