from __future__ import annotations

import json
import socket
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from arrowmoe import doctor
from arrowmoe.settings import Settings
from registry.store import Registry
from tests.arrowmoe.cli.conftest import Cli


def by_name(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in rows}


def test_a_sound_home_is_ok(cli: Cli, home: Path) -> None:
    Registry.open(home).close()
    home.chmod(0o700)
    checks = by_name(cli("doctor", "--json").json)
    assert all(set(check) == {"name", "status", "detail", "hint"} for check in checks.values())
    for name in ("python", "package names", "home", "identity", "catalog", "node"):
        assert checks[name]["status"] == "ok", checks[name]
    assert checks["catalog"]["detail"] == "0 cards"


def test_nothing_is_made(tmp_path: Path) -> None:
    checks = {check.name: check for check in doctor.examine(Settings(home=tmp_path / "deep" / "home"))}
    assert "will be made" in checks["home"].detail
    assert not (tmp_path / "deep").exists()


def test_a_home_that_is_no_directory_fails(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = cli("doctor", "--home", tmp_path / "file", "--json")
    assert done.code == 1
    assert by_name(json.loads(done.out))["home"]["status"] == "fail"


def test_a_home_open_to_others_is_warned_of(home: Path) -> None:
    home.chmod(0o755)
    checks = {check.name: check for check in doctor.examine(Settings(home=home))}
    assert (checks["home"].status, checks["home"].hint) == ("warn", f"chmod 700 {home}")


def test_another_owner_of_a_name_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(metadata, "packages_distributions", lambda: {"registry": ["arrowmoe", "python-registry"]})
    failed = [check for check in doctor.examine(Settings(home=tmp_path)) if check.status == "fail"]
    assert ["python-registry" in check.detail for check in failed] == [True]


def test_a_misspelt_variable_is_told(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARROWMOE_NAEM", "x")
    monkeypatch.setenv("ARROWMOE_ROUTER__MAX_EXPERTS", "2")
    monkeypatch.setenv("ARROWMOE_DEBUG", "0")
    assert by_name(cli("doctor", "--json").json)["variables"]["detail"] == "no such setting: ARROWMOE_NAEM"


def test_missing_models_and_multicast_are_warnings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def version(name: str) -> str:
        if name in doctor.BUILTIN_WHEELS.values():
            raise metadata.PackageNotFoundError(name)
        return "1"

    class NoSocket:
        def __init__(self, *_: object) -> None:
            raise OSError("no network")

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(socket, "socket", NoSocket)
    checks = {check.name: check for check in doctor.examine(Settings(home=tmp_path))}
    for name in ("builtin:smollm2", "builtin:minilm", "multicast"):
        assert checks[name].status == "warn"
        assert checks[name].hint


def test_people_read_what_to_do(cli: Cli, home: Path) -> None:
    home.chmod(0o755)
    shown = cli("doctor").out
    assert "warn  home: " in shown
    assert f"→ chmod 700 {home}" in shown


def test_it_is_told_whether_a_teacher_can_be_asked(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def teacher() -> tuple[str, str]:
        check = by_name(cli("doctor", "--json").json)["teacher"]
        return check["status"], check["detail"]

    assert teacher() == ("ok", "none, so gaps are found and stay open")
    monkeypatch.setenv("ARROWMOE_TEACHER__MODEL", "oracle-1")
    monkeypatch.setenv("ARROWMOE_TEACHER__KEY_VARIABLE", "ORACLE_KEY")
    status, detail = teacher()
    assert (status, "ORACLE_KEY is not set" in detail) == ("warn", True)
    monkeypatch.setenv("ORACLE_KEY", "secret-word")
    status, detail = teacher()
    assert (status, "description" in detail, "secret-word" in detail) == ("ok", True, False)
    monkeypatch.setenv("ARROWMOE_TEACHER__DISCLOSURE", "never")
    assert teacher() == ("warn", "oracle-1 may not be told anything")
    assert "variables" not in by_name(cli("doctor", "--json").json)
