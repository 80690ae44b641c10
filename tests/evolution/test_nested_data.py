"""Images from NumPy archives: what becomes of pixels, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evolution.errors import TrainingError
from evolution.nested_data import images_at

LABELS = np.array([3, 7])


def saved(directory: Path, **arrays: Any) -> str:
    path = directory / "images.npz"
    np.savez(path, **arrays)
    return path.as_uri()


def test_bytes_become_fractions_and_grey_goes_to_all_channels(tmp_path: Path) -> None:
    pixels = np.arange(8, dtype=np.uint8).reshape(2, 2, 2) * 30
    rows = images_at(saved(tmp_path, images=pixels, labels=LABELS), (3, 2, 2))
    assert [label for _, label in rows] == [3, 7]
    expected = torch.tensor([[0.0, 30.0], [60.0, 90.0]]) / 255
    assert torch.equal(rows[0][0], expected.expand(3, 2, 2))


def test_fractions_stay_as_they_are(tmp_path: Path) -> None:
    pixels = np.linspace(-1, 2, 24).reshape(2, 3, 2, 2)
    rows = images_at(saved(tmp_path, images=pixels, labels=LABELS), (3, 2, 2))
    assert torch.equal(rows[1][0], torch.tensor(pixels[1], dtype=torch.float32))


@pytest.mark.parametrize(
    ("arrays", "why"),
    [
        ({"images": np.zeros((2, 2, 2), np.uint8)}, "expected arrays"),
        ({"images": np.zeros((2, 3, 3), np.uint8), "labels": LABELS}, r"images of \(1, 2, 2\)"),
        ({"images": np.zeros((0, 2, 2), np.uint8), "labels": LABELS[:0]}, r"images of \(1, 2, 2\)"),
        ({"images": np.zeros((2, 2, 2), np.uint8), "labels": LABELS[:1]}, "2 whole labels"),
        ({"images": np.zeros((2, 2, 2), np.uint8), "labels": LABELS / 2}, "2 whole labels"),
        ({"images": np.full((2, 2, 2), np.nan), "labels": LABELS}, "finite fractions"),
        ({"images": np.zeros((2, 2, 2), np.int64), "labels": LABELS}, "finite fractions"),
        ({"images": np.array([[[{}]]] * 2), "labels": LABELS}, "expected arrays"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, arrays: dict[str, Any], why: str) -> None:
    with pytest.raises(TrainingError, match=why):
        images_at(saved(tmp_path, **arrays), (1, 2, 2))


@pytest.mark.parametrize("content", [None, b"", b"no archive"])
def test_what_is_no_archive_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "images.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TrainingError, match="expected arrays"):
        images_at(path.as_uri(), (1, 2, 2))
