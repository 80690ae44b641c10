"""Personal data and secrets in a text, and placeholders instead of them: `<EMAIL_1>`, the same for the same value.

Patterns find what has a form (addresses, numbers with a checksum, keys) and names after a phrase that announces one.
They find no name in free text and no street: whoever needs that adds presidio, or lets no prompt leave at all.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from ipaddress import ip_address
from typing import Final, NamedTuple, Protocol

from evolution.errors import DisclosureError

PLACEHOLDER: Final = re.compile(r"<[A-Z][A-Z_]*_\d+>")
MIN_ENTROPY_BITS: Final = 3.5
"""Per character, of a word of 20 or more that mixes letters and digits: random keys lie above, words below."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """Characters [`start`, `end`) of a text, and what they are."""

    start: int
    end: int
    kind: str


@dataclass(frozen=True, kw_only=True)
class Redaction:
    """A text with placeholders; `originals` maps each to what stood there, and never leaves the node."""

    text: str
    originals: Mapping[str, str]

    def restored(self, answer: str) -> str:
        """`answer` with the original values in place of this text's placeholders."""
        return PLACEHOLDER.sub(lambda found: self.originals.get(found[0], found[0]), answer)


class Redactor(Protocol):
    """Replaces personal data and secrets."""

    def redact(self, text: str) -> Redaction:
        """`text` with placeholders."""


class PatternRedactor:
    """Finds by patterns and checksums."""

    def redact(self, text: str) -> Redaction:
        """`text` with placeholders."""
        return redacted(text, spans(text))


class _Found(Protocol):
    start: int
    end: int
    entity_type: str


class Analyzer(Protocol):
    """What is used of presidio's `AnalyzerEngine`."""

    def analyze(self, text: str, language: str) -> Sequence[_Found]:
        """Entities in a text."""


class PresidioRedactor:
    """Finds what presidio's models recognise, and what the patterns find besides."""

    def __init__(self, analyzer: Analyzer | None = None, *, language: str = "en") -> None:
        self._analyzer, self._language = analyzer or _presidio(), language

    def redact(self, text: str) -> Redaction:
        """`text` with placeholders."""
        entities = self._analyzer.analyze(text, self._language)
        more = [Span(start=found.start, end=found.end, kind=found.entity_type) for found in entities]
        return redacted(text, [*spans(text), *more])


def redacted(text: str, found: Iterable[Span]) -> Redaction:
    """`text` with a placeholder for each span; spans that overlap become one."""
    names: dict[str, str] = {}
    pieces, at = [], 0
    for span in _merged(found):
        value = text[span.start : span.end]
        placeholder = names.setdefault(value, "") or _unused(span.kind, text, names.values())
        names[value] = placeholder
        pieces += [text[at : span.start], placeholder]
        at = span.end
    return Redaction(text="".join([*pieces, text[at:]]), originals={name: value for value, name in names.items()})


def spans(text: str) -> list[Span]:
    """What the patterns find, in any order and perhaps overlapping."""
    found = [
        Span(start=match.start("value"), end=match.end("value"), kind=kind)
        for kind, pattern, fits in _PATTERNS
        for match in pattern.finditer(text)
        if fits(match["value"])
    ]
    named = [*_names(text)]
    return [*found, *_ibans(text), *named, *_again(text, named)]


def _merged(found: Iterable[Span]) -> list[Span]:
    merged: list[Span] = []
    for span in sorted(found, key=lambda span: (span.start, -span.end)):
        if merged and span.start < merged[-1].end:
            last = merged.pop()
            span = Span(start=last.start, end=max(last.end, span.end), kind=last.kind)
        merged.append(span)
    return merged


def _unused(kind: str, text: str, taken: Iterable[str]) -> str:
    number, used = 1, set(taken)
    while (name := f"<{kind}_{number}>") in used or name in text:
        number += 1
    return name


def _names(text: str) -> Iterator[Span]:
    """Up to three capitalised words after a phrase that announces a name; after a sure one, two of any kind."""
    for cue in _NAME.finditer(text):
        words: list[re.Match[str]] = []
        for word in _WORD.finditer(text, cue.end(), cue.end() + 80):
            sure = cue["sure"] and len(words) < 2 and word[0].casefold() not in _NO_NAMES
            if len(words) == 3 or not (word[0][0].isupper() or sure) or not _adjoins(text, cue, words, word):
                break
            words.append(word)
        if words:
            yield Span(start=words[0].start(), end=words[-1].end(), kind="NAME")


