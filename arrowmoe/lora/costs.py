"""What each layout of the gated sum costs, from sizes alone; prices are measured by `arrowmoe bench tune`.

A layout's seconds are its work (operations launched, elements read, multiply-adds, elements moved) times the device's
prices. The model is linear, so that prices can be fitted; it needs to rank layouts, not to predict a clock.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Literal

import torch

from arrowmoe.lora import grouped
from registry.logs import get_logger

log = get_logger(__name__)

Layout = Literal["concatenated", "by_row", "segmented", "grouped"]
LAYOUTS: tuple[Layout, ...] = ("concatenated", "by_row", "segmented")
"""Those that every device computes."""


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Seconds for one operation, one element of an adapter read, one multiply-add of a product or of a batched one
    (a small product for each row), and one element of an activation read, gathered, scattered or gated.

    `launch` and `multiply_grouped`: one of our own kernels, and a multiply-add in it; no price where there are none.
    """

    operation: float
    read: float
    multiply: float
    multiply_batched: float
    move: float
    launch: float = 0.0
    multiply_grouped: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Work:
    """How much of each a layout does at one module; fields as in `Prices`."""

    operation: float = 0.0
    read: float = 0.0
    multiply: float = 0.0
    multiply_batched: float = 0.0
    move: float = 0.0
    launch: float = 0.0
    multiply_grouped: float = 0.0

    def seconds(self, prices: Prices) -> float:
        """Estimated seconds."""
        total: float = sum(amount * price for amount, price in zip(astuple(self), astuple(prices), strict=True))
        return total


@dataclass(frozen=True, kw_only=True)
class Part:
    """One adapter's segment: its rank, how many units it has, whether they lie together and have one gate."""

    rank: int
    units: int
    together: bool
    one_gate: bool


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A batch's sizes at modules whose adapters have the same ranks.

    `row_rank` is the largest sum of ranks that one row uses, None where every token chooses; `one_gate` whether all
    rows have one adapter and one gate.
    """

    rows: int
    row_rank: int | None
    total_rank: int
    one_gate: bool
    parts: Sequence[Part]


# Measured by `arrowmoe bench tune` on one x86-64 core with torch 2.13, fp32, 2026-11-21.
CPU = Prices(operation=3.4e-6, read=2.0e-10, multiply=2.3e-11, multiply_batched=2.7e-11, move=7.7e-11)
# A guess from data sheets (a launch, 3 TB/s, a few hundred TFLOP/s in bf16): no GPU was at hand. Triton's launches are
# made in Python and cost more than torch's.
CUDA = Prices(
    operation=4e-6,
    read=1e-12,
    multiply=5e-15,
    multiply_batched=1e-14,
    move=1e-12,
    launch=1.5e-5,
    multiply_grouped=2e-14,
)


def work(layout: Layout, sizes: Sizes, tokens: int, width: int) -> Work | None:
    """What `layout` does for `tokens` per row at a module with `width` = d_in + d_out; None if it cannot be used."""
    if layout == "concatenated":
        return _concatenated(sizes, tokens, width)
    if layout == "segmented":
        return _segmented(sizes, tokens, width)
    if layout == "grouped":
        return _grouped(sizes, tokens, width)
    return None if sizes.row_rank is None else _by_row(sizes.rows, sizes.row_rank, tokens, width)


def layouts_on(device: torch.device) -> tuple[Layout, ...]:
    """The layouts that `device` computes."""
    return (*LAYOUTS, "grouped") if grouped.usable(device) else LAYOUTS


def cheapest(sizes: Sizes, tokens: int, width: int, prices: Prices, layouts: tuple[Layout, ...] = LAYOUTS) -> Layout:
    """The one of `layouts` that takes least time."""
    seconds = {
        layout: found.seconds(prices) for layout in layouts if (found := work(layout, sizes, tokens, width)) is not None
    }
    return min(seconds, key=lambda layout: seconds[layout])


def default_prices(device: torch.device) -> Prices:
    """What is used where nothing was measured."""
    return CUDA if device.type == "cuda" else CPU


def prices_of(cache: Path, device: torch.device, dtype: torch.dtype) -> Prices:
    """What was measured here for `device` and `dtype`, else the default."""
    path = prices_path(cache, device, dtype)
    try:
        found = json.loads(path.read_bytes())
        return Prices(**{field.name: float(found[field.name]) for field in fields(Prices)})
    except FileNotFoundError:
        return default_prices(device)
    except (ValueError, KeyError, TypeError) as error:
        log.warning("prices_unreadable", path=str(path), error=repr(error))
        return default_prices(device)


def keep_prices(cache: Path, device: torch.device, dtype: torch.dtype, prices: Prices) -> Path:
    """Write what was measured, whole or not at all; where it now is."""
    path = prices_path(cache, device, dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(asdict(prices)), encoding="utf-8")
    return draft.replace(path)


def prices_path(cache: Path, device: torch.device, dtype: torch.dtype) -> Path:
    """The file for a kind of device, its threads and a dtype."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    threads = "" if device.type == "cuda" else f"-{torch.get_num_threads()}"
    words = f"{device.type}-{name}{threads}-{str(dtype).removeprefix('torch.')}"
    return cache / "kernels" / f"{''.join(letter if letter.isalnum() else '-' for letter in words)}.json"


def _concatenated(sizes: Sizes, tokens: int, width: int) -> Work:
    units = sizes.rows * tokens
    return Work(
        operation=2 if sizes.one_gate else 3,
        read=sizes.total_rank * width,
        multiply=units * sizes.total_rank * width,
        move=units * (width if sizes.one_gate else width + sizes.total_rank),
    )


def _by_row(rows: int, row_rank: int, tokens: int, width: int) -> Work:
    units = rows * tokens
    return Work(
        operation=2,
        read=rows * row_rank * width,
        multiply_batched=units * row_rank * width,
        move=units * width,
    )


def _segmented(sizes: Sizes, tokens: int, width: int) -> Work:
    each = tokens if sizes.row_rank is not None else 1
    return Work(
        operation=sum((2 if part.together else 4) + (not part.one_gate) for part in sizes.parts),
        read=sum(part.rank * width for part in sizes.parts),
        multiply=sum(part.units * each * part.rank * width for part in sizes.parts),
        move=sum(part.units * each * width * (1 if part.together else 3) for part in sizes.parts),
    )


def _grouped(sizes: Sizes, tokens: int, width: int) -> Work:
    """Ranks are computed in pieces of 16, and an adapter is read once for every tile of 16 units or tokens."""
    each = tokens if sizes.row_rank is not None else 1
    ranks = [-(-part.rank // grouped.RANKS) * grouped.RANKS for part in sizes.parts]
    return Work(
        launch=2,
        read=sum(part.rank * width * -(-part.units * each // grouped.TILE) for part in sizes.parts),
        multiply_grouped=sum(part.units * each * rank * width for part, rank in zip(sizes.parts, ranks, strict=True)),
        move=sum(part.units * each * (width + 2 * rank) for part, rank in zip(sizes.parts, ranks, strict=True)),
    )


__all__ = [
    "LAYOUTS",
    "Layout",
    "Part",
    "Prices",
    "Sizes",
    "Work",
    "cheapest",
    "default_prices",
    "keep_prices",
    "layouts_on",
    "prices_of",
    "prices_path",
    "work",
]
