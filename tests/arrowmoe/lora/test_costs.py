"""The choice of a layout, and where prices are kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from arrowmoe.lora.costs import (
    CPU,
    Layout,
    Part,
    Prices,
    Sizes,
    Work,
    cheapest,
    default_prices,
    keep_prices,
    prices_of,
    prices_path,
    work,
)

DEVICE = torch.device("cpu")
WIDTH = 1152  # a 576 → 576 map of SmolLM2


def sizes(rows: int, ranks: list[int], together: bool = False) -> Sizes:
    """Rows share the adapters of these ranks evenly."""
    parts = [Part(rank=rank, units=rows // len(ranks), together=together, one_gate=True) for rank in ranks]
    return Sizes(rows=rows, row_rank=max(ranks), total_rank=sum(ranks), one_gate=len(ranks) == 1, parts=parts)


@pytest.mark.parametrize(
    ("found", "tokens", "layout"),
    [
        (sizes(32, [8], together=True), 1, "concatenated"),
        (sizes(32, [8] * 32, together=True), 1, "by_row"),
        (sizes(32, [64, 1, 1, 1], together=True), 512, "segmented"),
    ],
)
def test_the_default_choice(found: Sizes, tokens: int, layout: Layout) -> None:
    assert cheapest(found, tokens, WIDTH, CPU) == layout


def test_gates_for_each_token_are_never_laid_out_by_row() -> None:
    found = Sizes(rows=4, row_rank=None, total_rank=64, one_gate=False, parts=[])
    assert work("by_row", found, 8, WIDTH) is None


def test_work_is_counted_by_the_formulas_of_the_document() -> None:
    found = sizes(32, [8, 4])
    assert work("concatenated", found, 10, 100) == Work(
        operation=3, read=12 * 100, multiply=320 * 12 * 100, move=320 * (100 + 12)
    )
    assert work("by_row", found, 10, 100) == Work(
        operation=2, read=32 * 8 * 100, multiply_batched=320 * 8 * 100, move=320 * 100
    )
    assert work("segmented", found, 10, 100) == Work(
        operation=8, read=12 * 100, multiply=160 * 12 * 100, move=3 * 320 * 100
    )


def test_prices_are_kept_by_device_and_dtype(tmp_path: Path) -> None:
    prices = Prices(operation=1, read=2, multiply=3, multiply_batched=4, move=5)
    path = keep_prices(tmp_path, DEVICE, torch.float32, prices)
    assert path == prices_path(tmp_path, DEVICE, torch.float32)
    assert prices_of(tmp_path, DEVICE, torch.float32) == prices
    assert prices_of(tmp_path, DEVICE, torch.bfloat16) == default_prices(DEVICE)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"operation": 1}', "null", "\x00"])
def test_a_damaged_file_gives_the_default(content: str, tmp_path: Path) -> None:
    path = keep_prices(tmp_path, DEVICE, torch.float32, CPU)
    path.write_text(content)
    assert prices_of(tmp_path, DEVICE, torch.float32) == default_prices(DEVICE)
