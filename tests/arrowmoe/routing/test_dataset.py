"""The routing dataset: both forms are read, splits are balanced and share no text, bad rows are named by their line."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from arrowmoe.routing.dataset import (
    QUESTION,
    RoutingDataError,
    RoutingExample,
    read_examples,
    routing_prompt,
    write_dataset,
)

SPLITS = ("train", "val", "eval")
SEED_ROW = {
    "id": "claim-window_00447",
    "image": "images/claim-window_00447.png",
    "conversations": [
        {"from": "system", "value": "You are a routing classifier..."},
        {"from": "human", "value": "<image>\nWhich adapter should handle this?"},
        {"from": "gpt", "value": "claim-window"},
    ],
    "metadata": {"adapter": "claim-window", "label": 1},
}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def examples(card: str | None, count: int) -> list[RoutingExample]:
    return [RoutingExample(text=f"{card} {index}", card=card, label=f"intent {index % 3}") for index in range(count)]


def read_all(directory: Path) -> dict[str, list[RoutingExample]]:
    return {split: read_examples(directory / f"{split}.jsonl") for split in SPLITS}


def test_plain_rows_are_read(tmp_path: Path) -> None:
    path = write(
        tmp_path / "rows.jsonl",
        {"text": "what's my balance", "card": "banking", "label": "balance", "answer": "42"},
        "",
        {"text": "line\u2028separator", "card": None},
    )
    assert read_examples(path) == [
        RoutingExample(text="what's my balance", card="banking", label="balance", answer="42"),
        RoutingExample(text="line\u2028separator", card=None),
    ]


def test_a_row_about_an_image_is_read(tmp_path: Path) -> None:
    assert read_examples(write(tmp_path / "rows.jsonl", SEED_ROW)) == [
        RoutingExample(text="", card="claim-window", image=SEED_ROW["image"], id="claim-window_00447")
    ]


def test_a_conversation_that_is_the_task_itself_gives_its_answer(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Click 3 May"}, {"from": "gpt", "value": "<tool_call>…</tool_call>"}]
    path = write(tmp_path / "rows.jsonl", {"conversations": turns, "metadata": {"adapter": "calendar"}})
    assert read_examples(path) == [
        RoutingExample(text="Click 3 May", card="calendar", answer="<tool_call>…</tool_call>")
    ]


def test_one_error_lists_every_bad_row_with_its_line(tmp_path: Path) -> None:
    path = write(
        tmp_path / "rows.jsonl",
        {"text": "fine", "card": "a"},
        "{",
        ["text"],
        {"text": 7, "card": "a"},
        {"text": "no card"},
        {"text": "word", "card": "none"},
        {"conversations": [{"from": "human", "value": "hi"}], "metadata": {"adapter": "a"}},
        {"conversations": "hi", "metadata": {"adapter": "a"}},
        {"conversations": [], "metadata": None},
        SEED_ROW | {"id": 7},
        {
            **SEED_ROW,
            "image": None,
            "conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": "a"}],
        },
    )
    with pytest.raises(RoutingDataError) as raised:
        read_examples(path)
    said = str(raised.value).splitlines()
    assert said[0] == "10 bad rows:"
    expected = ["", "a JSON object", '"text" to be a string, got 7', '"card"', "write null", "none from gpt"]
    expected += [
        '"conversations" to be a list',
        '"metadata" to be an object',
        '"id" to be a string',
        "a text or an image",
    ]
    for line, (number, part) in zip(said[1:], enumerate(expected, start=2), strict=True):
        assert f"rows.jsonl:{number}: " in line
        assert part in line


def test_what_is_not_utf8_is_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "fine", "card": "a"}\n{"text": "\xff", "card": "a"}\n')
    with pytest.raises(RoutingDataError, match=r"rows\.jsonl:2: 'utf-8' codec"):
        read_examples(tmp_path / "rows.jsonl")


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    row = RoutingExample(text="Ünïcode\nin two lines", card="a", label="l", answer="x", image="i.png", id="7")
    write_dataset({"a": [row], "b": [RoutingExample(text="other", card="b")]}, tmp_path, val=0, eval=0)
    assert row in read_examples(tmp_path / "train.jsonl")


def test_written_rows_have_the_conversations_form(tmp_path: Path) -> None:
    write_dataset({"a": examples("a", 2), "b": examples("b", 2)}, tmp_path, val=0, eval=0)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    row = next(row for row in rows if row["metadata"]["intent"] == "intent 1" and row["metadata"]["adapter"] == "b")
    assert row["metadata"]["label"] == 1
    system, user = routing_prompt("b 1", ["a", "b"])
    assert row["conversations"] == [
        {"from": "system", "value": system["content"]},
        {"from": "human", "value": user["content"]},
        {"from": "gpt", "value": "b"},
    ]


def test_splits_are_balanced_and_share_no_text(tmp_path: Path) -> None:
    sources = {"a": examples("a", 50), "b": examples("b", 20), None: examples(None, 10)}
    report = write_dataset(sources, tmp_path, seed=3, val=0.2, eval=0.1)
    splits = read_all(tmp_path)
    counted = {split: Counter(row.card for row in rows) for split, rows in splits.items()}
    assert counted == {
        "train": {"a": 14, "b": 14, None: 7},
        "val": {"a": 4, "b": 4, None: 2},
        "eval": {"a": 2, "b": 2, None: 1},
    }
    texts = [row.text for rows in splits.values() for row in rows]
    assert len(set(texts)) == len(texts)
    metadata = json.loads((tmp_path / "metadata.json").read_text(encoding="utf-8"))
    assert metadata["cards"] == {"a": 0, "b": 1}
    assert metadata["seed"] == 3
    assert (
        metadata["counts"]
        == report.counts
        == {split: {card or "none": count for card, count in counts.items()} for split, counts in counted.items()}
    )


def test_the_seed_decides_the_split(tmp_path: Path) -> None:
    sources = {"a": examples("a", 30), "b": examples("b", 30)}
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        write_dataset(sources, tmp_path / name, seed=seed)
    one, again, two = ((tmp_path / name / "val.jsonl").read_bytes() for name in ("one", "again", "two"))
    assert one == again != two


def test_repeated_and_ambiguous_texts_are_reported(tmp_path: Path) -> None:
    both = [RoutingExample(text="Hello  there", card="a"), RoutingExample(text="hello there", card="b")]
    sources = {"a": [*examples("a", 9), *examples("a", 9)[:2], both[0]], "b": [*examples("b", 9), both[1]]}
    report = write_dataset(sources, tmp_path)
    assert report.repeated == 2
    assert report.ambiguous == {"hello there": ("a", "b")}
    texts = [row.text for rows in read_all(tmp_path).values() for row in rows]
    assert len(texts) == 18
    assert not any("ello" in text for text in texts)


@pytest.mark.parametrize(
    ("sources", "shares", "message"),
    [
        ({"a": examples("a", 2), "b": []}, (0.1, 0.1), "more distinct texts of card 'b', got 0"),
        ({"a": examples("a", 9)}, (0.5, 0.5), "leave something to train on"),
        ({"a": examples("b", 9)}, (0.1, 0.1), "examples of card 'a', got one of 'b'"),
    ],
)
def test_what_cannot_be_split_is_refused(
    tmp_path: Path, sources: Any, shares: tuple[float, float], message: str
) -> None:
    with pytest.raises(RoutingDataError, match=message):
        write_dataset(sources, tmp_path, val=shares[0], eval=shares[1])
