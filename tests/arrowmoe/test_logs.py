from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from arrowmoe.logs import log_path, logging_to
from arrowmoe.settings import LogSettings
from registry.logs import get_logger

log = get_logger("arrowmoe.test")


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_where_nobody_watches_events_are_json() -> None:
    stream = io.StringIO()
    with logging_to(LogSettings(), stream=stream):
        log.info("card_fetched", bytes=3)
        log.debug("too_small")
        logging.getLogger("elsewhere").warning("of %s", "another library")
    first, second = events(stream.getvalue())
    assert (first["event"], first["bytes"], first["level"], first["logger"]) == (
        "card_fetched",
        3,
        "info",
        "arrowmoe.test",
    )
    assert (second["event"], second["level"], second["logger"]) == ("of another library", "warning", "elsewhere")


def test_a_person_reads_lines() -> None:
    stream = io.StringIO()
    with logging_to(LogSettings(format="human"), stream=stream):
        log.warning("card_failed", card="dates@1")
    assert "card_failed" in stream.getvalue()
    assert "card=dates@1" in stream.getvalue()


def test_the_file_is_rotated_and_only_some_are_kept(tmp_path: Path) -> None:
    settings = LogSettings(file_bytes=4096, file_count=2)
    with logging_to(settings, home=tmp_path, stream=io.StringIO()):
        for index in range(200):
            log.info("event", index=index, padding="x" * 50)
    names = sorted(path.name for path in log_path(tmp_path).parent.iterdir())
    assert names == ["arrowmoe.log", "arrowmoe.log.1", "arrowmoe.log.2"]
    assert all(path.stat().st_size <= 4096 for path in log_path(tmp_path).parent.iterdir())
    assert events(log_path(tmp_path).read_text())[-1]["index"] == 199


def test_console_and_file_have_their_own_levels(tmp_path: Path) -> None:
    stream = io.StringIO()
    with logging_to(LogSettings(level="info"), home=tmp_path, console_level="error", stream=stream):
        log.info("quiet")
    assert stream.getvalue() == ""
    assert [event["event"] for event in events(log_path(tmp_path).read_text())] == ["quiet"]


def test_an_exception_is_logged_whole(tmp_path: Path) -> None:
    stream = io.StringIO()
    with logging_to(LogSettings(), stream=stream):
        try:
            raise ValueError("the reason")
        except ValueError:
            log.exception("failed")
    assert "ValueError: the reason" in events(stream.getvalue())[0]["exception"]


def test_without_a_file_there_is_none_and_all_is_as_before_at_the_end(tmp_path: Path) -> None:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    with logging_to(LogSettings(file=False), home=tmp_path, stream=io.StringIO()):
        log.info("event")
    assert not (tmp_path / "logs").exists()
    assert (list(root.handlers), root.level) == (handlers, level)


def test_a_library_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    log.info("card_fetched", bytes=3)
    assert capfd.readouterr() == ("", "")
