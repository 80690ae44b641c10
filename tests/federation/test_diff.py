from __future__ import annotations

from dataclasses import replace

from federation.diff import missing, selected
from registry.digest import digest_of
from tests.federation.liar import entry_of
from tests.registry.cards import small_card

A, B, C = (entry_of(small_card(name)) for name in ("a", "b", "c"))


def test_missing_keeps_the_order_and_each_digest_once() -> None:
    assert missing([C, A, B, replace(A, description="again")], {B.digest}) == [C, A]


def test_nothing_is_missing_of_what_is_here() -> None:
    assert missing([A, B], {A.digest, B.digest, C.digest}) == []
    assert missing([], {A.digest}) == []


def test_the_same_label_with_another_digest_is_missing() -> None:
    other = replace(A, digest=digest_of(b"other"))
    assert missing([other], {A.digest}) == [other]


def test_only_selects_by_name_label_and_digest() -> None:
    assert selected(A, None)
    for wanted in (A.name, A.label, A.digest):
        assert selected(A, {wanted, "else"})
        assert not selected(B, [wanted])
    assert not selected(A, ())
