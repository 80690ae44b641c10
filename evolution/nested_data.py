"""Images with labels, from a NumPy archive; never a pickle."""

from __future__ import annotations

import zipfile
from typing import Final

import numpy as np
import torch
from torch import Tensor

from evolution.errors import TrainingError
from evolution.training_job import path_of

Image = tuple[Tensor, int]
"""Pixels (channels, height, width) in fp32, and a label."""
Shape = tuple[int, int, int]
_KEYS: Final = ("images", "labels")


def images_at(url: str, shape: Shape) -> list[Image]:
    """`images` (n, h, w) or (n, c, h, w) and `labels` (n,) of an `.npz`; grey ones are repeated to all channels.

    Whole numbers of 0 to 255 become 0 to 1, fractions stay as they are. Raises `TrainingError` for what does not fit
    `shape` (channels, height, width).
    """
    try:
        with np.load(path_of(url), allow_pickle=False) as file:
            pixels, labels = (file[key] for key in _KEYS)
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise TrainingError(f"expected arrays {_KEYS} at {url}, so nothing is trained: {error}") from error
    if pixels.ndim == 3:
        pixels = np.repeat(pixels[:, None], shape[0], axis=1)
    if pixels.shape[1:] != shape or not len(pixels):
        raise TrainingError(f"expected images of {shape} at {url}, got {pixels.shape}, so the model cannot read them")
    if labels.shape != pixels.shape[:1] or labels.dtype.kind not in "iu":
        raise TrainingError(f"expected {len(pixels)} whole labels at {url}, got {labels.dtype} of {labels.shape}")
    rows = torch.from_numpy(_fractions(pixels, url))
    return list(zip(rows, map(int, labels), strict=True))


def _fractions(pixels: np.ndarray, url: str) -> np.ndarray:
    if pixels.dtype == np.uint8:
        return pixels.astype(np.float32) / 255
    if pixels.dtype.kind != "f" or not np.isfinite(pixels).all():
        raise TrainingError(f"expected pixels as uint8 or as finite fractions at {url}, got {pixels.dtype}")
    return pixels.astype(np.float32)


__all__ = ["Image", "Shape", "images_at"]
