"""Manifests made by hand to do harm, inside of files that are otherwise in order."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from registry.errors import ManifestError
from tests.registry.cards import small_card
from tests.registry.hostile import edited, refused, write


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "card.lora.arrow"


def change(*keys: str | int, to: object) -> Any:
    def edit(fields: Any) -> None:
        for key in keys[:-1]:
            fields = fields[key]
        fields[keys[-1]] = to

    return edit


@pytest.mark.parametrize(
    "edit",
    [
        change("name", to="../../etc/passwd"),
        change("name", to="x" * 97),
        change("name", to="a/b"),
        change("name", to="new\nline"),
        change("version", to="../1"),
        change("tensors", 0, "name", to="m" * 513),
        change("tensors", 0, "name", to=""),
        change("tensors", 0, "shape", to=[1 << 41, 1]),
        change("tensors", 0, "shape", to=[-4, -8]),
        change("tensors", 0, "nbytes", to=1),
        change("tensors", 0, "digest", to="blake3:" + "A" * 64),
        change("tensors", 0, "dtype", to="float64"),
        change("tensors", to=[]),
        change("adapter", "rank", to=3),
        change("base", "fingerprint", to="blake3:" + "0" * 64),
        change("format", to=2),
        change("description", to="x" * 20_000),
        change("created", to="yesterday"),
    ],
)
def test_a_manifest_that_lies_is_refused(path: Path, edit: Any) -> None:
    write(path, small_card(), metadata=edited(small_card(), edit))
    refused(path, ManifestError, "expected|differ")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"name":"sample"', b'"name":"sample","name":"other"'),
        (b'"rank":4', b'"rank":4,"rank":4'),
        (b'"alpha":8.0', b'"alpha":NaN'),
        (b'"alpha":8.0', b'"alpha":1e999'),
        (b'"description":""', b'"description":"\xff"'),
        (b'"description":""', b'"description":"\\ud800"'),
        (b'"training":{}', b'"training":' + b"[" * 100_000 + b"]" * 100_000),
        (b'"training":{}', b'"training":{"x":' + b"1" * 5_000 + b"}"),
    ],
    ids=["name twice", "rank twice", "NaN", "infinite", "no UTF-8", "half a surrogate", "deep", "long number"],
)
def test_a_manifest_that_is_no_plain_json_is_refused(path: Path, old: bytes, new: bytes) -> None:
    data = small_card(description="", training={}).manifest_bytes
    write(path, small_card(), metadata={b"arrowmoe.manifest": data.replace(old, new, 1)})
    assert old in data
    refused(path, ManifestError, "not of the expected form")


@pytest.mark.parametrize(
    ("key", "value"),
    [("tensors", [{}] * 300_000), ("domains", [0] * 400_000), ("rank_pattern", {str(i): "x" for i in range(70_000)})],
)
def test_a_manifest_full_of_errors_takes_little_memory(key: str, value: object) -> None:
    # pydantic collects every error: without FailFast the first of these took 2 GiB.
    code = """
import json, sys
from tests.memory import peak_bytes
from registry.errors import ManifestError
from registry.manifest import Manifest
data = sys.stdin.buffer.read()
before = peak_bytes()
try:
    Manifest.parse(data)
except ManifestError:
    print(peak_bytes() - before)
"""
    fields = json.loads(small_card().manifest_bytes)
    (fields["adapter"] if key == "rank_pattern" else fields)[key] = value
    data = json.dumps(fields, separators=(",", ":")).encode()
    result = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=True)
    assert int(result.stdout) < 64 << 20
