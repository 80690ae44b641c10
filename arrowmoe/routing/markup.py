"""HTML and SVG as trees of elements: what is written comes out escaped and balanced, whatever text goes in."""

from __future__ import annotations

import re
from typing import Final
from xml.etree.ElementTree import Element, tostring

Child = Element | str | None

_UNPRINTABLE: Final = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def el(tag: str, *children: Child, **attributes: str | float | None) -> Element:
    """One element; `_` in an attribute's name stands for `-`, `class_` for class, and None leaves out."""
    element = Element(tag, {_name(key): _value(value) for key, value in attributes.items() if value is not None})
    last: Element | None = None
    for child in children:
        if isinstance(child, Element):
            element.append(child)
            last = child
        elif child is not None and last is None:
            element.text = (element.text or "") + _printable(child)
        elif child is not None and last is not None:
            last.tail = (last.tail or "") + _printable(child)
    return element


def document(root: Element) -> str:
    """A whole HTML document."""
    return "<!doctype html>\n" + tostring(root, encoding="unicode", method="html") + "\n"


def table(caption: str, header: list[str], rows: list[list[str]]) -> Element:
    """A table whose first column names its rows."""
    body = [el("tr", el("th", first, scope="row"), *(el("td", cell) for cell in rest)) for first, *rest in rows]
    head = el("tr", *(el("th", cell, scope="col") for cell in header))
    return el("table", el("caption", caption), el("thead", head), el("tbody", *body))


def _name(key: str) -> str:
    return key.rstrip("_").replace("_", "-")


def _value(value: str | float) -> str:
    return _printable(value) if isinstance(value, str) else f"{value:.5g}"


def _printable(text: str) -> str:
    """`text` without what neither HTML nor XML may hold: control characters and lone surrogates."""
    return _UNPRINTABLE.sub("\ufffd", text)
