"""A small vision transformer that has seen strokes and never a digit: the base of the continual benchmark's images.

It tells a hundred invented glyphs apart, each of one to three quadratic Béziers that are drawn anew every time, bent,
turned and shifted, on 8 × 8 pixels as scikit-learn's digits are. That takes minutes, so it is kept in the user's cache.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification

from arrowmoe.base_model import default_cache
from registry.digest import digest_of, hex_of
from registry.logs import get_logger

SIDE: Final = 8
SCALED: Final = 16
STROKES, POINTS_A_STROKE = 3, 12

log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """The glyphs, and how the base learns them; a change of any of it makes another base."""

    glyphs: int = 100
    steps: int = 1200
    batch_size: int = 128
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    weight_decay: float = 0.05
    seed: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Glyphs:
    """Control points (n, strokes, 3, 2) in [-1, 1]², and how many strokes each glyph has (n,)."""

    points: Tensor
    strokes: Tensor

    @classmethod
    def invented(cls, count: int, generator: torch.Generator) -> Glyphs:
        """Random ones; in most of them a stroke begins where the last one ended."""
        points = 1.5 * torch.rand(count, STROKES, 3, 2, generator=generator) - 0.75
        joined = torch.rand(count, generator=generator) < 0.7
        for stroke in range(1, STROKES):
            points[joined, stroke, 0] = points[joined, stroke - 1, 2]
        return cls(points=points, strokes=torch.randint(1, STROKES + 1, (count,), generator=generator))

    def drawn(self, which: Tensor, generator: torch.Generator) -> Tensor:
        """Images (n, 8, 8) in [0, 1] of the glyphs `which` (n,), no two alike."""
        curves = _curves(_moved(self.points[which], generator))
        unused = torch.arange(STROKES) >= self.strokes[which, None]
        curves = curves + 100.0 * unused[:, :, None, None]  # far outside the image
        nearest = torch.cdist(_pixels().expand(len(which), -1, -1), curves.flatten(1, 2)).amin(dim=-1)
        width = 0.2 + 0.1 * torch.rand(len(which), 1, generator=generator)
        ink = 1.3 - nearest / width + 0.03 * torch.randn(nearest.shape, generator=generator)
        return ink.clamp(0, 1).reshape(-1, SIDE, SIDE)


def scaled_up(images: Tensor) -> Tensor:
    """(n, 8, 8) in [0, 1] → (n, 1, 16, 16) in [-1, 1], as the base sees them."""
    return functional.interpolate(images[:, None] * 2 - 1, size=(SCALED, SCALED), mode="bilinear")


def stroke_model(how: Pretraining, cache: Path | None = None) -> ViTForImageClassification:
    """The base, in eval mode, from the cache or trained."""
    key = hex_of(digest_of(json.dumps(asdict(how)).encode()))[:16]
    path = (cache or default_cache()) / "continual" / f"strokes-{key}.safetensors"
    model = _untrained(how)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        _train(model, how)
        save_file(model.state_dict(), path.with_suffix(".partial"))
        path.with_suffix(".partial").replace(path)
    model.load_state_dict(load_file(path))
    return model.eval()


def _untrained(how: Pretraining) -> ViTForImageClassification:
    torch.manual_seed(how.seed)
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=SCALED,
        patch_size=4,
        num_channels=1,
        num_labels=how.glyphs,
    )
    return ViTForImageClassification(config)


def _train(model: nn.Module, how: Pretraining) -> None:
    generator = torch.Generator().manual_seed(how.seed)
    glyphs = Glyphs.invented(how.glyphs, generator)
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=how.weight_decay)
    model.train()
    for step in range(how.steps):
        which = torch.randint(how.glyphs, (how.batch_size,), generator=generator)
        logits = model(pixel_values=scaled_up(glyphs.drawn(which, generator))).logits
        loss = functional.cross_entropy(logits, which)
        for group in optimiser.param_groups:
            group["lr"] = how.learning_rate * min((step + 1) / how.warmup_steps, 1 - step / how.steps)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % 100 == 0:
            right = float((logits.argmax(dim=-1) == which).float().mean())
            log.info("pretraining", step=step, loss_nats=round(loss.item(), 3), right=round(right, 3))


def _moved(points: Tensor, generator: torch.Generator) -> Tensor:
    """Each glyph's points bent a little, then turned, stretched, slanted and shifted as one."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    count = len(points)
    angle, slant, stretch = 0.2 * random(count), 0.15 * random(count), 1 + 0.12 * random(count, 2)
    rows = torch.stack([angle.cos() * stretch[:, 0], slant - angle.sin(), angle.sin(), angle.cos() * stretch[:, 1]], 1)
    bent = points + 0.07 * random(*points.shape)
    return torch.einsum("nskx,nyx->nsky", bent, rows.reshape(-1, 2, 2)) + 0.08 * random(count, 1, 1, 2)


def _curves(points: Tensor) -> Tensor:
    """Control points (n, strokes, 3, 2) → points on the quadratic Béziers (n, strokes, points, 2)."""
    t = torch.linspace(0, 1, POINTS_A_STROKE)
    weights = torch.stack([(1 - t) ** 2, 2 * t * (1 - t), t**2], dim=1)
    return torch.einsum("pk,nskx->nspx", weights, points)


def _pixels() -> Tensor:
    """The centres of the pixels, (64, 2)."""
    centres = (torch.arange(SIDE) + 0.5) * 2 / SIDE - 1
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    return torch.stack([x, y], dim=-1).flatten(0, 1)
