"""Examples: what is kept of those a teacher gave, how they are parted for the gate, and their files.

Nothing is dropped in silence: whatever is refused is handed back under its reason.
"""

from __future__ import annotations

import json
import random
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Final

from evolution.errors import EvolutionError
from evolution.protocols import Example
from evolution.redaction import PLACEHOLDER

NEAR: Final = 0.9
ROUNDING: Final = 1e-9
SHINGLE: Final = 5
WORDS: Final = 8
FEW_LABELS: Final = 4
"""Answers are labels if each stands for so many examples on average."""

REASONS: Final = ("empty", "length", "placeholder", "leakage", "contradiction", "duplicate", "near_duplicate")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Most characters of a prompt and of an answer."""

    prompt_chars: int = 4000
    answer_chars: int = 4000


@dataclass(frozen=True, kw_only=True)
class Sieved:
    """What is kept, in its order, and what was dropped by each of `REASONS` that applied."""

    kept: tuple[Example, ...]
    dropped: Mapping[str, tuple[Example, ...]]


@dataclass(frozen=True, kw_only=True)
class Split:
    """What is trained on, and what the gate examines."""

    training: tuple[Example, ...]
    held_out: tuple[Example, ...]


def normalised(text: str) -> str:
    """NFKC, case-folded, blanks joined, without punctuation at the ends."""
    joined = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return joined.strip(" .,;:!?\"'") or joined


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """|a ∩ b| / |a ∪ b|; 1 of two empty sets."""
    return len(a & b) / len(a | b) if a or b else 1.0


def shingles(text: str) -> frozenset[str]:
    """All runs of five characters of the normalised text; a shorter text is one run."""
    plain = normalised(text)
    return frozenset(plain[at : at + SHINGLE] for at in range(max(1, len(plain) - SHINGLE + 1)))


def sieved(examples: Sequence[Example], *, sealed: Sequence[Example] = (), limits: Limits | None = None) -> Sieved:
    """`examples` without what cannot be trained on, and without what was seen in `sealed` (held-out, test, anchors).

    An example leaks if its prompt is a sealed one, or if its answer is the sealed one too and the prompts share
    eight words in a row or nine tenths of their shingles: items of one template ("the date in ISO format: …") differ
    in little but their answers. A sealed item without an answer is one of any answer. Of contradicting answers the
    one given most often stands, of a tie none. Near duplicates are those of one answer.
    """
    limits = limits or Limits()
    dropped: dict[str, list[Example]] = defaultdict(list)
    sound: list[Example] = []
    leaks = _Leaks(sealed)
    for example in examples:
        reason = _fault(example, limits) or ("leakage" if leaks.has(example) else None)
        (dropped[reason] if reason else sound).append(example)
    kept = _without_repeats(_without_contradictions(sound, dropped), dropped)
    return Sieved(kept=tuple(kept), dropped={reason: tuple(dropped[reason]) for reason in REASONS if reason in dropped})


def split(examples: Sequence[Example], *, held_out_share: float, seed: int, least: int = 0) -> Split:
    """Part `examples` at random: the share, or `least` if that is more, but never more than half, is held out.

    Where answers are few labels, each is held out in proportion. Near duplicates stay on one side.
    """
    count = min(max(round(held_out_share * len(examples)), least), len(examples) // 2)
    share = count / len(examples) if examples else 0.0
    rng = random.Random(seed)
    held: set[int] = set()
    seen = 0
    for stratum in _strata(examples, _groups(examples)):
        rng.shuffle(stratum)
        seen += sum(map(len, stratum))
        for group in stratum:
            if len(held) + len(group) <= round(share * seen):
                held.update(group)
    return Split(
        training=tuple(example for row, example in enumerate(examples) if row not in held),
        held_out=tuple(examples[row] for row in sorted(held)),
    )


def write_examples(path: Path, examples: Iterable[Example]) -> None:
    """JSON lines of `prompt` and `answer`."""
    lines = (json.dumps({"prompt": each.prompt, "answer": each.answer}, ensure_ascii=False) + "\n" for each in examples)
    path.write_text("".join(lines), encoding="utf-8")


def read_examples(path: Path) -> list[Example]:
    """Read JSON lines. Raises `EvolutionError` naming the first line that holds anything else."""
    with path.open(encoding="utf-8") as file:
        return [_example(path, number, line) for number, line in enumerate(file, 1) if line.strip()]


def _example(path: Path, number: int, line: str) -> Example:
    try:
        fields = json.loads(line)
    except ValueError:
        fields = None
    if not isinstance(fields, dict) or fields.keys() != {"prompt", "answer"} or not _strings(fields.values()):
        raise EvolutionError(
            f"{path}, line {number}: expected a JSON object of the strings prompt and answer, got {line.strip()[:60]!r}"
        )
    return Example(**fields)


def _strings(values: Iterable[object]) -> bool:
    return all(isinstance(value, str) for value in values)


def _fault(example: Example, limits: Limits) -> str | None:
    if not example.prompt.strip() or not example.answer.strip():
        return "empty"
    if len(example.prompt) > limits.prompt_chars or len(example.answer) > limits.answer_chars:
        return "length"
    if PLACEHOLDER.search(example.prompt) or PLACEHOLDER.search(example.answer):
        return "placeholder"
    return None


class _Near:
    """Finds texts of one answer whose shingles agree to nine tenths.

    Prefix filtering (Bayardo et al. 2007): in one order of all shingles, two such texts share one of the first
    n - ceil(0.9 n) + 1, so that with rare shingles first few pairs are compared.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._counts = Counter(shingle for text in texts for shingle in shingles(text))
        self._entries: list[tuple[frozenset[str], str]] = []
        self._index: dict[str, list[int]] = defaultdict(list)

    def add(self, text: str, answer: str) -> int:
        """Keep a text; returns its number."""
        entry = shingles(text)
        for shingle in self._prefix(entry):
            self._index[shingle].append(len(self._entries))
        self._entries.append((entry, normalised(answer)))
        return len(self._entries) - 1

    def like(self, text: str, answer: str) -> list[int]:
        """Numbers of the texts that are nearly this one and have its answer, or none."""
        entry, wanted = shingles(text), normalised(answer)
        numbers = {number for shingle in self._prefix(entry) for number in self._index.get(shingle, ())}
        return [number for number in sorted(numbers) if self._fits(number, entry, wanted)]

    def _fits(self, number: int, entry: frozenset[str], wanted: str) -> bool:
        other, answer = self._entries[number]
        return answer in ("", wanted) and jaccard(entry, other) >= NEAR

    def _prefix(self, entry: frozenset[str]) -> list[str]:
        ordered = sorted(entry, key=lambda shingle: (self._counts[shingle], shingle))
        return ordered[: len(ordered) - ceil(NEAR * len(ordered) - ROUNDING) + 1]


