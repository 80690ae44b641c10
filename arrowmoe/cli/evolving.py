"""How `arrowmoe evolve` tells of nights, gaps, the gate's evidence and losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import pairwise
from typing import Any

from arrowmoe.cli.output import Output

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 40


def show_gaps(out: Output, found: Sequence[Mapping[str, Any]]) -> None:
    """A table of gaps."""
    rows = [
        (one["gap"], one["name"], one["base"], one["prompts"], f"{one['worth']:.3g}", one["state"], one["why"])
        for one in found
    ]
    columns = ("gap", "name", "base", "prompts>", "worth>", "state", "why")
    out.table(columns, rows, "no gaps were found yet; `arrowmoe evolve run --dry-run` looks for some")


def show_night(out: Output, night: Mapping[str, Any]) -> None:
    """A night, with what became of its gaps."""
    out.fields(
        [
            ("night", night["night"]),
            ("planned for", moment(night["planned_at"])),
            ("took", None if night["seconds"] is None else f"{night['seconds']:.0f} s"),
            ("ended early", night["error"]),
            ("found", ", ".join(f"{count} {state}" for state, count in night.get("found", {}).items())),
            ("withdrawn", ", ".join(night.get("withdrawn", ()))),
            ("published", ", ".join(night["published"])),
            ("consolidated", ", ".join(f"{name} into {label}" for name, label in night["consolidated"].items())),
            ("not consolidated", "\n".join(f"{name}: {why}" for name, why in night["not_consolidated"].items())),
            ("taken back", ", ".join(night["taken_back"])),
        ]
    )
    for gap in night["gaps"]:
        out.line(f"  {gap['gap']}  {gap['name']}: {gap['state']}: {gap['why']}")
    if not night["gaps"]:
        out.line("  no gap was worth an expert", style="dim")
    for job in night["jobs"]:
        if job["state"] != "done":
            out.line(f"  {job['job']} is {job['state']} at {job['stage'] or job['kind']}: {job['error'] or 'no error'}")
    if night.get("teacher"):
        out.fields([("teacher", asked(night["teacher"]))])


def show_gap(out: Output, gap: Mapping[str, Any]) -> None:
    """A gap, with the evidence on its expert."""
    job, examples = gap["job"], gap["examples"] or {}
    out.fields(
        [
            ("gap", f"{gap['gap']} {gap['name']}"),
            ("base", gap["base"]),
            ("about", gap["description"]),
            ("prompts", gap["prompts"]),
            ("worth", f"{gap['worth']:.3g}"),
            ("state", f"{gap['state']}: {gap['why']}"),
            ("card", gap["card"]),
            ("job", job and f"{job['job']}, {job['state']} at {job['stage']}, {job['attempts']} attempts"),
            ("error", job and job["error"]),
            ("examples", ", ".join(f"{count} {name}" for name, count in examples.items() if name != "dropped")),
            ("dropped", ", ".join(f"{count} {why}" for why, count in examples.get("dropped", {}).items())),
            *((f"loss, {one['phase']}", sparkline(one["loss_nats"])) for one in gap["losses"]),
            ("teacher", gap["teacher"] and f"{asked(gap['teacher'])} (its whole night)"),
        ]
    )
    if gap["gate"] is not None:
        out.line()
        out.fields(evidence(gap["gate"]))


def show_status(out: Output, found: Mapping[str, Any]) -> None:
    """The night under way and the next one."""
    teacher, schedule, left = found["teacher"], found["schedule"], found["budget"]["left"]
    nights = [f"{one['night']}, planned for {moment(one['planned_at'])}" for one in found["unfinished"]]
    out.fields(
        [
            ("night", ", ".join(nights) or "none"),
            ("state", ("under way" if found["running"] else "left unfinished") if nights else None),
            *(("now", _at_work(one)) for one in found["training"]),
            ("next", moment(schedule["next"]) if schedule["next"] else "only when it is asked for"),
            ("schedule", schedule["expression"] and f"{schedule['expression']} (set by {schedule['set_by']})"),
            ("teacher", _teacher(teacher) if teacher else "none: gaps are found and stay open"),
            ("budget left", f"${left['usd']:.4f} and {left['tokens']:,} tokens"),
        ]
    )
    rows = [(one["job"], one["gap"] or "", one["state"], one["stage"], one["error"] or "") for one in found["jobs"]]
    if rows:
        out.line()
        out.table(("job", "gap", "state", "stage", "last error"), rows, "")
    if schedule["expression"] and not found["node"]:
        out.note("no node runs on this home, so no night begins by itself")


def show_calls(out: Output, exchanges: Sequence[Mapping[str, Any]]) -> None:
    """What was said to the teacher and by it, word for word."""
    for one in exchanges:
        out.line()
        out.fields(
            [
                ("at", moment(one["created"])),
                ("to", f"{one['teacher']}, {one['purpose']}, {one['disclosure']}, ${one['usd']:.6f}"),
                ("sent", one["request"]),
                ("got", one["response"]),
                ("error", one["error"]),
            ]
        )


def evidence(gate: Mapping[str, Any]) -> list[tuple[str, object]]:
    """The gate's evidence in short, as fields; `gate` is what `views.gate` gives."""
    low, lift, high = gate["lift_points"]
    rise, most = gate["served_rise_nats"]
    before = [("base", gate["base"]), ("so far", gate["incumbent"]), ("with it", gate["candidate"])]
    accuracy = ", ".join(f"{name} {100 * value:.1f} %" for name, value in before if value is not None)
    return [
        ("gate", "passed" if gate["accepted"] else "refused"),
        ("right", _of(accuracy, gate["items"], "held-out items")),
        ("lift", None if lift is None else f"{lift:.1f} points ({_plain(low)} to {_plain(high)})"),
        ("p", None if gate["p_value"] is None else f"{gate['p_value']:.2g}, asked {_plain(gate['alpha'], 3)}"),
        ("anchors", _of(_points(gate["anchors_low_points"]), gate["anchors"], "items")),
        ("NLL, served", None if rise is None else f"{rise:+.4f} nats per token, at most {_plain(most, 4)}"),
        ("scale", gate["scale"]),
        ("against it", "\n".join(gate["reasons"])),
    ]


