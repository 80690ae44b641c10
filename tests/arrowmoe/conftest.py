"""A clean environment, homes by name, and tiny models in directories."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.arrowmoe.nodes import save_tiny_models


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No `ARROWMOE_*` variable of the machine's."""
    for name in list(os.environ):
        if name.startswith("ARROWMOE_"):
            monkeypatch.delenv(name)
    return monkeypatch


@pytest.fixture
def make_home(tmp_path: Path, empty_home: Path) -> Callable[[str], Path]:
    """Makes a home by name in this test's directory."""

    def make(name: str) -> Path:
        shutil.copytree(empty_home, tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture
def home(make_home: Callable[[str], Path]) -> Path:
    return make_home("home")


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Directories of a tiny causal model and a tiny encoder."""
    return save_tiny_models(tmp_path_factory.mktemp("models"))
