from __future__ import annotations

from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from registry.blank import write_blank
from registry.card import LoRACard
from registry.format import LoRAFormat
from registry.identity import Identity
from tests.registry.cards import cards, module_shapes, small_card


def filled(card: LoRACard) -> bytes:
    """The blank file of `card`, made without its tensors, with their bytes put in where they belong."""
    file = BytesIO()
    layout = write_blank(replace(card, tensors=()), file)
    data = b"".join(tensor.data for tensor in card.tensors)
    for start, end, place in layout.places_of(0, len(data)):
        file.seek(place)
        file.write(data[start:end])
    assert len(file.getvalue()) == layout.file_bytes
    return file.getvalue()


def saved(card: LoRACard, directory: Path) -> bytes:
    LoRAFormat.save(card, directory / "card")
    return (directory / "card").read_bytes()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cards())
def test_a_filled_blank_is_the_file_of_the_card(tmp_path: Path, card: LoRACard) -> None:
    assert filled(card) == saved(card, tmp_path)


@pytest.mark.parametrize("modules", [module_shapes(9, d_in=4096, d_out=64), module_shapes(1, d_in=500_000)])
def test_a_filled_blank_of_several_batches_is_the_file_of_the_card(
    tmp_path: Path, modules: dict[str, tuple[int, int]]
) -> None:
    card = small_card("large", modules=modules, rank=8).signed(Identity.generate())
    assert filled(card) == saved(card, tmp_path)


def test_a_part_is_placed_as_in_the_whole() -> None:
    card = small_card("large", modules=module_shapes(9, d_in=4096, d_out=64), rank=32)
    layout = write_blank(replace(card, tensors=()), BytesIO())
    assert len(layout.places) > 1
    where = {number: place for number, _, place in layout.places_of(0, card.nbytes)}
    for start, end, place in layout.places_of(5_000, card.nbytes - 7):
        batch = max(number for number in where if number <= start)
        assert place == where[batch] + start - batch
        assert end <= card.nbytes - 7


def test_empty_tensors_take_no_place(tmp_path: Path) -> None:
    card = small_card("empty", modules={"layer": (0, 4)})
    assert filled(card) == saved(card, tmp_path)
