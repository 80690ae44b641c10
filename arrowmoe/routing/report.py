"""A routing evaluation as one HTML file that opens anywhere: no script, no network, light and dark, readable aloud."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from arrowmoe.errors import RoutingError
from arrowmoe.routing import charts
from arrowmoe.routing.charts import Series, Words, number, percent
from arrowmoe.routing.markup import document, el, table
from arrowmoe.routing.metrics import Coverage, Histogram, Proportion, RoutingEvaluation
from arrowmoe.routing.report_style import STYLE

NO_CARD = "no card"
NOT_MEASURED = "–"
HEADLINES = 5

_Line = tuple[int, str, RoutingEvaluation]


@dataclass(frozen=True, kw_only=True)
class Example:
    """A prompt with the gates it got (card → weight; none: the bare base), what it was for, and the router's reason.

    `label` is the right card, `NO_CARD` for a prompt that none is for, None where nobody has said.
    """

    text: str
    gates: Mapping[str, float]
    label: str | None = None
    p_value: float | None = None
    why: str = ""


def html(
    evaluations: RoutingEvaluation | Mapping[str, RoutingEvaluation],
    *,
    examples: Sequence[Example] = (),
    title: str = "Routing report",
) -> str:
    """The report on one router, or on several by name, which are then compared. Raises `RoutingError` for none."""
    named = {"router": evaluations} if isinstance(evaluations, RoutingEvaluation) else dict(evaluations)
    if not named:
        raise RoutingError("expected at least one evaluation to report on, got none")
    main = el(
        "main",
        *_header(title, named),
        el("div", el("div", _metrics_table(named), class_="scroll"), class_="panel"),
        el("h2", "How good, how sure, how costly"),
        el("div", *_curves(named), class_="grid-2"),
        *(part for at, name in enumerate(named) for part in _details(f"e{at}", name, named[name], len(named) > 1)),
        *_examples(examples),
    )
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("title", title),
        el("style", STYLE),
    )
    return document(el("html", head, el("body", main), lang="en"))


def _header(title: str, named: Mapping[str, RoutingEvaluation]) -> list[Element]:
    (name, first), *rest = named.items()
    prompts = f"{first.rows:,} prompts, {len(first.names):,} cards"
    compared = f"; the figures here are those of {name}, the first of {len(named)} compared" if rest else ""
    shown = [(label, form(first)) for label, form in _METRICS.items()][:HEADLINES]
    tiles = [el("div", el("dt", label), el("dd", value.split(" (")[0])) for label, value in shown]
    return [el("h1", title), el("p", f"{prompts}{compared}.", class_="lead"), el("dl", *tiles, class_="tiles")]


def _metrics_table(named: Mapping[str, RoutingEvaluation]) -> Element:
    rows = [[label, *(form(evaluation) for evaluation in named.values())] for label, form in _METRICS.items()]
    return table("Shares carry their 95 % interval.", ["figure", *named], rows)


def _share(share: Proportion | None) -> str:
    if share is None:
        return NOT_MEASURED
    return f"{percent(share.value)} ({100 * share.low:.1f}–{100 * share.high:.1f})"


def _recall(evaluation: RoutingEvaluation) -> str:
    found = [percent(at.recall) for at in evaluation.rejections if at.rate == 0.05]
    return found[0] if found else NOT_MEASURED


def _optional(value: float | None, form: Callable[[float], str]) -> str:
    return NOT_MEASURED if value is None else form(value)


_METRICS: dict[str, Callable[[RoutingEvaluation], str]] = {
    "Accuracy of the best card": lambda e: _share(e.accuracy),
    "AUROC, in against out of scope": lambda e: _optional(e.auroc, percent),
    "Out-of-scope recall at 5 % false rejection": _recall,
    "False rejection": lambda e: _share(e.false_rejection),
    "Milliseconds per decision": lambda e: _optional(e.seconds_per_decision, lambda s: number(1000 * s)),
    "Accuracy of what it routed": lambda e: _share(e.routed_accuracy),
    "Out of scope rejected": lambda e: _share(e.out_of_scope_rejection),
    "Area under risk-coverage": lambda e: number(e.risk_coverage.aurc),
    "Expected calibration error": lambda e: _optional(e.calibration.ece if e.calibration else None, percent),
    "Gate entropy (nats)": lambda e: number(e.gate_entropy_nats),
    "Most used card's share": lambda e: percent(max(e.marginal_use[:-1], default=0.0)),
}


def _curves(named: Mapping[str, RoutingEvaluation]) -> list[Element]:
    lines = [(slot, name if len(named) > 1 else "", e) for slot, (name, e) in enumerate(named.items())]
    figures = [_risk(lines), _compute(lines)]
    return [*figures, _reliability(lines)] if any(e.calibration for e in named.values()) else figures


def _risk(lines: Sequence[_Line]) -> Element:
    words = Words(
        key="risk",
        title="Risk against coverage",
        description="Share of errors if only the most confident prompts are answered. Lower is better.",
    )
    series = [
        Series(slot=slot, name=name, points=list(zip(e.risk_coverage.coverages, e.risk_coverage.risks, strict=True)))
        for slot, name, e in lines
    ]
    y = charts.axis_over("errors", [py for one in series for _, py in one.points], percent)
    return charts.lines(words, series, charts.Axis(label="prompts answered"), y)


def _compute(lines: Sequence[_Line]) -> Element:
    words = Words(
        key="compute",
        title="Performance against compute",
        description="Prompts dealt with rightly, by the experts that they cost, as the score asked for falls.",
    )
    series = [
        Series(slot=slot, name=name, points=[(point.experts, point.accuracy) for point in e.compute])
        for slot, name, e in lines
    ]
    x = charts.axis_over("experts per prompt", [px for one in series for px, _ in one.points], number)
    return charts.lines(words, series, x, charts.Axis(label="dealt with rightly"), dots=True)


def _reliability(lines: Sequence[_Line]) -> Element:
    words = Words(
        key="reliability",
        title="Reliability",
        description="Accuracy at each confidence. On the diagonal the router is right as often as it says.",
    )
    series = [
        Series(slot=slot, name=name, points=[(part.confidence, part.accuracy) for part in e.calibration.bins])
        for slot, name, e in lines
        if e.calibration is not None
    ]
    x, y = charts.Axis(label="confidence"), charts.Axis(label="accuracy")
    return charts.lines(words, series, x, y, diagonal=True, dots=True)


def _details(key: str, name: str, evaluation: RoutingEvaluation, several: bool) -> list[Element]:
    heading = el("h2", f"In detail: {name}" if several else "In detail")
    figures = el("div", _scores(key, evaluation.histogram), _confusion(key, evaluation), class_="grid-2")
    if not evaluation.coverage:
        return [heading, figures]
    return [heading, figures, el("div", el("div", _coverage_table(evaluation), class_="scroll"), class_="panel")]


def _scores(key: str, counted: Histogram) -> Element:
    words = Words(
        key=f"{key}-scores",
        title="Scores in and out of scope",
        description="The less the two overlap, the better the router knows when no card fits.",
    )
    groups = [("in scope", counted.in_scope), ("out of scope", counted.out_of_scope)]
    shares = [(name, [count / sum(counts) for count in counts]) for name, counts in groups if sum(counts)]
    return charts.bars(words, counted.edges, shares, "score of the best card")


def _confusion(key: str, evaluation: RoutingEvaluation) -> Element:
    words = Words(
        key=f"{key}-confusion",
        title="Confusion",
        description="Labels down, chosen cards across, as a share of each label; the table lists the commonest errors.",
    )
    return charts.heat(words, [*evaluation.names, "out of scope"], [*evaluation.names, NO_CARD], evaluation.confusion)


def _coverage_table(evaluation: RoutingEvaluation) -> Element:
    rows = [[percent(at.alpha), _share(at.overall), *_extremes(at, evaluation.names)] for at in evaluation.coverage]
    caption = "Does the false-rejection rate hold? Measured on prompts in scope, overall and by card."
    return table(caption, ["α asked for", "measured", "least rejected card", "most rejected card"], rows)


def _extremes(at: Coverage, names: Sequence[str]) -> list[str]:
    shares = [(share.value, name) for share, name in zip(at.by_card, names, strict=True) if share is not None]
    return [f"{name} {percent(value)}" for value, name in (min(shares), max(shares))]


def _examples(examples: Sequence[Example]) -> list[Element]:
    if not examples:
        return []
    header = el("tr", *(el("th", cell, scope="col") for cell in ("prompt", "gates", "p", "label", "why")))
    rows = [
        el(
            "tr",
            el("th", example.text, scope="row", class_="prompt"),
            el("td", *(_gate(name, weight) for name, weight in (example.gates or {NO_CARD: 0.0}).items())),
            el("td", _optional(example.p_value, number)),
            el("td", _verdict(example)),
            el("td", example.why, class_="note"),
        )
        for example in examples
    ]
    shown = el("table", el("caption", "Prompts and what the router did."), el("thead", header), el("tbody", *rows))
    return [el("h2", "Examples"), el("div", el("div", shown, class_="scroll"), class_="panel")]


def _gate(name: str, weight: float) -> Element:
    width = 64 * min(1.0, max(0.0, weight))
    track = el("rect", x=0, y=0, width=64, height=8, rx=4, class_="track")
    bar = el("svg", track, el("rect", x=0, y=0, width=width, height=8, rx=4, class_="fill"), aria_hidden="true")
    return el("div", bar, f"{name} {weight:.2f}" if weight else name, class_="gate")


def _verdict(example: Example) -> Element:
    if example.label is None:
        return el("span", NOT_MEASURED)
    chosen = max(example.gates, key=lambda name: example.gates[name]) if example.gates else NO_CARD
    right = chosen == example.label
    return el("span", f"{'✓' if right else '✗'} {example.label}", class_="right" if right else "wrong")