def asked(teacher: Mapping[str, Any]) -> str:
    """What a night's teacher was asked, and what that cost."""
    if not teacher["calls"]:
        return "was not asked"
    tokens = teacher["prompt_tokens"] + teacher["completion_tokens"]
    failed = f", {teacher['failed']} of them failed" if teacher["failed"] else ""
    return (
        f"{', '.join(teacher['teachers'])}: {teacher['calls']} calls{failed}, {tokens:,} tokens, ${teacher['usd']:.4f}"
    )


def sparkline(values: Sequence[float | None]) -> str:
    """The first and last value, and between them the course of all, at most `WIDTH` characters wide."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    parts = min(WIDTH, len(known))
    edges = [round(at * len(known) / parts) for at in range(parts + 1)]
    means = [sum(known[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, span = min(means), max(means) - min(means)
    heights = [round((len(BARS) - 1) * (mean - low) / span) if span else 0 for mean in means]
    return f"{known[0]:.3f} {''.join(BARS[height] for height in heights)} {known[-1]:.3f}"


def moment(iso: str) -> str:
    """A moment as the clock on the wall shows it."""
    return datetime.fromisoformat(iso).astimezone().strftime("%Y-%m-%d %H:%M %Z")


def _at_work(one: Mapping[str, Any]) -> str:
    loss = "" if one["loss_nats"] is None else f", loss {one['loss_nats']:.3f}"
    steps = f" {one['step']}/{one['steps']}{loss}" if one["steps"] else ""
    return f"{one['gap'] or one['base']}: {one['stage']}{steps}"


def _teacher(teacher: Mapping[str, Any]) -> str:
    key = "" if teacher["key_set"] else f"; {teacher['key_variable']} is not set here"
    return f"{teacher['model']} at {teacher['base_url']}, is told {teacher['disclosure']}{key}"


def _points(low: float | None) -> str:
    return "" if low is None else f"{low:+.1f} points at worst"


def _of(text: str, count: float | None, what: str) -> str:
    return f"{text}, of {count:.0f} {what}" if text and count is not None else text


def _plain(value: float | None, digits: int = 1) -> str:
    return "?" if value is None else f"{value:.{digits}g}" if digits > 1 else f"{value:.{digits}f}"


__all__ = [
    "asked",
    "evidence",
    "moment",
    "show_calls",
    "show_gap",
    "show_gaps",
    "show_night",
    "show_status",
    "sparkline",
]