def _adjoins(text: str, cue: re.Match[str], words: Sequence[re.Match[str]], word: re.Match[str]) -> bool:
    """Whether only blanks, or the full stop of an initial or a title, stand before `word`."""
    before = words[-1] if words else cue
    between = text[before.end() : word.start()].strip()
    return not between or (between == "." and bool(words) and len(before[0]) <= 2)


def _again(text: str, named: Iterable[Span]) -> Iterator[Span]:
    """Where a name that was announced, or a part of it, stands elsewhere."""
    values = {word for span in named for word in _WORD.findall(text[span.start : span.end]) if len(word) > 2}
    for value in values:
        for match in re.finditer(rf"\b{re.escape(value)}\b", text):
            yield Span(start=match.start(), end=match.end(), kind="NAME")


def _ibans(text: str) -> Iterator[Span]:
    for match in _IBAN.finditer(text):
        ends = [word.end() for word in re.compile(r"\w+").finditer(text, match.start(), match.end())]
        end = next((end for end in reversed(ends) if _is_iban(text[match.start() : end])), None)
        if end is not None:
            yield Span(start=match.start(), end=end, kind="IBAN")


def _is_iban(value: str) -> bool:
    """ISO 7064 MOD 97-10, as ISO 13616 asks for."""
    compact = re.sub(r"[ -]", "", value)
    if not 15 <= len(compact) <= 34:
        return False
    return int("".join(str(int(sign, 36)) for sign in compact[4:] + compact[:4])) % 97 == 1


def _is_payment_card(value: str) -> bool:
    """Luhn's checksum (ISO/IEC 7812-1)."""
    digits = [int(sign) for sign in reversed(value) if sign.isdigit()]
    doubled = sum(digits[0::2]) + sum(sum(divmod(2 * digit, 10)) for digit in digits[1::2])
    return 13 <= len(digits) <= 19 and doubled % 10 == 0


def _is_phone(value: str) -> bool:
    digits = sum(sign.isdigit() for sign in value)
    least = 7 if value.startswith("+") or _LOCAL.fullmatch(value) else 9
    return least <= digits <= 15 and not _DATE_FIRST.match(value)


def _is_address(value: str) -> bool:
    try:
        ip_address(value)
    except ValueError:
        return False
    return True


def _is_random(value: str) -> bool:
    counts, n = Counter(value), len(value)
    bits = -sum(count / n * math.log2(count / n) for count in counts.values())
    mixed = any(map(str.isdigit, value)) and any(map(str.isalpha, value))
    return mixed and bits >= MIN_ENTROPY_BITS


def _anything(_: str) -> bool:
    return True


def _presidio() -> Analyzer:
    try:
        module = import_module("presidio_analyzer")
    except ModuleNotFoundError as error:
        raise DisclosureError(
            "expected presidio to redact with, got no such package", hint="pip install 'arrowmoe[presidio]'"
        ) from error
    analyzer: Analyzer = module.AnalyzerEngine()
    return analyzer


class _Pattern(NamedTuple):
    kind: str
    regex: str
    """Its group `value` is what is replaced."""
    fits: Callable[[str], bool] = _anything


_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.?"
_DATES = (
    r"\d{1,4}[./-]\d{1,2}[./-]\d{1,4}",
    rf"\d{{1,2}}(?:st|nd|rd|th|\.)?\s+(?:of\s+)?{_MONTH},?\s+\d{{4}}",
    rf"{_MONTH}\s+\d{{1,2}}(?:st|nd|rd|th)?,?\s+\d{{4}}",
)
_KEYS = (
    r"sk-[\w-]{16,}",
    r"gh[pousr]_\w{20,}",
    r"github_pat_\w{20,}",
    r"glpat-[\w-]{16,}",
    r"xox[abeprs]-[\w-]{10,}",
    r"(?:AKIA|ASIA)[0-9A-Z]{16}",
    r"AIza[\w-]{30,}",
    r"hf_\w{20,}",
    r"npm_\w{30,}",
    r"pypi-[\w-]{16,}",
    r"ya29\.[\w-]{20,}",
    r"eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*",
)
_SECRETS = r"password|passwort|passwd|pwd|passphrase|secret|token|api[ _-]?key|pin"
_BIRTH = r"born(?: on)?|date of birth|birth ?date|birthday|dob"
_IPV6 = r"(?:[0-9a-f]{0,4}:){2,7}(?:[0-9a-f]{1,4}|\d{1,3}(?:\.\d{1,3}){3})?"
_SAID = r"(?:\s+is|\s*[=:])"
_AT, _DOT = r"\s*[\[(]\s*at\s*[\])]\s*", r"\s*(?:\.|[\[(]\s*dot\s*[\])])\s*"
_MAIL_START = r"(?<![\w.+%'-])"
"""A match begins where a word does, so that a long one without @ is read once."""

