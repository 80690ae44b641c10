from __future__ import annotations

from dataclasses import replace

import pytest

from federation import diff
from federation.diff import SyncFilter, missing
from registry.digest import digest_of
from registry.identity import Identity
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


POET = replace(
    A, name="poet.de", version="2", publisher="f" * 32, domains=("verse", "german"), nbytes=1000, base_name="llama"
)


@pytest.mark.parametrize(
    "wanted",
    [
        {},
        {"names": ("poet.de",)},
        {"names": ("else", "poet.*")},
        {"names": ("poet.de@2",)},
        {"names": ("*@2",)},
        {"names": (POET.digest,)},
        {"bases": ("llama",)},
        {"bases": ("else", "LlamaForCausalLM")},
        {"bases": (POET.fingerprint,)},
        {"publishers": ("e" * 32, "f" * 32)},
        {"domains": ("ger*",)},
        {"max_bytes": 1000},
        {"names": ("p*",), "bases": ("llama",), "publishers": ("f" * 32,), "domains": ("verse",), "max_bytes": 1000},
    ],
)
def test_a_filter_lets_in_what_fits_all_its_fields(wanted: dict[str, tuple[str, ...]]) -> None:
    assert SyncFilter(**wanted).wants(POET)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wanted",
    [
        {"names": ("poet",)},
        {"names": ("POET*",)},
        {"names": ("poet.de@1",)},
        {"bases": ("llam*",)},
        {"publishers": ("e" * 32,)},
        {"domains": ("french",)},
        {"max_bytes": 999},
        {"names": ("poet.de",), "max_bytes": 0},
    ],
)
def test_a_filter_keeps_out_what_one_field_does_not_fit(wanted: dict[str, tuple[str, ...]]) -> None:
    assert not SyncFilter(**wanted).wants(POET)  # type: ignore[arg-type]


def test_a_card_without_publisher_base_or_domains_fits_no_filter_that_asks_for_them() -> None:
    bare = replace(A, publisher=None, base_name=None, architecture=None, domains=())
    assert SyncFilter().wants(bare)
    for wanted in (SyncFilter(publishers=("f" * 32,)), SyncFilter(domains=("*",)), SyncFilter(bases=("llama",))):
        assert not wanted.wants(bare)


def test_a_card_s_own_entry_says_what_its_manifest_says() -> None:
    author = Identity.generate()
    card = small_card("poet", domains=["verse"], examples=["Write"], description="rhymes").signed(author)
    said = {"domains": ("verse",), "examples": ("Write",), "description": "rhymes", "publisher": author.id}
    assert diff.entry_of(card) == entry_of(card, **said)
