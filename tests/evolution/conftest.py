"""Homes for nights on fakes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.evolution.nights import (
    Home,
    Make,
    adapters,
    home_at,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapters(tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def directory(tmp_path: Path, empty_home: Path) -> Path:
    shutil.copytree(empty_home, tmp_path / "home")
    return tmp_path / "home"


@pytest.fixture
def make(directory: Path, trained: Path) -> Iterator[Make]:
    homes: list[Home] = []

    def made(**parts: Any) -> Home:
        homes.append(home_at(directory, trained, **parts))
        return homes[-1]

    yield made
    for home in homes:
        home.registry.close()
