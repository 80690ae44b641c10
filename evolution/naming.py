"""What a gap is called: its key terms and a slug, in words that may leave the node.

Rules: a term stands in at least `SHARED_BY` distinct prompts of the gap, is one plain word without digits, and has
been written otherwise than with a capital alone, as names of people and places are; so no prompt's own words leave.
A name that several prompts write small is not noticed.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final

from evolution.protocols import Theme

SHARED_BY: Final = 3
TERMS: Final = 8
UNNAMED: Final = "unnamed-gap"
_IN_NAME: Final = 3
_LONGEST_NAME: Final = 96
_PRIVATE: Final = re.compile(r"\S*(?:[@/\\_\d]|\w\.\w)\S*")
"""Addresses, paths, keys, numbers: whatever stands between two spaces and holds a sign of one of these."""
_WORD: Final = re.compile(r"\b[^\W\d_]{3,24}\b")
_STOP_TEXT: Final = """
    about above after again all also and any are because been before being below between both but can cannot could
    did does doing don down during each ever few for from further get give given had has have having her here hers him
    his how into its itself just know let like made make many may might more most much must need nor not now off once
    one only onto other our out over own per please put really same say see shall she should some such take tell than
    thank that the their them then there these they this those through too under until upon use very want was way well
    were what when where whether which while who whom whose why will with within without would yes yet you your yours
"""
_STOP: Final = frozenset(_STOP_TEXT.split())


def name_gap(prompts: Sequence[str], others: Sequence[str] = (), *, labels: Sequence[str] = ()) -> Theme:
    """What the gap of `prompts` is about, against `others`: a slug that is a card's name, a sentence, and key terms.

    `labels` are an encoder's, if they may leave.
    """
    terms = key_terms(prompts, others)
    about = f"Requests about {', '.join(terms)}." if terms else "Requests that share no words which may be told."
    return Theme(name=slug(sorted(terms[:_IN_NAME])), description=about, terms=terms, labels=tuple(labels))


def key_terms(prompts: Sequence[str], others: Sequence[str] = (), *, count: int = TERMS) -> tuple[str, ...]:
    """The most telling words of `prompts` against `others`, by c-TF-IDF (Grootendorst 2022, arXiv:2203.05794, eq. 2).

    W(t, c) = tf(t, c) · ln(1 + A / f(t)): how often the word stands in the gap, A words per class on average, f(t) of
    them t over both classes. Equal prompts count once.
    """
    inside, outside = _distinct(prompts), _distinct(others)
    here, there = _counted(inside), _counted(outside)
    average = (here.total() + there.total()) / (2 if there else 1)
    spread = Counter(word for prompt in inside for word in set(_words(prompt)))
    tellable = _not_names([*inside, *outside])
    weights = {
        word: times * math.log(1 + average / (times + there[word]))
        for word, times in here.items()
        if spread[word] >= SHARED_BY and word in tellable
    }
    return tuple(sorted(weights, key=lambda word: (-weights[word], word))[:count])


def slug(terms: Iterable[str]) -> str:
    """Terms → a card's name: small ASCII letters joined by hyphens; `UNNAMED` where none are left."""
    plain = (unicodedata.normalize("NFKD", term).encode("ascii", "ignore").decode().lower() for term in terms)
    name = "-".join(word for term in plain if (word := re.sub(r"[^a-z]", "", term)))
    return name[:_LONGEST_NAME].rstrip("-") or UNNAMED


def _distinct(prompts: Sequence[str]) -> list[str]:
    return [*{" ".join(prompt.casefold().split()): prompt for prompt in prompts}.values()]


def _spelt(prompt: str) -> list[str]:
    """Words that may be told, as they are written."""
    return _WORD.findall(_PRIVATE.sub(" ", prompt))


def _words(prompt: str) -> list[str]:
    return [word for spelt in _spelt(prompt) if (word := spelt.casefold()) not in _STOP]


def _counted(prompts: Iterable[str]) -> Counter[str]:
    return Counter(word for prompt in prompts for word in _words(prompt))


def _not_names(prompts: Iterable[str]) -> set[str]:
    """Words that somebody has written in small letters, or wholly in capitals."""
    return {word.casefold() for prompt in prompts for word in _spelt(prompt) if word.islower() or word.isupper()}


__all__ = ["SHARED_BY", "TERMS", "UNNAMED", "key_terms", "name_gap", "slug"]