class _Leaks:
    """Tells examples that repeat a sealed item."""

    def __init__(self, sealed: Sequence[Example]) -> None:
        self._prompts = {normalised(item.prompt) for item in sealed}
        self._near = _Near(item.prompt for item in sealed)
        self._grams: dict[str, set[str]] = defaultdict(set)
        for item in sealed:
            self._near.add(item.prompt, item.answer)
            for gram in _grams(item.prompt):
                self._grams[gram].add(normalised(item.answer))

    def has(self, example: Example) -> bool:
        """Whether `example` may not be trained on."""
        if normalised(example.prompt) in self._prompts or self._near.like(example.prompt, example.answer):
            return True
        answers = {answer for gram in _grams(example.prompt) for answer in self._grams.get(gram, ())}
        return not answers.isdisjoint({"", normalised(example.answer)})


def _grams(text: str) -> Iterator[str]:
    words = re.findall(r"\w+", normalised(text))
    for at in range(len(words) - WORDS + 1):
        yield " ".join(words[at : at + WORDS])


def _without_contradictions(examples: Sequence[Example], dropped: dict[str, list[Example]]) -> list[Example]:
    votes: dict[str, Counter[str]] = defaultdict(Counter)
    for example in examples:
        votes[normalised(example.prompt)][normalised(example.answer)] += 1
    right = {prompt: _majority(answers) for prompt, answers in votes.items()}
    kept: list[Example] = []
    for example in examples:
        stands = right[normalised(example.prompt)] == normalised(example.answer)
        (kept if stands else dropped["contradiction"]).append(example)
    return kept


def _majority(answers: Counter[str]) -> str | None:
    (first, most), *others = answers.most_common(2)
    return None if others and others[0][1] == most else first


def _without_repeats(examples: Sequence[Example], dropped: dict[str, list[Example]]) -> list[Example]:
    near, prompts, kept = _Near(example.prompt for example in examples), set[str](), []
    for example in examples:
        if normalised(example.prompt) in prompts:
            dropped["duplicate"].append(example)
        elif near.like(example.prompt, example.answer):
            dropped["near_duplicate"].append(example)
        else:
            prompts.add(normalised(example.prompt))
            near.add(example.prompt, example.answer)
            kept.append(example)
    return kept


def _groups(examples: Sequence[Example]) -> list[list[int]]:
    """Row numbers of examples that are nearly the same, in order of the first."""
    near, group_of, groups = _Near(example.prompt for example in examples), dict[str, list[int]](), []
    by_row: list[list[int]] = []
    for row, example in enumerate(examples):
        like = near.like(example.prompt, example.answer)
        group = group_of.get(normalised(example.prompt)) or (by_row[like[0]] if like else [])
        if not group:
            groups.append(group)
        group.append(row)
        by_row.append(group)
        group_of[normalised(example.prompt)] = group
        near.add(example.prompt, example.answer)
    return groups


def _strata(examples: Sequence[Example], groups: Sequence[list[int]]) -> list[list[list[int]]]:
    labels = {normalised(example.answer) for example in examples}
    if len(labels) * FEW_LABELS > len(examples):
        return [list(groups)]
    strata: dict[str, list[list[int]]] = defaultdict(list)
    for group in groups:
        strata[normalised(examples[group[0]].answer)].append(group)
    return list(strata.values())


__all__ = [
    "REASONS",
    "Limits",
    "Sieved",
    "Split",
    "jaccard",
    "normalised",
    "read_examples",
    "shingles",
    "sieved",
    "split",
    "write_examples",
]