_LOCAL = re.compile(r"\d{3}[-.]\d{4}")
_DATE_FIRST = re.compile(r"\d{4}-\d{2}-\d{2}|\d{1,2}[.-]\d{1,2}[.-]\d{4}")
_IBAN = re.compile(r"\b[A-Za-z]{2}\d{2}(?:[ -]?[A-Za-z0-9]){11,30}", re.ASCII)
_WORD = re.compile(r"[^\W\d_][\w'’-]*")
_NAME = re.compile(
    r"\b(?:(?P<sure>my (?:full )?name(?: is|'s|’s|:)|name\s*:)"
    r"|i am|i'm|i’m|this is|call me|signed|regards,|sincerely,|dear|mr\.?|mrs\.?|ms\.?|dr\.?)(?=\s)",
    re.IGNORECASE,
)
_NO_NAMES = frozenset(("and", "but", "or", "so", "i", "my", "the", "a", "from", "in", "at", "not", "what", "please"))
_PATTERNS: Final = tuple(
    (pattern.kind, re.compile(pattern.regex), pattern.fits)
    for pattern in (
        _Pattern("SECRET", r"(?s)(?P<value>-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*-----|\Z))"),
        _Pattern("URL", r"(?i)(?P<value>\b[a-z][a-z0-9+.-]{0,20}://[^\s/@]+@\S+)"),
        _Pattern("SECRET", r"(?i)[?&](?:\w*token|\w*key|\w*secret|password|pwd|sig|signature)=(?P<value>[^\s&#]+)"),
        _Pattern("SECRET", rf"(?i)\b(?:{_SECRETS})\b{_SAID}\s*(?P<value>\S+)"),
        _Pattern("SECRET", r"(?i)\bbearer\s+(?P<value>[\w.~+/-]{12,}=*)"),
        _Pattern("SECRET", rf"\b(?P<value>{'|'.join(_KEYS)})"),
        _Pattern("SECRET", r"(?<![\w+/=-])(?P<value>[\w+/=-]{20,})", _is_random),
        _Pattern("EMAIL", rf"{_MAIL_START}(?P<value>[\w.+%'-]+@[\w-]+(?:\.[\w-]+)*)"),
        _Pattern("EMAIL", rf"(?i){_MAIL_START}(?P<value>[\w.+-]+{_AT}[\w-]+(?:{_DOT}[\w-]+)+)"),
        _Pattern("EMAIL", rf"(?i){_MAIL_START}(?P<value>[\w.+-]+ at [\w-]+(?: dot [\w-]+)+)"),
        _Pattern("CARD", r"(?<![\d.])(?P<value>\d(?:[ -]?\d){12,18})(?!\d)", _is_payment_card),
        _Pattern("SSN", r"(?<![\d-])(?P<value>\d{3}[- ]\d{2}[- ]\d{4})(?![\d-])"),
        _Pattern("IP", r"(?<![\w.])(?P<value>\d{1,3}(?:\.\d{1,3}){3})(?![\w.]*\w)", _is_address),
        _Pattern("IP", rf"(?i)(?<![\w:])(?P<value>{_IPV6})(?![\w:])", _is_address),
        _Pattern("PHONE", r"(?<![\w.])(?P<value>(?:\+|\(\+?)?\d(?:[ ().-]{0,2}\d){6,14})(?!\w)", _is_phone),
        _Pattern("BIRTH", rf"(?i)\b(?:{_BIRTH})\b{_SAID}?\s*(?P<value>{'|'.join(_DATES)})"),
    )
)


__all__ = [
    "PLACEHOLDER",
    "Analyzer",
    "PatternRedactor",
    "PresidioRedactor",
    "Redaction",
    "Redactor",
    "Span",
    "redacted",
    "spans",
]
