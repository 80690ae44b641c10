"""Continuous batching: whoever shares a batch, and whenever rows come and go, an answer stays what it is alone."""

from __future__ import annotations

import gc
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from arrowmoe.base_model import BaseModel
from arrowmoe.batching import Batching, BatchLimits
from arrowmoe.engine import ArrowEngine
from arrowmoe.errors import BusyError, DeadlineError, EngineError, UnknownAdapterError
from arrowmoe.generation import Chunk, Generation, Prompt, Sampling
from arrowmoe.lora.manager import LoRAManager
from registry.card import LoRACard
from tests.arrowmoe.causal_models import greedy, tiny_bloom, tiny_lfm, tiny_mistral
from tests.arrowmoe.tiny import base, card_for
from tests.peft_models import load_peft, make_peft, tiny_gpt2, tiny_llama

LONG = "w5 w9 w12 w7 w33 w21 w4 w60 w18 w11 w42 w3"
Call = tuple[list[tuple[str, int | None]], int]
"""Prompts with their adapters' numbers, and how many new tokens."""
SAID = [{"role": "user", "content": "w5 w9"}, {"role": "user", "content": "w12 w40 w41"}]


@dataclass(kw_only=True)
class Bench:
    """A tiny model with adapters; every forward pass takes a second, and its (rows, tokens) are in `passes`."""

    tiny: BaseModel
    plain: PreTrainedModel
    manager: LoRAManager
    limits: BatchLimits
    cards: list[LoRACard] = field(default_factory=list)
    adapted: list[torch.nn.Module] = field(default_factory=list)
    passes: list[tuple[int, int]] = field(default_factory=list)
    now_s: float = 0.0

    def __post_init__(self) -> None:
        manager = self.manager
        self.batching = Batching(
            self.tiny, plan=manager.plan, running=manager.running, limits=self.limits, now=lambda: self.now_s
        )
        self.tiny.model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, model: torch.nn.Module, args: object, given: Mapping[str, torch.Tensor]) -> None:
        self.passes.append(tuple(given["input_ids"].shape))
        self.now_s += 1

    def stream(
        self,
        prompt: Prompt = "w5 w9",
        adapter: int | None = None,
        *,
        timeout_s: float | None = None,
        **sampling: object,
    ) -> Iterator[Chunk]:
        """One row, with an adapter by its number."""
        settings = Sampling(**{"max_new_tokens": 6, **sampling})
        return self.batching.generate([prompt], [self.weights(adapter)], settings, timeout_s=timeout_s)

    def call(self, rows: Sequence[tuple[str, int | None]], new_tokens: int) -> Iterator[Chunk]:
        prompts, adapters = [prompt for prompt, _ in rows], [self.weights(adapter) for _, adapter in rows]
        return self.batching.generate(prompts, adapters, Sampling(max_new_tokens=new_tokens))

    def weights(self, adapter: int | None) -> dict[str, float]:
        return {} if adapter is None else {self.cards[adapter].digest: 1.0}

    def alone(self, prompt: str, adapter: int | None, new_tokens: int) -> list[int]:
        """What PEFT and transformers answer to it."""
        model = self.plain if adapter is None else self.adapted[adapter]
        return greedy(model, self.tiny, prompt, new_tokens)


def bench(make: Callable[[], PreTrainedModel] = tiny_llama, path: Path | None = None, **limits: int) -> Bench:
    """Three adapters of ranks 2, 5 and 16, if there is a `path` to keep them in."""
    torch.manual_seed(0)
    model = make()
    plain = make_again(model)
    manager = LoRAManager(model)
    made = Bench(tiny=base(model), plain=plain, manager=manager, limits=BatchLimits(**{"prompt_tokens": 4, **limits}))
    for seed, rank in enumerate((2, 5, 16) if path else ()):
        directory = make_peft(plain, path / f"a{seed}", seed=seed, r=rank)
        made.adapted.append(load_peft(plain, directory))
        made.cards.append(LoRACard.from_peft(directory))
        manager.apply_card(made.cards[-1])
    return made


def make_again(model: PreTrainedModel) -> PreTrainedModel:
    again = type(model)(model.config).eval()
    again.load_state_dict(model.state_dict())
    return again


def finished(stream: Iterator[Chunk]) -> Generation:
    *_, last = stream
    assert last.generation is not None
    return last.generation


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


