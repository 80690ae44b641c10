"""The report as a browser would take it: balanced, self-contained, escaped, and saying the figures it was given."""

from __future__ import annotations

from html.parser import HTMLParser

import numpy as np
import pytest

from arrowmoe.errors import RoutingError
from arrowmoe.routing.charts import Axis, percent
from arrowmoe.routing.metrics import NOBODY, RoutingEvaluation, evaluate
from arrowmoe.routing.report import NO_CARD, Example, html

VOID = {"meta"}
FETCHES = {"src", "href", "xlink:href", "srcset", "action", "data", "poster", "background"}
HOSTILE = "</title><script>alert(1)</script><img src=https://evil.example/x onerror='x'>&amp;\"\x00\x1b[31m\ud800"


class Page(HTMLParser):
    """What a page holds; fails on a tag that is closed out of turn or not at all."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self._open[-1], data))

    def all(self, tag: str) -> list[str]:
        return [text for inside, text in self.texts if inside == tag]


def evaluation(cards: int = 3, *, soft: bool = True, names: list[str] | None = None) -> RoutingEvaluation:
    rng = np.random.default_rng(0)
    labels = np.append(np.arange(90) % cards, [NOBODY] * 30)
    logits = rng.normal(size=(120, cards))
    logits[np.arange(90), labels[:90]] += 3
    weights = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    gates = weights if soft else (weights == weights.max(axis=1, keepdims=True)).astype(float)
    gates[-15:] = 0
    p_values = rng.uniform(size=120)
    return evaluate(names or [f"card {at}" for at in range(cards)], gates, logits.max(axis=1), p_values, labels)


def test_the_report_is_one_balanced_page_with_every_figure() -> None:
    page = Page(html(evaluation(), title="Ten cards"))
    assert page.all("h1") == ["Ten cards"]
    assert page.all("h3") == [
        "Risk against coverage",
        "Performance against compute",
        "Reliability",
        "Scores in and out of scope",
        "Confusion",
    ]


def test_nothing_is_fetched_and_nothing_runs() -> None:
    text = html({"a": evaluation(), "b": evaluation(soft=False)}, examples=[Example(text="x", gates={"a": 1.0})])
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "embed", "use", "image"} & set(page.tags)
    assert not [found for found in page.attributes if found[1] in FETCHES or found[1].startswith("on")]
    assert "http:" not in text
    assert "https:" not in text
    assert "url(" not in text
    assert "@import" not in text
    assert ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


def test_hostile_text_is_shown_not_obeyed() -> None:
    example = Example(text=HOSTILE, gates={HOSTILE: 0.5}, label=HOSTILE, why=HOSTILE)
    cards = [HOSTILE, "</style><script>", "x"]
    text = html({HOSTILE: evaluation(names=cards), "b": evaluation()}, examples=[example], title=HOSTILE)
    page = Page(text)
    assert "script" not in page.tags
    assert "img" not in page.tags
    shown = HOSTILE.replace("\x00", "�").replace("\x1b", "�").replace("\ud800", "�")
    assert page.all("h1") == [shown]
    assert shown in page.all("th")
    assert {"\x00", "\x1b"}.isdisjoint(text)
    text.encode()


def test_each_picture_has_a_name_a_description_and_its_numbers() -> None:
    page = Page(html({"a": evaluation(), "b": evaluation()}))
    pictures = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-labelledby")]
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(pictures) == page.tags.count("figure") == page.tags.count("details") == 7
    assert len(ids) == len(set(ids))
    assert {part for label in pictures for part in label.split()} <= set(ids)
    assert ("html", "lang", "en") in page.attributes


def test_figures_are_those_of_the_evaluation() -> None:
    found = evaluation()
    page = Page(html(found))
    cells = page.all("td")
    assert found.accuracy is not None
    assert found.auroc is not None
    assert percent(found.accuracy.value) in page.all("dd")
    assert percent(found.auroc) in cells
    assert any(cell.startswith(f"{percent(found.accuracy.value)} (") for cell in cells)
    counts = [int(text) for text in page.all("text") if text.isdecimal()]
    assert max(count for row in found.confusion for count in row) in counts


def test_what_was_not_measured_is_a_dash() -> None:
    bare = evaluate(["a"], [[1.0], [1.0]], [1, 2], None, [0, 0])
    page = Page(html(bare))
    assert "Reliability" not in page.all("h3")
    assert page.all("td").count("–") == 5


def test_several_evaluations_are_compared_side_by_side() -> None:
    page = Page(html({"closed form": evaluation(), "centroids": evaluation(soft=False)}))
    assert page.all("h2") == ["How good, how sure, how costly", "In detail: closed form", "In detail: centroids"]
    assert {"closed form", "centroids"} <= set(page.all("th"))
    assert page.all("li").count("closed form") == 3
    assert page.all("li").count("centroids") == 2, "hard gates have no reliability"


def test_examples_show_gates_and_verdicts() -> None:
    examples = [
        Example(text="right", gates={"a": 0.75, "b": 0.25}, label="a", p_value=0.5),
        Example(text="wrong", gates={"b": 1.0}, label="a"),
        Example(text="rightly none", gates={}, label=NO_CARD),
        Example(text="nobody knows", gates={"a": 1.0}),
    ]
    page = Page(html(evaluation(), examples=examples))
    assert page.all("span") == ["✓ a", "✗ a", "✓ no card", "–"]
    assert [text for text in page.all("div") if text in ("a 0.75", "b 0.25", "no card")] == [
        "a 0.75",
        "b 0.25",
        "no card",
    ]


def test_many_cards_give_a_page_of_bearable_size() -> None:
    assert len(html(evaluation(77))) < 300_000


def test_no_evaluation_is_refused() -> None:
    with pytest.raises(RoutingError, match="at least one evaluation"):
        html({})


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (-3, 7, [-2, 0, 2, 4, 6]), (0, 0.013, [0, 0.005, 0.01])],
)
def test_ticks_are_round(low: float, high: float, ticks: list[float]) -> None:
    assert Axis(label="", low=low, high=high).ticks() == pytest.approx(ticks)
