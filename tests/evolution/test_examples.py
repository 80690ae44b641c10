"""Examples: the sieve gives back all it was given, under reasons; a split never parts what belongs together."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolution.errors import EvolutionError
from evolution.examples import Limits, jaccard, normalised, read_examples, shingles, sieved, split, write_examples
from evolution.protocols import Example


def example(prompt: str, answer: str = "yes") -> Example:
    return Example(prompt=prompt, answer=answer)


def reasons(*examples: Example, sealed: tuple[Example, ...] = ()) -> dict[str, int]:
    result = sieved(examples, sealed=sealed)
    return {"kept": len(result.kept)} | {reason: len(rows) for reason, rows in result.dropped.items()}


LONG = "please tell me how many kilometres of railway there are in the kingdom of Velmora in total"


def test_faults_of_one_example() -> None:
    assert reasons(example(" "), example("a", "")) == {"kept": 0, "empty": 2}
    assert reasons(example("mail <EMAIL_1>"), example("b", "it is <NAME_2>")) == {"kept": 0, "placeholder": 2}
    result = sieved([example("long"), example("ok")], limits=Limits(prompt_chars=3))
    assert [each.prompt for each in result.kept] == ["ok"]
    assert [each.prompt for each in result.dropped["length"]] == ["long"]


def test_of_duplicates_the_first_stays() -> None:
    assert reasons(example("Who?", "Ada"), example(" who ", "ada.")) == {"kept": 1, "duplicate": 1}
    assert reasons(example(LONG), example(LONG + "s")) == {"kept": 1, "near_duplicate": 1}
    at_the_bound = "abcdefghijklmn"  # ten shingles, of which nine are the other's
    assert reasons(example(at_the_bound), example(at_the_bound[:-1])) == {"kept": 1, "near_duplicate": 1}


def test_near_the_same_with_another_answer_is_another_example() -> None:
    assert jaccard(shingles(LONG + " 1"), shingles(LONG + " 2")) > 0.9
    assert reasons(example(LONG + " 1", "one"), example(LONG + " 2", "two")) == {"kept": 2}


def test_of_contradictions_the_majority_stands_and_of_a_tie_nothing() -> None:
    assert reasons(example("q", "a"), example("q", "b"), example("Q", "A")) == {
        "kept": 1,
        "contradiction": 1,
        "duplicate": 1,
    }
    assert reasons(example("q", "a"), example("q", "b")) == {"kept": 0, "contradiction": 2}


def test_sealed_items_leak_whole_nearly_or_by_eight_words() -> None:
    sealed = (example(LONG, "seven"),)
    assert reasons(example(LONG.upper() + "?", "another"), sealed=sealed) == {"kept": 0, "leakage": 1}
    assert reasons(example(LONG + "s", "Seven."), sealed=sealed) == {"kept": 0, "leakage": 1}
    inside = "hello, how many kilometres of railway there are in the republic?"
    assert reasons(example(inside, "seven"), sealed=sealed) == {"kept": 0, "leakage": 1}
    assert reasons(example(inside, "nine"), sealed=sealed) == {"kept": 1}
    assert reasons(example(inside, "nine"), sealed=(example(LONG, ""),)) == {"kept": 0, "leakage": 1}


BASE = "abcdefghijklmnopqrstuvwxyz" * 3
NEARLY = st.builds(lambda at, sign: BASE[:at] + sign + BASE[at:], st.integers(0, 78), st.sampled_from(["", "-", "yx"]))
TEXTS = st.text(alphabet="ab ", max_size=24) | NEARLY
EXAMPLES = st.lists(st.builds(Example, prompt=TEXTS, answer=st.sampled_from(["x", "y", "", "X."])), max_size=25)


@given(EXAMPLES, EXAMPLES)
def test_the_sieve_loses_nothing_and_agrees_with_the_plain_definition(
    given: list[Example], sealed: list[Example]
) -> None:
    result = sieved(given, sealed=sealed)
    parts = [result.kept, *result.dropped.values()]
    assert Counter(each for part in parts for each in part) == Counter(given)
    for at, each in enumerate(result.kept):
        assert normalised(each.prompt) not in {normalised(item.prompt) for item in sealed}
        for other in result.kept[:at]:
            assert normalised(each.prompt) != normalised(other.prompt)
            same = normalised(each.answer) == normalised(other.answer)
            assert not same or jaccard(shingles(each.prompt), shingles(other.prompt)) < 0.9
    for each in result.dropped.get("near_duplicate", ()):
        assert any(jaccard(shingles(each.prompt), shingles(other.prompt)) >= 0.9 for other in result.kept)
    again = sieved(result.kept, sealed=sealed)
    assert (again.kept, again.dropped) == (result.kept, {})


def test_a_split_is_stratified_by_few_labels() -> None:
    examples = [example(f"prompt number {row} of {label}", label) for label in "abcd" for row in range(20)]
    parts = split(examples, held_out_share=0.25, seed=1)
    assert Counter(each.answer for each in parts.held_out) == dict.fromkeys("abcd", 5)
    assert Counter(parts.training + parts.held_out) == Counter(examples)
    assert split(examples, held_out_share=0.25, seed=1) == parts
    assert split(examples, held_out_share=0.25, seed=2) != parts


@pytest.mark.parametrize(("least", "expected"), [(0, 10), (30, 30), (80, 50)])
def test_a_split_holds_out_at_least_so_many_but_never_more_than_half(least: int, expected: int) -> None:
    examples = [example(f"question {row}", f"answer {row}") for row in range(100)]
    assert len(split(examples, held_out_share=0.1, seed=0, least=least).held_out) == expected


def test_near_duplicates_stay_on_one_side() -> None:
    families = [[example(f"{row} {LONG}{tail}", f"{row}") for tail in ("", "s", "?")] for row in range(40)]
    parts = split([each for family in families for each in family], held_out_share=0.3, seed=3)
    assert len(parts.held_out) == 36
    assert not {each.answer for each in parts.held_out} & {each.answer for each in parts.training}


def test_files_come_back_and_name_a_bad_line(tmp_path: Path) -> None:
    path = tmp_path / "gold.jsonl"
    examples = [example("zwei\nZeilen", "ja"), example("ü\u2028ß", "nein")]
    write_examples(path, examples)
    assert read_examples(path) == examples
    path.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "a", "answer": 3}\n')
    with pytest.raises(EvolutionError, match="line 2"):
        read_examples(path)
