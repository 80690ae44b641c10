"""What `arrowmoe skills extract` does: a card out of two model directories, kept in this home."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from arrowmoe import views
from evolution.errors import ExtractionError
from evolution.extractor import Extraction, LoRAExtractor, Others, Progress
from evolution.model_files import ModelFiles
from registry.low_rank import Cut
from registry.store import Registry

Json = dict[str, Any]


def extract(
    registry: Registry,
    base: Path,
    tuned: Path,
    bound: dict[str, Any],
    *,
    others: Others,
    about: dict[str, Any],
    on_progress: Progress,
) -> Json:
    """Publish what `tuned` has learned beyond `base` as a card, within a bound of `Cut`; `about` has its name.

    Raises `ExtractionError`, and `LabelTakenError` for a name and version that mean another card.
    """
    try:
        cut = Cut(**bound)
    except ValueError as error:
        raise ExtractionError(str(error)) from error
    extractor = LoRAExtractor(cut=cut, others=others, on_progress=on_progress)
    one, other = ModelFiles(base), ModelFiles(tuned)
    found = extractor.extract(other, one, one.layout, base_name=one.name, **about)
    return told(found, views.card(registry.publish(found.card)))


def told(found: Extraction, card: Json) -> Json:
    """An extraction as a command tells it."""
    modules = [{"module": module, "rank": kept.rank, "error": kept.error} for module, kept in found.kept.items()]
    return {"card": card, "error": found.error, "modules": modules, "whole": [asdict(one) for one in found.others]}


__all__ = ["extract", "told"]
