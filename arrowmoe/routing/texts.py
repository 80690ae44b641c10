"""A card's own words, cut so that each part means one thing: an embedder makes more of them than of a long sentence."""

from __future__ import annotations

import re

_ENDS = re.compile(r"[:;,.!?()\n]+|\b(?:and|or)\b")


def phrases(description: str) -> tuple[str, ...]:
    """The description, and its parts between punctuation, "and" and "or", each once.

    "Questions about fuel, traffic and tires" gives itself, "Questions about fuel", "traffic" and "tires".
    """
    whole = description.strip()
    parts = [part.strip(" -–—\"'") for part in _ENDS.split(whole)]
    return tuple(dict.fromkeys(text for text in (whole, *parts) if text))


__all__ = ["phrases"]