def test_threads_that_give_up_are_late_or_come_too_many_at_once_leave_nothing_behind(tmp_path: Path) -> None:
    found = bench(path=tmp_path, rows=3, waiting=4)
    expected = {adapter: found.alone("w8 w9", adapter, 9) for adapter in (None, 0, 1, 2)}
    wrong: list[object] = []
    seen: set[str] = set()

    def work(seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(12):
            adapter = dice.choice([None, 0, 1, 2])
            stream = found.stream("w8 w9", adapter, timeout_s=dice.choice([None, 6.0]), max_new_tokens=9)
            try:
                if dice.random() < 0.3:
                    next(stream)
                    stream.close()
                    seen.add("closed")
                else:
                    tokens = list(finished(stream).tokens)
                    seen.add("answered")
                    wrong.extend([] if tokens == expected[adapter] else [tokens])
            except (BusyError, DeadlineError) as error:
                seen.add(type(error).__name__)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []
    assert seen >= {"closed", "answered"}
    found.passes.clear()
    assert list(finished(found.stream("w8 w9", 1, max_new_tokens=9)).tokens) == expected[1]
    assert all(rows == 1 for rows, _ in found.passes)


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


def test_no_more_rows_than_the_limit_are_computed_at_once() -> None:
    found = bench(rows=3)
    made = list(found.batching.generate(["w5"] * 10, [{}] * 10, Sampling(max_new_tokens=3)))
    assert sorted(chunk.row for chunk in made if chunk.generation) == list(range(10))
    assert max(rows for rows, _ in found.passes) == 3


def test_the_cache_holds_no_more_tokens_than_the_limit() -> None:
    found = bench(tokens=40)  # a long row takes 12 + 6 of them
    made = list(found.batching.generate([LONG] * 5, [{}] * 5, Sampling(max_new_tokens=6)))
    assert sum(chunk.generation is not None for chunk in made) == 5
    assert max(rows for rows, _ in found.passes) == 2
    assert finished(found.stream(LONG, max_new_tokens=80)).prompt_tokens == 12  # alone a row is always answered


def test_adapters_take_turns(tmp_path: Path) -> None:
    found = bench(path=tmp_path, rows=1)
    weights = [found.weights(0)] * 6 + [found.weights(1)] + [{}]
    chunks = found.batching.generate(["w5"] * 8, weights, Sampling(max_new_tokens=2))
    done = [chunk.row for chunk in chunks if chunk.generation is not None]
    assert done == [0, 6, 7, 1, 2, 3, 4, 5]


def test_a_full_queue_says_when_to_ask_again() -> None:
    found = bench(rows=1, waiting=2)
    first = found.stream(max_new_tokens=8)
    next(first)
    waiting = found.batching.generate(["w5", "w6", "w7"], [{}] * 3, Sampling(max_new_tokens=3))
    next(waiting)  # a call may bring more rows than may wait; one of them is answered now
    with pytest.raises(BusyError, match="fewer than 2 rows to wait, got 2") as caught:
        next(found.stream())
    assert caught.value.retry_s > 0
    assert sum(chunk.generation is not None for chunk in waiting) == 3
    assert finished(found.stream()).text


def test_a_deadline_ends_a_request_and_no_other(tmp_path: Path) -> None:
    found = bench(path=tmp_path, rows=2)
    expected = found.alone(LONG, 0, 12)
    found.passes.clear()
    late, other = found.stream(timeout_s=4, max_new_tokens=50), found.stream(LONG, 0, max_new_tokens=12)
    next(late)
    next(other)
    waits = found.stream("w30", timeout_s=5, max_new_tokens=50)
    with pytest.raises(DeadlineError, match="in time"):
        list(late)
    with pytest.raises(DeadlineError):
        list(waits)
    assert list(finished(other).tokens) == expected
    assert finished(found.stream()).finish_reason


def test_closing_a_stream_makes_room_at_once() -> None:
    found = bench(rows=1)
    first = found.stream(max_new_tokens=60)
    next(first)
    first.close()
    found.passes.clear()
    assert len(finished(found.stream("w30", max_new_tokens=3)).tokens) == 3
    assert found.passes == [(1, 1)] * 3


def test_a_stream_that_nobody_holds_any_more_is_given_up() -> None:
    found = bench(rows=1)
    next(found.stream(max_new_tokens=60))
    gc.collect()
    found.passes.clear()
    finished(found.stream("w30", max_new_tokens=3))
    assert len(found.passes) == 3


def test_what_fails_for_one_row_leaves_others_alone(tmp_path: Path) -> None:
    found = bench(path=tmp_path)
    expected = found.alone("w5 w9", 0, 6)
    good = found.stream(adapter=0)
    next(good)
    overflow = found.batching.generate(["w8"], [{found.cards[1].digest: 1e30}], Sampling(max_new_tokens=5))
    unknown = found.batching.generate(["w8"], [{"sha256:none": 1.0}], Sampling(max_new_tokens=5))
    with pytest.raises(EngineError, match="NaN"):
        list(overflow)
    with pytest.raises(UnknownAdapterError):
        list(unknown)
    assert list(finished(good).tokens) == expected


def test_an_unknown_adapter_fails_its_own_call_of_those_that_come_together(tmp_path: Path) -> None:
    found = bench(path=tmp_path, rows=4)
    holder = found.stream(max_new_tokens=50)
    next(holder)
    outcomes: dict[int, object] = {}
    weights = [found.weights(0), {"sha256:none": 1.0}, found.weights(2)]
    expected = [found.alone("w8", 0, 6), None, found.alone("w8", 2, 6)]

    def ask(index: int) -> None:
        try:
            chunks = found.batching.generate(["w8"], [weights[index]], Sampling(max_new_tokens=6))
            outcomes[index] = list(finished(chunks).tokens)
        except UnknownAdapterError as error:
            outcomes[index] = error

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert isinstance(outcomes[1], UnknownAdapterError)
    assert [outcomes[0], outcomes[2]] == [expected[0], expected[2]]


def within(budget: int, found: Bench) -> Batching:
    """The same adapters where only `budget` of them fit in at once."""
    loaded = found.manager.loaded()
    for one in loaded:
        found.manager.remove_card(one.digest)
    manager = LoRAManager(found.tiny.model, budget_bytes=budget * max(one.nbytes for one in loaded))
    for card in found.cards:
        manager.apply_card(card)
    return Batching(found.tiny, plan=manager.plan, running=manager.running)


def test_rows_whose_adapters_do_not_fit_in_together_are_answered_one_after_another(tmp_path: Path) -> None:
    found = bench(path=tmp_path)
    found.batching = within(1, found)
    chunks = found.call([("w8 w9", 0), ("w8 w9", 2), ("w8 w9", 1)], 6)
    answers = {chunk.row: list(chunk.generation.tokens) for chunk in chunks if chunk.generation}
    assert answers == {row: found.alone("w8 w9", adapter, 6) for row, adapter in enumerate((0, 2, 1))}


def test_a_row_whose_adapter_waits_for_room_joins_when_another_left(tmp_path: Path) -> None:
    found = bench(path=tmp_path)
    found.batching = within(2, found)
    expected = [found.alone("w8 w9", adapter, 20) for adapter in (0, 1, 2)]
    streams = [found.stream("w8 w9", adapter, max_new_tokens=20) for adapter in (0, 1, 2)]
    for stream in streams[:2]:
        next(stream)
    streams[0].close()
    found.passes.clear()
    assert [list(finished(stream).tokens) for stream in streams[:0:-1]] == expected[:0:-1]
    assert (2, 1) in found.passes


def test_an_adapter_that_is_removed_answers_whom_it_was_answering_and_nobody_new(tmp_path: Path) -> None:
    found = bench(path=tmp_path)
    expected = [found.alone("w8 w9", adapter, 12) for adapter in (0, 1)]
    streams = [found.stream("w8 w9", adapter, max_new_tokens=12) for adapter in (0, 1)]
    short = found.stream(adapter=2, max_new_tokens=3)
    for stream in [*streams, short]:
        next(stream)
    found.manager.remove_card(found.cards[0].digest)
    list(short)
    assert [list(finished(stream).tokens) for stream in streams] == expected
    with pytest.raises(UnknownAdapterError):
        next(found.stream(adapter=0))


def test_an_interrupted_step_ends_what_was_in_it_and_the_next_request_is_answered() -> None:
    found = bench()
    other = found.stream("w30", max_new_tokens=9)
    next(other)
    interrupted = found.stream(max_new_tokens=9)
    hook = found.tiny.model.lm_head.register_forward_hook(_interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(interrupted)
    hook.remove()
    with pytest.raises(EngineError, match="interrupted"):
        list(other)
    assert list(finished(found.stream("w30")).tokens) == found.alone("w30", None, 6)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_pass_that_breaks_is_an_error_for_its_rows_only_and_not_for_later_ones() -> None:
    found = bench()
    stream = found.stream("w30", max_new_tokens=9)
    next(stream)
    hook = found.tiny.model.lm_head.register_forward_hook(_break)
    with pytest.raises(RuntimeError, match="broken"):
        list(stream)
    hook.remove()
    assert list(finished(found.stream("w30")).tokens) == found.alone("w30", None, 6)


def _break(*_: object) -> None:
    raise RuntimeError("broken")


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
