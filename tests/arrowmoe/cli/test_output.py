from __future__ import annotations

import json

import pytest

from arrowmoe.cli.output import Output, clean, short, size


def test_each_mode_prints_its_own_form(capsys: pytest.CaptureFixture[str]) -> None:
    for mode, expected in (("human", "two cards\n"), ("quiet", "a\nb\n")):
        out = Output(mode)  # type: ignore[arg-type]
        out.result(["a", "b"], lambda out=out: out.line("two cards"), quiet=["a", "b"])  # type: ignore[misc]
        assert capsys.readouterr().out == expected
    Output("json").result(["ä"], lambda: None)
    assert json.loads(capsys.readouterr().out) == ["ä"]


def test_what_strangers_write_steers_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    out = Output()
    out.line("a\x1b[31mred\x9b2J[bold]b[/bold]")
    out.table(("name",), [("\x1b]0;title\x07",)], "none")
    out.error("bad\x1b[2J", "hint\r")
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err
    assert "\x9b" not in captured.out
    assert "[bold]b[/bold]" in captured.out


def test_what_turns_the_direction_of_writing_is_replaced() -> None:
    assert clean("a\u202egnp.exe\u2066b\u200fc\u2028d") == "a�gnp.exe�b�c�d"
    assert clean("größe 日本 👩‍💻") == "größe 日本 👩‍💻"


def test_a_value_of_several_lines_forges_no_field(capsys: pytest.CaptureFixture[str]) -> None:
    Output().fields([("about", "one\npublisher  nobody"), ("publisher", "ada")])
    assert capsys.readouterr().out.splitlines() == ["about      one", "           publisher  nobody", "publisher  ada"]


def test_a_table_without_rows_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    Output().table(("name",), [], "no cards")
    assert capsys.readouterr().out == "no cards\n"


def test_long_lines_are_not_broken_where_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    Output().line("word " * 100)
    assert capsys.readouterr().out.count("\n") == 1


def test_notes_and_errors_leave_stdout_alone(capsys: pytest.CaptureFixture[str]) -> None:
    Output().note("by the way")
    Output("json").note("not said")
    Output("json").error("no", "try this")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "by the way\nerror: no\nhint: try this\n"


def test_where_nobody_watches_progress_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with Output().progress("working") as advance:
        advance("half", 1, 2)
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3 << 20, "3.0 MiB"), (5 << 40, "5120.0 GiB")]
)
def test_sizes(count: int, text: str) -> None:
    assert size(count) == text


def test_short_digests_and_clean_text() -> None:
    assert short("blake3:" + "0123456789abcdef" * 4) == "0123456789ab"
    assert clean("tab\tline\nend\x00") == "tab\tline\nend�"
